//! What the processor could do at most, to hold other figures against.

use std::hint::black_box;
use std::time::Instant;

use crate::{Cpu, Wide, run_wide};

/// Chains of multiplications and additions that do not wait for each other.
const CHAINS: usize = 12 * 16;

/// Steps of all chains: a millisecond or so.
const STEPS: u32 = 1 << 18;

/// Measurements, of which the fastest counts.
const RUNS: usize = 6;

/// Multiplications and additions of single-precision numbers in a second on all threads, each being an
/// operation of its own: measured, in some milliseconds, on numbers that stay in registers.
pub fn peak(cpu: &Cpu) -> f64 {
    let threads = cpu.pool().threads();
    let run = || {
        let start = Instant::now();
        cpu.pool().run(threads, |_| {
            black_box(run_wide(cpu.isa(), Chains));
        });
        start.elapsed().as_secs_f64()
    };
    let least = (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min);
    2.0 * (threads * CHAINS) as f64 * f64::from(STEPS) / least.max(1e-9)
}

struct Chains;

impl Wide for Chains {
    type Output = [f32; CHAINS];

    #[inline(always)]
    fn run(self) -> [f32; CHAINS] {
        let mut sums = [0.5f32; CHAINS];
        let (a, b) = (black_box(0.999f32), black_box(0.001f32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = sum.mul_add(a, b);
            }
        }
        sums
    }
}
