//! Speed of the linear algebra of calibration: the processor's peak, Gram matrices, products and
//! factorizations, as operations (a multiplication and an addition are two) in a second.
//!
//! `cargo run --release -p bevel-kernels --example linalg_speed -- [THREADS] [COLS ...]`

use std::time::Instant;

use bevel_kernels::Cpu;
use bevel_kernels::limits::float_peak;
use bevel_kernels::linalg::{Region, Update, View, gemm, gram, inverse_cholesky_upper, mirror};

/// Tokens in a batch.
const TOKENS: usize = 2048;

/// The least seconds of some runs.
fn least(runs: usize, mut run: impl FnMut() -> f64) -> f64 {
    (0..runs).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(1, |n| n.parse().expect("a number of threads"));
    let sizes: Vec<usize> = arguments.map(|n| n.parse().expect("a number of columns")).collect();
    let sizes = if sizes.is_empty() { vec![256, 576, 896, 1536, 4096] } else { sizes };
    let cpu = Cpu::new(threads).expect("a known instruction set");
    let threads = cpu.pool().threads();
    let peak = float_peak(&cpu);
    println!("{threads} threads, {}, peak {:.0} GFLOP/s", cpu.isa(), peak / 1e9);
    println!("{:>6} {:>14} {:>14} {:>14} {:>10}", "cols", "gram", "k = 128", "inverse", "seconds");
    for cols in sizes {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let x: Vec<f32> = (0..TOKENS * cols).map(|_| random()).collect();
        let mut h = vec![0.0; cols * cols];
        let square = (cols * cols) as f64;
        let of_peak = |operations: f64, seconds: f64| {
            let speed = operations / seconds;
            format!("{:5.0} = {:3.0} %", speed / 1e9, speed / peak * 100.0)
        };
        let time = least(5, || seconds(|| gram(&cpu, &x, TOKENS, cols, &mut h)));
        let gram = of_peak(TOKENS as f64 * square, time);
        let u = View::new(&x[..128 * cols], 128, cols);
        let time = least(5, || {
            let mut w = vec![0.0; cols * 576];
            let error = View::new(&x[..128 * 576.min(TOKENS * cols / 128)], 128, 576);
            seconds(|| {
                let update = Update::Subtract;
                gemm(&cpu, update, u.transposed(), error, &mut w, 576, Region::Whole);
            })
        });
        let lazy = of_peak(2.0 * (128 * cols * 576) as f64, time);
        (0..cols).for_each(|i| h[i * cols + i] *= 1.01);
        mirror(&cpu, &mut h, cols);
        let time = least(3, || {
            let mut h = h.clone();
            seconds(|| inverse_cholesky_upper(&cpu, &mut h, cols).expect("a positive matrix"))
        });
        let inverse = of_peak(2.0 / 3.0 * square * cols as f64, time);
        println!("{cols:>6} {gram:>14} {lazy:>14} {inverse:>14} {time:>10.4}");
    }
}
