//! The error of a layer's output: `tr(D H Dᵀ)` for a difference `D` of weights.

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Region, Update, View, gemm};

use crate::Stats;

/// Rows of differences that are multiplied at a time.
const ROWS: usize = 1024;

/// Rows and columns of the Gram matrix's blocks.
const BLOCK: usize = 256;

/// `tr(D H Dᵀ)` of `d`, `[rows, cols]`, with `H` the Gram matrix of the inputs; where that is not
/// known the diagonal of their squares, and where nothing is known the identity.
pub(super) fn output_energy(cpu: &Cpu, stats: &Stats, d: &[f32]) -> f64 {
    let cols = stats.cols();
    match stats.gram().filter(|_| stats.tokens() > 0) {
        Some(gram) => d.chunks(ROWS * cols).map(|d| gram_energy(cpu, gram, d, cols)).sum(),
        None => {
            let known = stats.tokens() > 0;
            let weight = |j: usize| if known { stats.square_sum()[j] } else { 1.0 };
            let energy = |row: &[f32]| -> f64 {
                row.iter().enumerate().map(|(j, &d)| weight(j) * f64::from(d) * f64::from(d)).sum()
            };
            d.chunks_exact(cols).map(energy).sum()
        }
    }
}

/// What was lost as a part of all there was; of nothing, nothing or all.
pub(super) fn relative(lost: f64, energy: f64) -> f64 {
    if energy > 0.0 { lost / energy } else { f64::from(u8::from(lost > 0.0)) }
}

/// `H = L + Lᵀ` with half of the diagonal in each: the energy is twice that of `L`, of which only
/// the blocks on and below the diagonal are multiplied.
fn gram_energy(cpu: &Cpu, gram: &[f32], d: &[f32], cols: usize) -> f64 {
    let rows = d.len() / cols;
    let gram = View::new(gram, cols, cols);
    let left = View::new(d, rows, cols);
    let mut product = vec![0.0; rows * cols];
    let mut triangle = vec![0.0; BLOCK * BLOCK];
    for first in (0..cols).step_by(BLOCK) {
        let last = cols.min(first + BLOCK);
        let width = last - first;
        let d = left.part(0..rows, first..last);
        let below = gram.part(first..last, 0..first);
        gemm(cpu, Update::Add, d, below, &mut product, cols, Region::Whole);
        let triangle = &mut triangle[..width * width];
        for i in 0..width {
            for j in 0..width {
                triangle[i * width + j] = match i.cmp(&j) {
                    std::cmp::Ordering::Less => 0.0,
                    std::cmp::Ordering::Equal => gram.at(first + i, first + i) * 0.5,
                    std::cmp::Ordering::Greater => gram.at(first + i, first + j),
                };
            }
        }
        let triangle = View::new(triangle, width, width);
        gemm(cpu, Update::Add, d, triangle, &mut product[first..], cols, Region::Whole);
    }
    let mut energies = vec![0f64; rows];
    cpu.pool().run_chunks(&mut energies, 1, |row, energy| {
        let at = row * cols..(row + 1) * cols;
        let sum = |(d, p): (&f32, &f32)| f64::from(*d) * f64::from(*p);
        energy[0] = d[at.clone()].iter().zip(&product[at]).map(sum).sum();
    });
    2.0 * energies.iter().sum::<f64>()
}

/// `a − b`
pub(super) fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}
