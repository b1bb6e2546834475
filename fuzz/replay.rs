//! What the fuzz targets check, without a fuzzer: every corpus file and thousands of mutations of
//! them go through a parser, which must neither panic nor allocate far more than its input.
//!
//! A crate's tests include this file by `#[path]`, register [`Counting`] as their global allocator
//! and call [`replay`] once per target. Mutations depend on nothing but the corpus, so that a
//! failure repeats.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest that one input may take, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `target` over the files in `fuzz/corpus/NAME` and over mutations of them, for at most
/// `time`.
///
/// # Panics
/// Where the corpus is empty, where `target` panics or takes ten seconds, and where it holds more
/// than 64 bytes at a time for each byte of input, `overhead` bytes to begin with. The offending
/// input is saved beside the build's other products.
pub(crate) fn replay(name: &str, time: Duration, overhead: usize, target: impl Fn(&[u8])) {
    let directory = corpus(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.expect("a readable corpus").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus in {}", directory.display());
    let corpus: Vec<Vec<u8>> =
        files.iter().map(|file| std::fs::read(file).expect("a readable corpus file")).collect();
    for input in &corpus {
        run(name, input, overhead, &target);
    }

    let start = Instant::now();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..1_000_000 {
        let mut input = corpus[round % corpus.len()].clone();
        for _ in 0..=random.below(4) {
            let other = &corpus[random.below(corpus.len())];
            mutate(&mut input, other, &mut random);
        }
        run(name, &input, overhead, &target);
        if start.elapsed() > time {
            break;
        }
    }
}

/// The directory of a target's seeds.
pub(crate) fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name)
}

fn run(name: &str, input: &[u8], overhead: usize, target: &impl Fn(&[u8])) {
    let before = LIVE.get();
    PEAK.set(before);
    let start = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| target(input)));
    let (held, took) = (PEAK.get() - before, start.elapsed());
    let allowed = (64 * input.len() + overhead) as isize;
    if outcome.is_ok() && held <= allowed && took <= PATIENCE {
        return;
    }
    let saved = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.crash"));
    std::fs::write(&saved, input).expect("a writable target directory");
    eprintln!("the input is saved as {}", saved.display());
    match outcome {
        Err(panic) => resume_unwind(panic),
        Ok(()) => panic!("{name} held {held} bytes and took {took:?} for {} bytes", input.len()),
    }
}

/// Changes, inserts, removes, moves or cuts some bytes.
fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if input.is_empty() {
        input.push(random.next() as u8);
    }
    let at = random.below(input.len());
    let len = 1 + random.below((input.len() - at).min(32));
    match random.below(8) {
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = random.next() as u8,
        // Lengths, offsets and counts that overflow, are negative or just past a limit.
        2 => {
            const EDGES: [u64; 9] =
                [0, 1, 2, 0x7f, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
            let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
            let width = [1, 2, 4, 8][random.below(4)].min(input.len() - at);
            input[at..at + width].copy_from_slice(&edge[..width]);
        }
        // A small change to a number, in binary or in text.
        3 => input[at] = input[at].wrapping_add([1, 255, 16, 240][random.below(4)]),
        4 => input.truncate(at),
        5 => drop(input.drain(at..at + len)),
        6 => {
            let copy = input[at..at + len].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        _ => {
            let from = random.below(other.len().max(1));
            let piece = &other[from.min(other.len())..(from + len).min(other.len())];
            input.splice(at..at, piece.iter().copied());
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// The system's allocator, counting what each thread holds.
pub(crate) struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Threads allocate a little while they end; that is not counted.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call is passed on unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size as isize - layout.size() as isize);
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(block, layout) }
    }
}
