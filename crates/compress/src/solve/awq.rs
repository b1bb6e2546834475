//! AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration
//! (arXiv 2306.00978).
//!
//! Columns whose inputs are large are made larger before rounding, and their inputs smaller: with
//! `s` `[in]`, `W x = (W diag(s)) (diag(s)⁻¹ x)`, where the right factor is folded into what comes
//! before the layer.
//!
//! 1. `m_j = mean |x_j|`, and `a_j` the mean of `|w_ij|` as a part of its group's largest, over the
//!    rows of all layers that share the input.
//! 2. For each α = 0, 1/20 … 19/20: `s_j = m_j^α`, or `m_j^α / a_j^(1−α)`.
//! 3. `s` divided by `√(max s · min s)`.
//! 4. The loss `Σ ‖Q(W diag s) diag(s)⁻¹ X − W X‖²` over all layers that share the input, as
//!    `tr(ΔW H ΔWᵀ)`: the inputs themselves are not needed.
//! 5. The `s` with the least loss.
//!
//! Then [`awq_clip`] shrinks the range of each group:
//!
//! 6. For each factor 1, 1 − 1/20 … 1 − 9/20: values clamped to that part of the group's largest
//!    magnitude, rounded, and the loss of the group alone, `Δ H_gg Δᵀ` with its block of `H`.
//! 7. Clamp each group to the range with the least loss.

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Region, Update, View, gemm};

use super::grid::{Grid, dequantize};
use super::loss::{difference, output_energy};
use super::{GroupSpec, SolveError, SolveResult, Target, hessian, rtn};
use crate::Stats;

/// Values of α, and factors of the range, that are tried.
const GRID: usize = 20;

/// The largest part of a group's range that is cut off.
const MAX_SHRINK: f64 = 0.5;

/// What the search for scales found.
#[derive(Clone, Debug, PartialEq)]
pub struct AwqScales {
    /// `s`, `[cols]`: what columns of the weights are multiplied with, and inputs divided by.
    pub scales: Vec<f32>,
    /// The exponent.
    pub alpha: f32,
    /// The loss with `s`, and without.
    pub loss: f64,
    /// The loss of rounding the weights as they are.
    pub loss_before: f64,
}

/// Searches the scales of the layers that share an input: each `[rows, cols]`. `duo` divides by the
/// mean of `|w|` too.
///
/// # Errors
/// [`SolveError`]: no Gram matrix, a target that does not fit the columns.
pub fn awq_scales(
    cpu: &Cpu,
    group: &[&[f32]],
    cols: usize,
    stats: &Stats,
    target: &Target,
    duo: bool,
) -> SolveResult<AwqScales> {
    hessian::gram(stats, "AWQ")?;
    // (1)
    let tokens = stats.tokens() as f64;
    let inputs: Vec<f64> = stats.abs_sum().iter().map(|sum| sum / tokens).collect();
    let magnitudes = duo.then(|| magnitudes(group, cols, target));
    let rounded = |w: &[f32]| -> SolveResult<Vec<f32>> {
        let rows = w.len() / cols;
        let form = match (Grid::new(target, w, cols)?, target) {
            (Some(grid), _) => rtn::rtn(cpu, w, rows, stats, &grid, false)?,
            (None, Target::Packed(dtype)) => rtn::pack_rows(cpu, w, stats, *dtype, false)?,
            (None, Target::Grouped(_)) => unreachable!("groups have a grid"),
        };
        dequantize(&form, rows, cols)
    };
    let loss = |scales: &[f32]| -> SolveResult<f64> {
        let mut loss = 0.0;
        for w in group {
            let scaled: Vec<f32> = w
                .chunks_exact(cols)
                .flat_map(|row| row.iter().zip(scales).map(|(w, s)| w * s))
                .collect();
            let mut rounded = rounded(&scaled)?;
            for row in rounded.chunks_exact_mut(cols) {
                row.iter_mut().zip(scales).for_each(|(q, s)| *q /= s);
            }
            loss += output_energy(cpu, stats, &difference(w, &rounded));
        }
        Ok(loss)
    };
    let loss_before = loss(&vec![1.0; cols])?;
    let mut best =
        AwqScales { scales: vec![1.0; cols], alpha: 0.0, loss: loss_before, loss_before };
    for step in 0..GRID {
        let alpha = step as f64 / GRID as f64;
        // (2)
        let raw = |j: usize| -> f64 {
            let input = inputs[j].powf(alpha);
            match &magnitudes {
                Some(magnitudes) => input / (magnitudes[j].powf(1.0 - alpha) + 1e-4),
                None => input,
            }
        };
        let scales = normalized((0..cols).map(|j| raw(j).max(1e-4)).collect());
        // (4)
        let loss = loss(&scales)?;
        // (5)
        if loss < best.loss {
            best = AwqScales { scales, alpha: alpha as f32, loss, ..best };
        }
    }
    Ok(best)
}

/// Divides by `√(max · min)`.
fn normalized(scales: Vec<f64>) -> Vec<f32> {
    let (least, most) =
        scales.iter().fold((f64::INFINITY, 0f64), |(a, b), &s| (a.min(s), b.max(s)));
    // (3)
    let middle = (least * most).sqrt();
    scales.iter().map(|s| (s / middle) as f32).collect()
}

/// The mean over all rows of `|w|` as a part of the largest in its group.
fn magnitudes(group: &[&[f32]], cols: usize, target: &Target) -> Vec<f64> {
    let width = match target {
        Target::Packed(dtype) => dtype.block_len(),
        Target::Grouped(spec) => spec.group_size.unwrap_or(cols),
    };
    let mut sums = vec![0f64; cols];
    let mut rows = 0;
    for w in group.iter().flat_map(|w| w.chunks_exact(cols)) {
        for (w, sums) in w.chunks(width).zip(sums.chunks_mut(width)) {
            let largest = w.iter().fold(0f32, |most, w| w.abs().max(most)).max(1e-30);
            for (w, sum) in w.iter().zip(sums) {
                *sum += f64::from(w.abs() / largest);
            }
        }
        rows += 1;
    }
    sums.iter().map(|sum| sum / f64::from(rows.max(1))).collect()
}

/// Clamps each group of `w`, `[rows, cols]`, to the range that rounds best. Results in the clamped
/// weights.
///
/// # Errors
/// [`SolveError`]: no Gram matrix, a target that does not fit the columns.
pub fn awq_clip(
    cpu: &Cpu,
    w: &[f32],
    cols: usize,
    stats: &Stats,
    spec: &GroupSpec,
) -> SolveResult<Vec<f32>> {
    let gram = hessian::gram(stats, "AWQ")?;
    let rows = w.len() / cols;
    let target = Target::Grouped(spec.clone());
    let grid = Grid::new(&target, w, cols)?
        .ok_or(SolveError::Missing { method: "AWQ", what: "groups of columns" })?;
    let groups = grid.groups(cols);
    let bounds: Vec<f32> = w
        .chunks_exact(cols)
        .flat_map(|row| row.chunks(grid.group))
        .map(|x| x.iter().fold(0f32, |most, x| x.abs().max(most)))
        .collect();
    let mut best = vec![(f64::INFINITY, f32::INFINITY); rows * groups];
    for step in 0..(GRID as f64 * MAX_SHRINK) as usize {
        // (6)
        let factor = 1.0 - step as f32 / GRID as f32;
        let clamped = clamp(w, cols, grid.group, |at| bounds[at] * factor);
        let form = rtn::rtn(cpu, &clamped, rows, stats, &grid, false)?;
        let error = difference(w, &dequantize(&form, rows, cols)?);
        for group in 0..groups {
            let columns = group * grid.group..cols.min((group + 1) * grid.group);
            let losses = block_losses(cpu, gram, &error, cols, columns);
            for (row, loss) in losses.into_iter().enumerate() {
                let best = &mut best[row * groups + group];
                if loss < best.0 {
                    *best = (loss, bounds[row * groups + group] * factor);
                }
            }
        }
    }
    // (7)
    Ok(clamp(w, cols, grid.group, |at| best[at].1))
}

/// `w` with each group clamped to ± its bound.
fn clamp(w: &[f32], cols: usize, group: usize, bound: impl Fn(usize) -> f32) -> Vec<f32> {
    let groups = cols.div_ceil(group);
    let bound = |i: usize| bound(i / cols * groups + i % cols / group);
    w.iter().enumerate().map(|(i, w)| w.clamp(-bound(i), bound(i))).collect()
}

/// `Δ H_gg Δᵀ` of each row, for the columns of a group.
fn block_losses(
    cpu: &Cpu,
    gram: &[f32],
    error: &[f32],
    cols: usize,
    columns: std::ops::Range<usize>,
) -> Vec<f64> {
    let (rows, width) = (error.len() / cols, columns.len());
    let mut block = vec![0.0; width * width];
    for (i, row) in block.chunks_exact_mut(width).enumerate() {
        for (j, h) in row.iter_mut().enumerate() {
            let (i, j) = (columns.start + i.max(j), columns.start + i.min(j));
            *h = gram[i * cols + j];
        }
    }
    let error = View::new(error, rows, cols).part(0..rows, columns);
    let mut product = vec![0.0; rows * width];
    let block = View::new(&block, width, width);
    gemm(cpu, Update::Add, error, block, &mut product, width, Region::Whole);
    let loss = |(row, product): (usize, &[f32])| -> f64 {
        product.iter().enumerate().map(|(j, p)| f64::from(*p) * f64::from(error.at(row, j))).sum()
    };
    product.chunks_exact(width).enumerate().map(loss).collect()
}
