//! A decode step allocates nothing, once its buffers have grown: a test binary of its own, since it
//! counts what the whole process allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use bevel_base::DType;
use bevel_kernels::{Cpu, KvType};
use bevel_model::{Adapter, AdapterFile, Checkpoint, LowRank, Model, ScaledAdapter, Session};

struct Counting;

const STEPS: u32 = 270;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: as `System`, which does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An adapter of queries and values.
fn adapter(checkpoint: &Checkpoint, cpu: &Cpu) -> ScaledAdapter {
    let config = checkpoint.config();
    let mut file = AdapterFile::new("test");
    for weight in ["blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.attn_qkv.weight"] {
        let Some(&[rows, cols]) = config.tensor_shape(weight).as_deref() else { continue };
        let (a, b) = (vec![0.01; 4 * cols], vec![0.01; rows * 4]);
        let dtype = DType::F32;
        let matrix = LowRank {
            rank: 4,
            alpha: 8.0,
            rank_stabilized: false,
            dtype,
            a,
            b,
            magnitude: Some(vec![1.0; rows]),
        };
        file.insert(config, weight, matrix).unwrap();
    }
    ScaledAdapter { adapter: Adapter::new(&file, checkpoint, cpu).unwrap().into(), scale: 1.0 }
}

#[test]
fn a_decode_step_allocates_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut models = vec![root.join("../../assets/tiny-austen")];
    for family in std::fs::read_dir(root.join("tests/goldens/families")).unwrap() {
        models.push(family.unwrap().path());
    }
    for kind in std::fs::read_dir(root.join("tests/goldens/quantized")).unwrap() {
        models.push(kind.unwrap().path());
    }
    let models = models.iter().filter(|path| path.join("config.json").is_file());
    let mut counts = Vec::new();
    for (path, threads) in models.flat_map(|path| [(path, 1), (path, 2)]) {
        let cpu = Cpu::new(threads).unwrap();
        // A thread that starts allocates its name.
        let all_there = Barrier::new(threads);
        cpu.pool().run(threads, |_| {
            all_there.wait();
        });
        let checkpoint = Checkpoint::open(path).unwrap();
        let adapters = [adapter(&checkpoint, &cpu)];
        let model = Model::load(checkpoint, &cpu, &mut |_| {}).unwrap();
        let model = model.with_adapters(adapters.into());
        let mut session = Session::new(&model, &cpu, 300, KvType::F16).unwrap();
        // Beyond a block of the cache, and beyond a tile and a chunk of attention.
        let mut decode = || {
            session.truncate(0);
            session.feed(&[1; 20]).unwrap();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for token in 0..STEPS {
                session.step(&[token % 20], &[0]).unwrap();
            }
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        decode();
        counts.push((path.file_name().unwrap().to_owned(), threads, decode()));
    }
    assert!(counts.len() >= 2 * 15, "models are missing: {counts:?}");
    let wrong: Vec<_> = counts.iter().filter(|(_, _, count)| *count > 0).collect();
    assert!(wrong.is_empty(), "allocations in {STEPS} steps, by model and threads: {wrong:?}");
}
