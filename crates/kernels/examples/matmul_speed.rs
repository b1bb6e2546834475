//! Speed of matrix products for each weight type: bytes of weights read and operations done in a
//! second. `cargo run --release -p bevel-kernels --example matmul_speed -- [THREADS] [TYPE ...]`

use std::time::Instant;

use bevel_base::DType;
use bevel_kernels::{Cpu, PackedMatrix, Product, Scratch, matmul};

const SHAPES: [(usize, usize); 4] = [(576, 576), (1536, 576), (576, 1536), (49152, 576)];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(1, |n| n.parse().expect("a number of threads"));
    let types: Vec<DType> = arguments.map(|name| name.parse().expect("a type's name")).collect();
    let cpu = Cpu::new(threads).expect("a known instruction set");
    println!("{} threads, {}; median of several runs", cpu.pool().threads(), cpu.isa());
    println!(
        "{:8} {:>12} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "type", "shape", "bits", "pack", "n=1", "n=1", "n=8", "n=32", "n=512"
    );
    println!(
        "{:8} {:>12} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "", "", "GB/s", "GB/s", "us", "us", "GOP/s", "GOP/s"
    );
    for dtype in DType::all().filter(|dtype| dtype.is_weight()) {
        if !types.is_empty() && !types.contains(&dtype) {
            continue;
        }
        for (rows, cols) in SHAPES {
            let cols = cols.next_multiple_of(dtype.block_len());
            speed(&cpu, dtype, rows, cols);
        }
    }
}

fn speed(cpu: &Cpu, dtype: DType, rows: usize, cols: usize) {
    // Bytes at random are blocks, if not reasonable ones.
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    let mut data = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
    data.iter_mut().for_each(|byte| *byte = random() & 0x3b);
    let start = Instant::now();
    let weight = PackedMatrix::pack(cpu, dtype, rows, cols, &data).expect("a weight type");
    let pack = data.len() as f64 / start.elapsed().as_secs_f64();
    let mut scratch = Scratch::new();
    let mut time = |n: usize| {
        let x: Vec<f32> = (0..n * cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let mut out = vec![0.0; n * rows];
        let mut run = || {
            let start = Instant::now();
            matmul(cpu, &x, n, &mut [Product { weight: &weight, out: &mut out }], &mut scratch);
            start.elapsed().as_secs_f64()
        };
        let first = run();
        let runs = ((0.08 / first.min(0.04)) as usize).clamp(5, 2000);
        let mut times: Vec<f64> = (0..runs).map(|_| run()).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (one, eight, many) = (time(1), time(8), time(32));
    let prompt = if rows < 4096 { time(512) } else { time(128) * 4.0 };
    let operations = |n: f64| 2.0 * n * (rows * cols) as f64 / 1e9;
    println!(
        "{:8} {:>12} {:>7.2} {:>9.2} {:>9.1} {:>9.1} {:>9.1} {:>9.0} {:>9.0}",
        dtype,
        format!("{rows}x{cols}"),
        weight.bytes() as f64 * 8.0 / (rows * cols) as f64,
        pack / 1e9,
        weight.bytes() as f64 / one / 1e9,
        one * 1e6,
        eight * 1e6,
        operations(32.0) / many,
        operations(512.0) / prompt,
    );
}
