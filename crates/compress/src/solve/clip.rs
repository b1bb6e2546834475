//! The second half of AWQ (arXiv 2306.00978): ranges of groups, searched for the least error of the
//! layer's output.
//!
//! `W` is `[rows, cols]`, `H = Σ x xᵀ` the Gram matrix of the inputs, `E = W − Ŵ` the error so far, `g` a
//! group of columns. As published, each group is clamped to parts of its range, and the part kept that
//! has the least loss of the group alone, `E_g H_gg E_gᵀ`. Here candidates are those of the format's own
//! search, and a group knows what the others err:
//!
//! 1. `C_g = Σ_{k ≠ g} E_k H_kg`, with `E = 0` where nothing is chosen yet.
//! 2. Sixteen candidates for each row's step and zero point: clipped ranges, improved by least squares.
//!    In later sweeps, neighbours of what was chosen.
//! 3. For each: `E_g` of rounding to nearest, and its part of the loss, `E_g H_gg E_gᵀ + 2 C_g E_gᵀ`.
//! 4. The candidate with the least.
//!
//! Rows do not know of each other, so the loss falls with every choice of a later sweep.

use std::ops::Range;

use bevel_kernels::linalg::{Region, Update, View, gemm, mirror};
use bevel_kernels::{Cpu, Wide, run_wide};

use super::grid::{Grid, Source};
use super::quantizer::Quantizer;
use super::range::{Candidates, Fit, LANES, Lanes, ROUNDS, least_lane};
use super::scales::{Parameters, inverse};
use super::stripes::STRIPE;
use super::{Awq, Form, GroupSpec, SolveError, SolveResult, hessian, rtn};
use crate::Stats;

/// Searches the ranges of all groups of `w`, `[rows, cols]`, and rounds to nearest.
pub(super) fn clip(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    stats: &Stats,
    grid: &Grid,
    options: &Awq,
) -> SolveResult<Form> {
    let cols = stats.cols();
    let Source::Grouped(spec, unit) = &grid.source else {
        return Err(SolveError::Missing { method: "AWQ", what: "groups of columns" });
    };
    let mut h = hessian::gram(stats, "AWQ")?.to_vec();
    mirror(cpu, &mut h, cols);
    let order: Vec<usize> = (0..cols).collect();
    let quantizer = Quantizer { grid, order: &order, importance: &[], fixed: true, isa: cpu.isa() };
    let mut stripes = quantizer.stripes(rows);
    let mut error = vec![0.0; rows * cols];
    for sweep in 0..options.sweeps.max(1) {
        for group in 0..grid.groups(cols) {
            let columns = group * grid.group..cols.min((group + 1) * grid.group);
            // (1)
            for row in error.chunks_exact_mut(cols) {
                row[columns.clone()].fill(0.0);
            }
            let known = if sweep == 0 { columns.start } else { cols };
            let cross = cross(cpu, &error, rows, &h, cols, known, columns.clone());
            let block = block(&h, cols, columns.clone());
            let mut visits: Vec<Visit<'_>> = stripes
                .iter()
                .enumerate()
                .map(|(i, stripe)| Visit {
                    first: i * STRIPE,
                    before: (sweep > 0).then_some(&stripe.scales),
                    chosen: Vec::with_capacity(STRIPE),
                    error: Vec::with_capacity(STRIPE * columns.len()),
                })
                .collect();
            let shared = Shared {
                spec,
                grid,
                unit: *unit,
                w,
                cols,
                group,
                columns: columns.clone(),
                block: &block,
                cross: &cross,
                importance: &diagonal(&h, cols, columns.clone()),
            };
            cpu.pool().run_chunks(&mut visits, 1, |_, visit| {
                let visit = &mut visit[0];
                let rows = visit.first..rows.min(visit.first + STRIPE);
                run_wide(cpu.isa(), Choose { shared: &shared, rows, visit });
            });
            let results: Vec<(Vec<Parameters>, Vec<f32>)> =
                visits.into_iter().map(|visit| (visit.chosen, visit.error)).collect();
            let lines = error.chunks_mut(STRIPE * cols);
            for ((stripe, lines), (chosen, errors)) in stripes.iter_mut().zip(lines).zip(results) {
                for (row, parameters) in chosen.into_iter().enumerate() {
                    stripe.scales.set(row, group, parameters);
                }
                let errors = errors.chunks_exact(columns.len());
                for (line, errors) in lines.chunks_exact_mut(cols).zip(errors) {
                    line[columns.clone()].copy_from_slice(errors);
                }
            }
        }
    }
    rtn::round(cpu, w, rows, grid, &order, &mut stripes);
    quantizer.form(cpu, stripes, rows, None)
}

/// `Σ_k E_k H_kg` over the first `known` columns, `[rows, width]`.
fn cross(
    cpu: &Cpu,
    error: &[f32],
    rows: usize,
    h: &[f32],
    cols: usize,
    known: usize,
    columns: Range<usize>,
) -> Vec<f32> {
    let width = columns.len();
    let mut product = vec![0.0; rows * width];
    let error = View::new(error, rows, cols).part(0..rows, 0..known);
    let h = View::new(h, cols, cols).part(0..known, columns);
    gemm(cpu, Update::Add, error, h, &mut product, width, Region::Whole);
    product
}

/// `H_gg`, `[width, width]`.
fn block(h: &[f32], cols: usize, columns: Range<usize>) -> Vec<f32> {
    columns.clone().flat_map(|i| &h[i * cols..][columns.clone()]).copied().collect()
}

fn diagonal(h: &[f32], cols: usize, columns: Range<usize>) -> Vec<f32> {
    columns.map(|j| h[j * cols + j]).collect()
}

/// What the rows of a group have in common.
struct Shared<'a> {
    spec: &'a GroupSpec,
    grid: &'a Grid,
    unit: f32,
    /// `[rows, cols]`
    w: &'a [f32],
    cols: usize,
    group: usize,
    columns: Range<usize>,
    /// `H_gg`, `[width, width]`
    block: &'a [f32],
    /// `C_g`, `[rows, width]`
    cross: &'a [f32],
    /// The diagonal of `H_gg`.
    importance: &'a [f32],
}

/// A group in a stripe of rows.
struct Visit<'a> {
    first: usize,
    /// What an earlier sweep chose.
    before: Option<&'a super::scales::Scales>,
    chosen: Vec<Parameters>,
    /// `E_g`, `[rows, width]`
    error: Vec<f32>,
}

struct Choose<'a, 'v> {
    shared: &'a Shared<'a>,
    rows: Range<usize>,
    visit: &'a mut Visit<'v>,
}

impl Wide for Choose<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { shared, rows, visit } = self;
        let width = shared.columns.len();
        let mut errors = vec![[0f32; LANES]; width];
        for row in rows {
            let x = &shared.w[row * shared.cols..][shared.columns.clone()];
            let fit = Fit {
                spec: shared.spec,
                levels: &shared.grid.levels,
                unit: shared.unit,
                rounds: ROUNDS,
                x,
                importance: Some(shared.importance),
            };
            // (2)
            let candidates = match visit.before {
                Some(scales) => fit.around(scales.get(row - visit.first, shared.group)),
                None => fit.candidates(),
            };
            // (3)
            rounding_errors(&fit, &candidates, &mut errors);
            let losses = losses(shared.block, &shared.cross[row * width..][..width], &errors);
            // (4)
            let best = least_lane(&losses);
            visit.chosen.push(candidates.at(best));
            visit.error.extend(errors.iter().map(|lanes| lanes[best]));
        }
    }
}

/// `x − x̂` of each candidate.
#[inline(always)]
fn rounding_errors(fit: &Fit<'_>, candidates: &Candidates, errors: &mut [Lanes]) {
    let Candidates { steps, shifts, offsets } = candidates;
    let mut inverses = [0f32; LANES];
    for k in 0..LANES {
        inverses[k] = inverse(steps[k]);
    }
    for (&x, errors) in fit.x.iter().zip(errors) {
        for k in 0..LANES {
            let y = x - offsets[k];
            let level = fit.nearest(y * inverses[k] - shifts[k]) + shifts[k];
            errors[k] = y - steps[k] * level;
        }
    }
}

/// `e H eᵀ + 2 c eᵀ` of each candidate, with `H` `[width, width]`.
#[inline(always)]
fn losses(h: &[f32], c: &[f32], errors: &[Lanes]) -> Lanes {
    /// Rows of `H` at a time, which share what is read of the errors.
    const TALL: usize = 4;
    let width = errors.len();
    let mut losses = [0f32; LANES];
    let mut first = 0;
    while first < width {
        let tall = TALL.min(width - first);
        let mut sums = [[0f32; LANES]; TALL];
        let lines: [&[f32]; TALL] =
            std::array::from_fn(|i| &h[(first + i.min(tall - 1)) * width..][..width]);
        // Below the diagonal, twice.
        for (j, e) in errors[..first].iter().enumerate() {
            for (sums, line) in sums.iter_mut().zip(lines) {
                let h = line[j];
                for k in 0..LANES {
                    sums[k] = h.mul_add(e[k], sums[k]);
                }
            }
        }
        for i in 0..tall {
            let e = &errors[first + i];
            let mut sum = sums[i];
            for (j, other) in errors[first..first + i].iter().enumerate() {
                let h = lines[i][first + j];
                for k in 0..LANES {
                    sum[k] = h.mul_add(other[k], sum[k]);
                }
            }
            let (h, c) = (lines[i][first + i], c[first + i]);
            for k in 0..LANES {
                losses[k] += e[k] * h.mul_add(e[k], 2.0 * (sum[k] + c));
            }
        }
        first += tall;
    }
    losses
}
