//! SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv 2301.00774).
//!
//! The walk of [`obs`](super::obs) with a mask in place of the grid: what is pruned becomes zero, what
//! is kept stays, and `w_j / U_jj` of what is pruned moves to the columns that follow.
//!
//! 1. Unstructured: in each block of 128 columns, over all rows together, the weights with the least
//!    `w² / U_jj²` are pruned, as many as the sparsity asks for.
//! 2. N:M: in each run of M columns, when its first is reached, each row loses its N weights with the
//!    least `w² / U_jj²`.

use bevel_kernels::Cpu;

use super::hessian;
use super::loss::{difference, output_energy, relative};
use super::obs::{Columns, Surgeon};
use super::sparsity::{Pruned, Sparsity, least};
use super::stripes::{restored, stripes, transposed};
use super::{SolveReport, SolveResult};
use crate::Stats;

/// Columns that are walked between two updates of all that follow, about.
const BLOCK: usize = 128;

/// Prunes `w`, `[rows, cols]`, and moves what is lost to the weights that stay. λ is `damping` times
/// the mean of the Hessian's diagonal.
///
/// # Errors
/// [`SolveError`](super::SolveError): no Gram matrix, or one that is not finite, a pattern that does not divide the rows.
pub fn sparsegpt(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    cols: usize,
    stats: &Stats,
    sparsity: Sparsity,
    damping: f32,
) -> SolveResult<Pruned> {
    assert_eq!(w.len(), rows * cols, "weights of a [{rows}, {cols}] matrix");
    let run = sparsity.run(cols)?;
    let gram = hessian::gram(stats, "SparseGPT")?;
    let dead = hessian::dead(gram, cols);
    let alive: Vec<f32> =
        w.iter().enumerate().map(|(i, &w)| if dead[i % cols] { 0.0 } else { w }).collect();
    let order: Vec<usize> = (0..cols).collect();
    let factor = hessian::factor(cpu, gram, &order, damping)?;
    let weights = (0..cols).map(|j| factor.u[j * cols + j].powi(-2)).collect();
    let mut pruner = Pruner { sparsity, weights, mask: Vec::new(), first: 0, rows };
    let own = stripes(rows)
        .map(|range| Mask { pruned: vec![false; cols * range.len()], first_row: range.start });
    let own = own.collect();
    let mut turned = transposed(cpu, &alive, rows, &order);
    let surgeon = Surgeon { cpu, u: &factor.u };
    let width = run * BLOCK.div_ceil(run);
    let (masks, _) = surgeon.walk(&mut turned, rows, width, &mut pruner, own);
    let mut weights = vec![0.0; rows * cols];
    restored(&turned, rows, &order, &mut weights);
    let mut pruned = Vec::with_capacity(rows * cols);
    for (mask, range) in masks.iter().zip(stripes(rows)) {
        let mut stripe = vec![false; range.len() * cols];
        restored(&mask.pruned, range.len(), &order, &mut stripe);
        pruned.append(&mut stripe);
    }
    let energy = output_energy(cpu, stats, w);
    let error = relative(output_energy(cpu, stats, &difference(w, &weights)), energy);
    let report = SolveReport {
        error,
        damping_retries: factor.retries,
        dead_columns: dead.iter().filter(|dead| **dead).count(),
        ..SolveReport::default()
    };
    Ok(Pruned { weights, pruned, report })
}

/// The choice of weights.
struct Pruner {
    sparsity: Sparsity,
    /// `1 / U_jj²`
    weights: Vec<f32>,
    /// Which weights of the block go, `[width, rows]`.
    mask: Vec<bool>,
    /// The block's first column.
    first: usize,
    rows: usize,
}

/// A stripe's part of the mask.
struct Mask {
    /// `[cols, rows]`
    pruned: Vec<bool>,
    first_row: usize,
}

impl Columns for Pruner {
    type Stripe = Mask;

    fn block(&mut self, _: &Cpu, first: usize, w: &[f32]) {
        self.first = first;
        let Sparsity::Fraction(part) = self.sparsity else { return };
        // (1)
        let columns = w.chunks_exact(self.rows).zip(&self.weights[first..]);
        let scores: Vec<f32> =
            columns.flat_map(|(w, weight)| w.iter().map(move |w| w * w * weight)).collect();
        let count = (scores.len() as f64 * part) as usize;
        self.mask = least(&scores, count);
    }

    #[inline(always)]
    fn column(&self, stripe: &mut Mask, column: usize, w: &[f32], q: &mut [f32]) {
        let rows = q.len();
        match self.sparsity {
            Sparsity::Fraction(_) => {
                let from = (column - self.first) * self.rows + stripe.first_row;
                let mask = &self.mask[from..][..rows];
                stripe.pruned[column * rows..][..rows].copy_from_slice(mask);
            }
            Sparsity::Pattern { n, m } if column.is_multiple_of(m) => {
                // (2)
                for row in 0..rows {
                    for _ in 0..n {
                        let left = (0..m).filter(|i| !stripe.pruned[(column + i) * rows + row]);
                        let score = |i: usize| {
                            let w = w[i * rows + row];
                            w * w * self.weights[column + i]
                        };
                        let least = left.min_by(|&a, &b| score(a).total_cmp(&score(b)));
                        if let Some(i) = least {
                            stripe.pruned[(column + i) * rows + row] = true;
                        }
                    }
                }
            }
            Sparsity::Pattern { .. } => {}
        }
        let pruned = &stripe.pruned[column * rows..][..rows];
        for row in 0..rows {
            q[row] = if pruned[row] { 0.0 } else { w[row] };
        }
    }
}
