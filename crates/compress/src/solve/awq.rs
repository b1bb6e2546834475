//! AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration
//! (arXiv 2306.00978): its search for scales. That for ranges is in [`clip`](super::clip).
//!
//! Columns whose inputs are large are made larger before rounding, and their inputs smaller: with
//! `s` `[in]`, `W x = (W diag(s)) (diag(s)⁻¹ x)`, where the right factor is folded into what comes
//! before the layer.
//!
//! 1. `m_j = mean |x_j|`, and as published `s_j = m_j^α`, for α = 1/4, 1/2, 3/4, then 1/8 to either side of
//!    the best.
//! 2. Columns also differ in their weights, and only the largest of a group make its range. Rounding errs
//!    by about a part of the range `R_rg` of group `g` in row `r`, so it loses
//!    `Σ_g (Σ_r R_rg²) (Σ_{j ∈ g} h_j / s_j²)` with `h_j = mean x_j²`. Let the range be a norm of the
//!    group's scaled weights, for a power of 4, 8 or 16: then this is convex in `log s`, and least where
//!    every column has the same part in the first factor as in the second. [`Search::balance`] goes there.
//! 3. `s` divided by `√(max s · min s)`.
//! 4. The loss `Σ ‖Q(W diag s) diag(s)⁻¹ X − W X‖²` over all layers that share the input, as
//!    `tr(ΔW H ΔWᵀ)` with `H = Σ x xᵀ`: the inputs themselves are not needed. Some hundred rows from all over
//!    the layers stand for all.
//! 5. The `s` with the least loss.
//!
//! Where heads of attention share values, the columns that meet the same value share a scale.

use bevel_kernels::Cpu;

use super::grid::{Grid, dequantize};
use super::loss::output_energy;
use super::{SolveResult, Target, hessian, rtn};
use crate::Stats;

/// Rows of all layers together that the losses are measured on, about.
const ROWS: usize = 768;

/// Norms that stand for a group's range, as doublings of the power 1; steps towards the least loss for
/// each, and rows that they look at, about.
const DOUBLINGS: [i32; 3] = [2, 3, 4];
const ROUNDS: usize = 8;
const BALANCED: usize = 256;

/// Smaller means, and parts of a sum, count as this.
const LEAST: f64 = 1e-12;

/// What the search for scales found.
#[derive(Clone, Debug, PartialEq)]
pub struct AwqScales {
    /// `s`, `[cols]`: what columns of the weights are multiplied with, and inputs divided by.
    pub scales: Vec<f32>,
    /// The loss with `s`.
    pub loss: f64,
    /// The loss of rounding the weights as they are.
    pub loss_before: f64,
}

/// Searches the scales of the layers that share an input: each `[rows, cols]`. Columns of the same
/// number in `ties` share a scale.
///
/// # Errors
/// [`SolveError`](super::SolveError): no Gram matrix, a target that does not fit the columns.
pub fn awq_scales(
    cpu: &Cpu,
    group: &[&[f32]],
    cols: usize,
    stats: &Stats,
    target: &Target,
    ties: Option<&[usize]>,
) -> SolveResult<AwqScales> {
    hessian::gram(stats, "AWQ")?;
    let search = Search::new(cpu, group, cols, stats, target, ties);
    let none = vec![0.0; cols];
    let loss_before = search.loss(&none)?;
    let mut best = (loss_before, none.clone());
    // (1)
    let tokens = stats.tokens() as f64;
    let inputs: Vec<f64> = stats.abs_sum().iter().map(|sum| sum / tokens).collect();
    let inputs: Vec<f64> = search.pooled(&inputs).iter().map(|m| m.max(LEAST).ln()).collect();
    let mut alpha = 0.0;
    for alphas in [&[0.25, 0.5, 0.75][..], &[-0.125, 0.125]] {
        let middle = alpha;
        for candidate in alphas.iter().map(|step| middle + step) {
            let t = inputs.iter().map(|m| candidate * m).collect();
            if search.consider(t, &mut best)? {
                alpha = candidate;
            }
        }
    }
    // (2)
    for doublings in DOUBLINGS {
        let mut t = none.clone();
        for _ in 0..ROUNDS {
            search.balance(&mut t, doublings);
        }
        search.consider(t, &mut best)?;
    }
    let (loss, t) = best;
    Ok(AwqScales { scales: normalized(&t), loss, loss_before })
}

/// What losses are computed from.
struct Search<'a> {
    cpu: &'a Cpu,
    stats: &'a Stats,
    target: &'a Target,
    cols: usize,
    /// Columns whose scales belong together.
    width: usize,
    /// Rows from all over the layers, `[rows, cols]`.
    w: Vec<f32>,
    /// Mean squares of inputs, `[cols]`.
    h: Vec<f64>,
    ties: Option<&'a [usize]>,
}

impl<'a> Search<'a> {
    fn new(
        cpu: &'a Cpu,
        group: &[&[f32]],
        cols: usize,
        stats: &'a Stats,
        target: &'a Target,
        ties: Option<&'a [usize]>,
    ) -> Self {
        let rows: usize = group.iter().map(|w| w.len() / cols).sum();
        let all = group.iter().flat_map(|w| w.chunks_exact(cols));
        let w: Vec<f32> = all.step_by((rows / ROWS).max(1)).flatten().copied().collect();
        let width = match target {
            Target::Packed(dtype) => dtype.block_len(),
            Target::Grouped(spec) => spec.group_size.unwrap_or(cols),
        };
        let tokens = stats.tokens() as f64;
        let h = stats.square_sum().iter().map(|sum| sum / tokens).collect();
        Self { cpu, stats, target, cols, width, w, h, ties }
    }

    /// `Σ ‖Q(W diag s) diag(s)⁻¹ X − W X‖²` with `s = exp t`.
    fn loss(&self, t: &[f64]) -> SolveResult<f64> {
        let (cpu, cols, scales) = (self.cpu, self.cols, normalized(t));
        let rows = self.w.len() / cols;
        let importance: Vec<f32> =
            self.h.iter().zip(&scales).map(|(h, s)| (h / f64::from(s * s)) as f32).collect();
        let mut scaled = self.w.clone();
        cpu.pool().run_chunks(&mut scaled, cols, |_, row| {
            row.iter_mut().zip(&scales).for_each(|(w, s)| *w *= s);
        });
        let form = match (Grid::new(self.target, &scaled, cols)?, self.target) {
            (Some(grid), _) => {
                rtn::rtn(cpu, &scaled, rows, cols, &grid.hurried(), Some(&importance))?
            }
            (None, Target::Packed(dtype)) => {
                rtn::pack_rows(cpu, &scaled, cols, *dtype, Some(&importance))?
            }
            (None, Target::Grouped(_)) => unreachable!("groups have a grid"),
        };
        let mut error = dequantize(cpu, &form, rows, cols)?;
        cpu.pool().run_chunks(&mut error, cols, |row, errors| {
            let w = &self.w[row * cols..][..cols];
            for ((q, s), w) in errors.iter_mut().zip(&scales).zip(w) {
                *q = w - *q / s;
            }
        });
        Ok(output_energy(cpu, self.stats, &error))
    }

    /// Takes scales `exp t` where they lose less than the best so far.
    fn consider(&self, t: Vec<f64>, best: &mut (f64, Vec<f64>)) -> SolveResult<bool> {
        let loss = self.loss(&t)?;
        let better = loss < best.0;
        if better {
            *best = (loss, t);
        }
        Ok(better)
    }

    /// The mean of tied columns in place of each.
    fn pooled(&self, values: &[f64]) -> Vec<f64> {
        let Some(ties) = self.ties else { return values.to_vec() };
        let mut sums = vec![(0f64, 0f64); self.cols];
        for (value, &tie) in values.iter().zip(ties) {
            sums[tie].0 += value;
            sums[tie].1 += 1.0;
        }
        ties.iter().map(|&tie| sums[tie].0 / sums[tie].1).collect()
    }

    /// (2) One step towards the scales `exp t` with the least loss of the model there, ranges being
    /// norms for the power `2^doublings`.
    fn balance(&self, t: &mut [f64], doublings: i32) {
        let (width, cols) = (self.width, self.cols);
        let scales = normalized(t);
        let mut ranges = vec![0f64; cols];
        let mut parts = vec![0f32; width];
        let every = (self.w.len() / cols / BALANCED).max(1);
        for w in self.w.chunks_exact(cols).step_by(every) {
            for (g, w) in w.chunks(width).enumerate() {
                let (scales, parts) = (&scales[g * width..][..w.len()], &mut parts[..w.len()]);
                let mut largest = 0f32;
                for ((part, w), s) in parts.iter_mut().zip(w).zip(scales) {
                    *part = w.abs() * s;
                    largest = if *part > largest { *part } else { largest };
                }
                if largest == 0.0 {
                    continue;
                }
                let mut sum = 0f32;
                for part in parts.iter_mut() {
                    *part /= largest;
                    for _ in 0..doublings {
                        *part *= *part;
                    }
                    sum += *part;
                }
                let root = (0..doublings).fold(sum, |root, _| root.sqrt());
                let share = (largest * root).powi(2) / sum;
                for (all, part) in ranges[g * width..].iter_mut().zip(&*parts) {
                    *all += f64::from(share * part);
                }
            }
        }
        let errors = self.h.iter().zip(&scales).map(|(h, s)| h / f64::from(s * s));
        let mut errors: Vec<f64> = errors.collect();
        // As parts of the group's.
        for (ranges, errors) in ranges.chunks_mut(width).zip(errors.chunks_mut(width)) {
            for values in [ranges, errors] {
                let sum: f64 = values.iter().sum::<f64>().max(f64::MIN_POSITIVE);
                values.iter_mut().for_each(|value| *value /= sum);
            }
        }
        let (ranges, errors) = (self.pooled(&ranges), self.pooled(&errors));
        for ((t, range), error) in t.iter_mut().zip(ranges).zip(errors) {
            let ratio = error.max(LEAST) / range.max(LEAST);
            *t += ratio.ln() / f64::from(2 + (1 << doublings));
        }
    }
}

/// `exp t`, divided by `√(max · min)`.
fn normalized(t: &[f64]) -> Vec<f32> {
    let (least, most) =
        t.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &t| (a.min(t), b.max(t)));
    // (3)
    let middle = 0.5 * (least + most);
    t.iter().map(|t| (t - middle).exp() as f32).collect()
}
