//! How close products with one token come to the speed of memory: matrices that no cache holds are
//! multiplied one after the other, as decoding does, in turn with a plain reading of memory.
//!
//! `cargo run --release -p bevel-kernels --example stream_speed -- [THREADS] [TYPE ...]`

use std::time::Instant;

use bevel_base::DType;
use bevel_kernels::{Cpu, PackedMatrix, Product, Scratch, limits, matmul};

const SHAPES: [(usize, usize); 3] = [(1536, 576), (576, 1536), (8192, 2048)];
const BYTES: usize = 400 << 20;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(1, |n| n.parse().expect("a number of threads"));
    let mut names: Vec<String> = arguments.collect();
    if names.is_empty() {
        names = ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "F16"].map(str::to_owned).to_vec();
    }
    let cpu = Cpu::new(threads).expect("a known instruction set");
    println!("{} threads, {}", cpu.pool().threads(), cpu.isa());
    println!("{:8} {:>11} {:>8} {:>8} {:>6}", "type", "shape", "GB/s", "memory", "part");
    for name in &names {
        let dtype = DType::all().find(|t| t.name().eq_ignore_ascii_case(name)).expect("a type");
        for (rows, cols) in SHAPES {
            let cols = cols.next_multiple_of(dtype.block_len());
            let data: Vec<u8> = (0..rows * dtype.row_bytes(cols).expect("whole blocks"))
                .map(|i| ((i * 2_654_435_761) >> 7) as u8 & 0x3b)
                .collect();
            let pack = || PackedMatrix::pack(&cpu, dtype, rows, cols, &data).expect("weights");
            let first = pack();
            let count = BYTES.div_ceil(first.bytes());
            let matrices: Vec<PackedMatrix> =
                std::iter::once(first).chain((1..count).map(|_| pack())).collect();
            let bytes: usize = matrices.iter().map(PackedMatrix::bytes).sum();
            let x: Vec<f32> = (0..cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
            let mut out = vec![0.0; rows];
            let mut scratch = Scratch::new();
            let mut samples = Vec::new();
            for _ in 0..7 {
                let memory = limits::read_bandwidth(&cpu);
                let mut best = f64::INFINITY;
                for _ in 0..3 {
                    let start = Instant::now();
                    for weight in &matrices {
                        matmul(&cpu, &x, 1, &mut [Product { weight, out: &mut out }], &mut scratch);
                    }
                    best = best.min(start.elapsed().as_secs_f64());
                }
                samples.push((bytes as f64 / best / memory, bytes as f64 / best, memory));
            }
            samples.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (part, speed, memory) = samples[samples.len() / 2];
            println!(
                "{:8} {:>11} {:>8.1} {:>8.1} {:>6.2}",
                name,
                format!("{rows}x{cols}"),
                speed / 1e9,
                memory / 1e9,
                part
            );
        }
    }
}
