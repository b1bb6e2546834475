//! Speed of matrix products for each weight type and some numbers of tokens `n`: bytes of weights read
//! in a second, microseconds, operations (a multiplication and an addition are two) in a second.
//! After the types of files come codes in groups of 128, by the names of [`GROUPED`].
//!
//! `cargo run --release -p bevel-kernels --example matmul_speed -- [THREADS] [TYPE ...]`

use std::time::Instant;

use bevel_base::DType;
use bevel_base::grouped::{Coding, GroupedMatrix, Zeros};
use bevel_kernels::{Cpu, PackedMatrix, Product, Scratch, limits, matmul};

const SHAPES: [(usize, usize); 4] = [(576, 576), (1536, 576), (576, 1536), (49152, 576)];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(1, |n| n.parse().expect("a number of threads"));
    let names: Vec<String> = arguments.collect();
    let wanted =
        |name: &str| names.is_empty() || names.iter().any(|n| n.eq_ignore_ascii_case(name));
    let cpu = Cpu::new(threads).expect("a known instruction set");
    println!("{} threads, {}; the fastest of several runs", cpu.pool().threads(), cpu.isa());
    println!(
        "{:8} {:>11} {:>6} {:>6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>5}",
        "type", "shape", "bits", "pack", "n=1", "n=1", "n=2", "n=4", "n=8", "n=16", "n=512", ""
    );
    println!(
        "{:8} {:>11} {:>6} {:>6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>5}",
        "", "", "", "GB/s", "GB/s", "us", "us", "us", "us", "us", "GOP/s", "peak"
    );
    // Bytes at random are blocks, if not reasonable ones.
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    for dtype in DType::all().filter(|dtype| dtype.is_weight() && wanted(dtype.name())) {
        for (rows, cols) in SHAPES {
            let cols = cols.next_multiple_of(dtype.block_len());
            let mut data = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
            data.iter_mut().for_each(|byte| *byte = random() & 0x3b);
            speed(&cpu, dtype.name(), || {
                PackedMatrix::pack(&cpu, dtype, rows, cols, &data).expect("a weight type")
            });
        }
    }
    for (name, bits) in GROUPED.into_iter().filter(|(name, _)| wanted(name)) {
        for (rows, cols) in SHAPES {
            let groups = rows * cols.div_ceil(128);
            let mut bytes = |len: usize| -> Vec<u8> {
                (0..len).map(|_| random() & ((1u16 << bits) - 1) as u8 & 0xbf).collect()
            };
            let codes = bytes(rows * cols);
            let coding = match name {
                "nf4" => Coding::Levels(std::array::from_fn(|i| (i as f32 - 7.5).sin())),
                "fp8" => Coding::Float8,
                _ if name.ends_with('a') => {
                    Coding::Integer { bits, zeros: Zeros::Each(bytes(groups)) }
                }
                _ => Coding::Integer { bits, zeros: Zeros::Symmetric },
            };
            let scales = vec![0.01; groups];
            let matrix = GroupedMatrix {
                rows,
                cols,
                group_size: 128,
                coding,
                codes,
                scales,
                group_of: None,
            };
            speed(&cpu, name, || PackedMatrix::pack_grouped(&cpu, &matrix, 0..rows));
        }
    }
}

/// Codes in groups, and their bits: symmetric and affine integers, levels, FP8.
const GROUPED: [(&str, u32); 14] = [
    ("w2s", 2),
    ("w2a", 2),
    ("w3s", 3),
    ("w3a", 3),
    ("w4s", 4),
    ("w4a", 4),
    ("w5s", 5),
    ("w5a", 5),
    ("w6s", 6),
    ("w6a", 6),
    ("w8s", 8),
    ("w8a", 8),
    ("nf4", 4),
    ("fp8", 8),
];

fn speed(cpu: &Cpu, name: &str, pack: impl Fn() -> PackedMatrix) {
    let start = Instant::now();
    let weight = pack();
    let (rows, cols) = (weight.rows(), weight.cols());
    let pack = weight.bytes() as f64 / start.elapsed().as_secs_f64();
    let mut scratch = Scratch::new();
    let mut time = |n: usize, seconds: f64, between: &mut dyn FnMut()| {
        let x: Vec<f32> = (0..n * cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let mut out = vec![0.0; n * rows];
        let (begin, mut least) = (Instant::now(), f64::INFINITY);
        while begin.elapsed().as_secs_f64() < seconds {
            let start = Instant::now();
            matmul(cpu, &x, n, &mut [Product { weight: &weight, out: &mut out }], &mut scratch);
            least = least.min(start.elapsed().as_secs_f64());
            between();
        }
        least
    };
    let [one, two, four, eight, sixteen] = [1, 2, 4, 8, 16].map(|n| time(n, 0.05, &mut || {}));
    // What the processor can do is measured between the runs: its clock changes.
    let (mut most, mut run) = (0f64, 0);
    let tokens = if rows < 4096 { 512 } else { 64 };
    let prompt = time(tokens, 1.0, &mut || {
        if run % 8 == 0 {
            most = most.max(limits::peak(cpu, weight.factors()));
        }
        run += 1;
    });
    let speed = 2.0 * (tokens * rows * cols) as f64 / prompt;
    println!(
        "{:8} {:>11} {:>6.2} {:>6.2} {:>6.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>6.0} {:>4.0}%",
        name,
        format!("{rows}x{cols}"),
        weight.bytes() as f64 * 8.0 / (rows * cols) as f64,
        pack / 1e9,
        weight.bytes() as f64 / one / 1e9,
        one * 1e6,
        two * 1e6,
        four * 1e6,
        eight * 1e6,
        sixteen * 1e6,
        speed / 1e9,
        100.0 * speed / most,
    );
}
