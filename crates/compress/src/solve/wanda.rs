//! Wanda: A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695).
//!
//! 1. A weight's score is `|w_ij| · ‖x_j‖`, with `x_j` the column's input over all tokens.
//! 2. Each row, or each run of a pattern, loses its least. What stays is as it was.

use bevel_kernels::Cpu;

use super::compare::output_error;
use super::sparsity::{Pruned, Sparsity, least};
use super::{SolveError, SolveReport, SolveResult};
use crate::Stats;

/// Prunes `w`, `[rows, cols]`, and moves nothing.
///
/// # Errors
/// [`SolveError`]: no token was seen, inputs that are not finite, a pattern that does not divide the rows.
pub fn wanda(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    cols: usize,
    stats: &Stats,
    sparsity: Sparsity,
) -> SolveResult<Pruned> {
    assert_eq!(w.len(), rows * cols, "weights of a [{rows}, {cols}] matrix");
    sparsity.run(cols)?;
    if stats.tokens() == 0 {
        return Err(SolveError::Missing { method: "Wanda", what: "mean square of the inputs" });
    }
    let squares = stats.square_sum();
    if let Some((column, &value)) = squares.iter().enumerate().find(|(_, s)| !s.is_finite()) {
        return Err(SolveError::Inputs { column, value });
    }
    let norms: Vec<f32> = squares.iter().map(|square| square.sqrt() as f32).collect();
    let (run, count) = match sparsity {
        Sparsity::Fraction(part) => (cols, (cols as f64 * part) as usize),
        Sparsity::Pattern { n, m } => (m, n),
    };
    let mut weights = w.to_vec();
    let mut pruned = vec![false; w.len()];
    let rows_of = weights.chunks_exact_mut(cols.max(1)).zip(pruned.chunks_exact_mut(cols.max(1)));
    for (row, pruned) in rows_of {
        // (1)
        let scores: Vec<f32> = row.iter().zip(&norms).map(|(w, norm)| w.abs() * norm).collect();
        // (2)
        let runs = scores.chunks(run).flat_map(|scores| least(scores, count));
        for ((w, pruned), goes) in row.iter_mut().zip(pruned).zip(runs) {
            *pruned = goes;
            if goes {
                *w = 0.0;
            }
        }
    }
    let error = output_error(cpu, w, &weights, stats);
    Ok(Pruned { weights, pruned, report: SolveReport { error, ..SolveReport::default() } })
}
