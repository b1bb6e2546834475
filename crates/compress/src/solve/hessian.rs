//! The matrix that GPTQ and SparseGPT walk along.

use bevel_kernels::Cpu;
use bevel_kernels::linalg::inverse_cholesky_upper;

use super::{SolveError, SolveResult};
use crate::Stats;

/// A damped Hessian's inverse, factored.
pub(super) struct Factor {
    /// Upper triangular `U`, `[cols, cols]`, with `H⁻¹ = Uᵀ U`, columns in the order asked for.
    pub(super) u: Vec<f32>,
    /// λ as a part of the mean diagonal.
    pub(super) damping: f32,
    /// How often λ was raised.
    pub(super) retries: usize,
}

/// λ is raised by this factor while there is no Cholesky factor, up to the mean itself.
const RAISE: f32 = 10.0;

/// The Gram matrix of the inputs.
pub(super) fn gram<'a>(stats: &'a Stats, method: &'static str) -> SolveResult<&'a [f32]> {
    let gram = stats.gram().filter(|_| stats.tokens() > 0);
    let gram = gram.ok_or(SolveError::Missing { method, what: "Gram matrix" })?;
    let cols = stats.cols();
    match (0..cols).find(|&j| !gram[j * cols + j].is_finite()) {
        Some(column) => Err(SolveError::Inputs { column, value: stats.square_sum()[column] }),
        None => Ok(gram),
    }
}

/// Columns whose input was always zero.
pub(super) fn dead(gram: &[f32], cols: usize) -> Vec<bool> {
    (0..cols).map(|j| gram[j * cols + j] == 0.0).collect()
}

/// Columns by decreasing diagonal of the Gram matrix.
pub(super) fn by_size(gram: &[f32], cols: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..cols).collect();
    order.sort_by(|&a, &b| gram[b * cols + b].total_cmp(&gram[a * cols + a]));
    order
}

/// `H + λ I`, λ being `damping` times the mean of the diagonal, both triangles, with columns in the
/// given order; `H_jj` of dead columns, whose other elements are zero, is that mean.
pub(super) fn damped(cpu: &Cpu, gram: &[f32], order: &[usize], damping: f32, out: &mut [f32]) {
    let cols = order.len();
    let diagonal = |j: usize| gram[j * cols + j];
    let alive = (0..cols).filter(|&j| diagonal(j) != 0.0).count();
    let sum: f64 = (0..cols).map(|j| f64::from(diagonal(j))).sum();
    let mean = if alive == 0 { 1.0 } else { (sum / alive as f64) as f32 };
    cpu.pool().run_chunks(out, cols, |i, row| {
        let from = order[i];
        for (h, &to) in row.iter_mut().zip(order) {
            *h = gram[from.max(to) * cols + from.min(to)];
        }
        if row[i] == 0.0 {
            row[i] = mean;
        }
        row[i] += damping * mean;
    });
}

/// The Cholesky factor of the inverse of [`damped`]; where there is none, of one with ten times the
/// λ.
pub(super) fn factor(
    cpu: &Cpu,
    gram: &[f32],
    order: &[usize],
    damping: f32,
) -> SolveResult<Factor> {
    let cols = order.len();
    let mut u = vec![0.0; cols * cols];
    let mut damping = damping;
    for retries in 0.. {
        damped(cpu, gram, order, damping, &mut u);
        if inverse_cholesky_upper(cpu, &mut u, cols).is_ok() {
            return Ok(Factor { u, damping, retries });
        }
        if damping >= 1.0 || damping.is_nan() {
            break;
        }
        damping = (damping * RAISE).clamp(1e-4, 1.0);
    }
    Err(SolveError::Singular { damping })
}
