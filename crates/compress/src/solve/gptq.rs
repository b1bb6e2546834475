//! GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
//! (arXiv 2210.17323), and GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration
//! (arXiv 2504.02692), which differs in step 4: the paper has the walk of step 6 move the weights on the
//! way. What is minimized is the same, `‖Q X − W X̃‖²`; here the stream's own drift is in it too, so that
//! an output layer makes up for what all layers before it lost.
//!
//! With `W` `[out, in]`, `X` `[in, tokens]` the inputs, `H = X Xᵀ`:
//!
//! 1. Dead inputs, `H_jj = 0`: their weights become zero.
//! 2. The order of columns: as they lie, or by decreasing `H_jj`.
//! 3. `U` upper triangular with `(H + λI)⁻¹ = Uᵀ U`, `λ = damping · mean(diag H)`.
//! 4. GPTAQ: `W` moves to the weights that the uncompressed model's outputs are best met with. With
//!    `ΔX = X̃ − X` the drift of the inputs from that model's and `ΔR` that of the stream which the
//!    outputs join, `W += α (W ΔX Xᵀ + ΔR Xᵀ) (H + λI)⁻¹`.
//! 5. Scales, where they are fixed before the walk; elsewhere when a span's first column is reached.
//! 6. The walk of [`obs`](super::obs): `q_j = quant(w_j)`, `e = (w_j − q_j) / U_jj`,
//!    `W[:, j+1..] −= e · U[j, j+1..]`.
//! 7. [`refine`](super::refine): coordinate descent from what the walk ended with.
//!
//! Block formats are nothing special: a span is a super-block of 256 columns, its scales are found by
//! the layout's own importance-weighted search on weights that earlier columns have updated, and step
//! 6 chooses the codes.

use std::time::Instant;

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Region, Update, View, gemm};

use super::grid::{Grid, dequantize};
use super::hessian::{self, Factor};
use super::loss::{difference, output_energy, relative};
use super::obs::Surgeon;
use super::quantizer::Quantizer;
use super::refine::Refinement;
use super::stripes::transposed;
use super::{Gptq, Order, SolveError, SolveReport, SolveResult, Solved};
use crate::Stats;

/// Columns that are walked between two updates of all that follow, about.
const BLOCK: usize = 128;

/// Spans up to this many columns are whole in a block, so that their scales see every update.
const LONGEST_SPAN: usize = 256;

/// Few tokens say little about where many weights should move to: the drift counts for
/// `tokens / (tokens + SHRINKAGE · cols)` of what it would with endless ones.
const SHRINKAGE: f32 = 3.0;

/// Quantizes `w`, `[rows, cols]`.
pub(super) fn gptq(
    cpu: &Cpu,
    w: &[f32],
    rows: usize,
    stats: &Stats,
    grid: &Grid,
    options: &Gptq,
) -> SolveResult<Solved> {
    let cols = stats.cols();
    if options.order == Order::ActOrder && !grid.can_regroup(LONGEST_SPAN) {
        return Err(SolveError::Target(format!(
            "act-order makes groups of integers, of up to {LONGEST_SPAN} columns or of whole rows; choose static groups for other targets"
        )));
    }
    let mut clock = Clock::new();
    let gram = hessian::gram(stats, "GPTQ")?;
    // (1)
    let dead = hessian::dead(gram, cols);
    let dead_columns = dead.iter().filter(|dead| **dead).count();
    let mut alive: Vec<f32> = match dead_columns {
        0 => w.to_vec(),
        _ => w.iter().enumerate().map(|(i, &w)| if dead[i % cols] { 0.0 } else { w }).collect(),
    };
    // (2)
    let order = match options.order {
        Order::Natural => (0..cols).collect(),
        Order::StaticGroups | Order::ActOrder => hessian::by_size(gram, cols),
    };
    // (3)
    let Factor { u, damping, retries } = hessian::factor(cpu, gram, &order, options.damping)?;
    clock.lap("factor");
    // (4) A matrix of zeros was made to do nothing: an added block that is still to be trained, or a
    // pruned one.
    if options.drift != 0.0 && w.iter().any(|&w| w != 0.0) {
        let tokens = stats.tokens() as f32;
        let alpha = options.drift * tokens / (tokens + SHRINKAGE * cols as f32);
        meet_drift(cpu, stats, &order, &u, &mut alive, alpha)?;
    }
    // (5)
    let importance: Vec<f32> = order.iter().map(|&j| gram[j * cols + j]).collect();
    let fixed = options.order == Order::StaticGroups || grid.span > LONGEST_SPAN;
    let quantizer =
        &mut Quantizer { grid, order: &order, importance: &importance, fixed, isa: cpu.isa() };
    let mut stripes = quantizer.stripes(rows);
    if fixed {
        let importance: Vec<f32> = (0..cols).map(|j| gram[j * cols + j]).collect();
        quantizer.fix(cpu, &alive, Some(&importance), &mut stripes)?;
    }
    clock.lap("scales");
    // (6)
    let mut turned = transposed(cpu, &alive, rows, &order);
    let width = match grid.span {
        _ if fixed => BLOCK,
        span => span * BLOCK.div_ceil(span),
    };
    let surgeon = Surgeon { cpu, u: &u };
    let (stripes, walked) = surgeon.walk(&mut turned, rows, width, quantizer, stripes);
    clock.lap("walk");
    // (7)
    let (stripes, order, lost) = match options.refine.unwrap_or_else(|| grid.levels.sweeps()) {
        0 => (stripes, order.clone(), None),
        sweeps => {
            let own = (0..cols).collect();
            let target = if fixed { own } else { order.clone() };
            let mut stripes = stripes;
            let mut q = turned;
            if target != order {
                q = in_order(&q, &order, rows);
                for stripe in &mut stripes {
                    stripe.codes = in_order(&stripe.codes, &order, stripe.scales.rows());
                }
            }
            let mut h = u;
            hessian::damped(cpu, gram, &target, damping, &mut h);
            let refinement = Refinement { cpu, grid, h: &h, rows };
            let w = transposed(cpu, &alive, rows, &target);
            let damped = walked + refinement.run(&w, &mut q, &mut stripes, sweeps);
            // With drift, `w` is no longer what the outputs are compared with.
            let lost = (options.drift == 0.0)
                .then(|| damped - damping_part(gram, refinement.h, &target, &w, &q));
            clock.lap("refine");
            (stripes, target, lost)
        }
    };
    let group_of = (options.order == Order::ActOrder && !fixed).then(|| {
        let mut group_of = vec![0; cols];
        for (position, &j) in order.iter().enumerate() {
            group_of[j] = (position / grid.group) as u32;
        }
        group_of
    });
    let written = Quantizer { order: &order, ..*quantizer };
    let form = written.form(cpu, stripes, rows, group_of)?;
    let weights = dequantize(cpu, &form, rows, cols)?;
    clock.lap("pack");
    let energy = output_energy(cpu, stats, w);
    let lost = lost.unwrap_or_else(|| output_energy(cpu, stats, &difference(w, &weights)));
    let error = relative(lost.max(0.0), energy);
    clock.lap("measure");
    let report = SolveReport {
        error,
        damping_retries: retries,
        dead_columns,
        seconds: clock.laps,
        ..SolveReport::default()
    };
    Ok(Solved { weights, form, report })
}

/// What damping, and the diagonal of dead columns, add to `tr(D H Dᵀ)`; `w` and `q` are `[cols, rows]`.
fn damping_part(gram: &[f32], h: &[f32], order: &[usize], w: &[f32], q: &[f32]) -> f64 {
    let cols = order.len();
    let rows = w.len() / cols.max(1);
    let lines = w.chunks_exact(rows.max(1)).zip(q.chunks_exact(rows.max(1)));
    let part = |(i, (w, q)): (usize, (&[f32], &[f32]))| {
        let added = f64::from(h[i * cols + i]) - f64::from(gram[order[i] * cols + order[i]]);
        let square = |(w, q): (&f32, &f32)| f64::from(q - w) * f64::from(q - w);
        added * w.iter().zip(q).map(square).sum::<f64>()
    };
    lines.enumerate().map(part).sum()
}

/// (4) Adds `α · D (H + λI)⁻¹`, `D = W ΔX Xᵀ + ΔR Xᵀ`, to the weights `w`, `[rows, cols]`.
fn meet_drift(
    cpu: &Cpu,
    stats: &Stats,
    order: &[usize],
    u: &[f32],
    w: &mut [f32],
    alpha: f32,
) -> SolveResult<()> {
    let cols = order.len();
    let rows = w.len() / cols;
    let missing = SolveError::Missing { method: "GPTAQ", what: "drift" };
    let cross = stats.cross().ok_or(missing)?;
    let mut d = stats.residual().map_or_else(|| vec![0.0; w.len()], <[f32]>::to_vec);
    let whole = |update, a: View<'_>, b: View<'_>, out: &mut [f32]| {
        gemm(cpu, update, a, b, out, b.cols(), Region::Whole);
    };
    whole(Update::Add, View::new(w, rows, cols), View::new(cross, cols, cols), &mut d);
    // Uᵀ U Dᵀ, in the order of the factor.
    let turned = transposed(cpu, &d, rows, order);
    let u = View::new(u, cols, cols);
    let (mut half, mut shift) = (vec![0.0; w.len()], vec![0.0; w.len()]);
    whole(Update::Add, u, View::new(&turned, cols, rows), &mut half);
    whole(Update::Add, u.transposed(), View::new(&half, cols, rows), &mut shift);
    for (line, &j) in shift.chunks_exact(rows).zip(order) {
        for (row, shift) in line.iter().enumerate() {
            w[row * cols + j] += alpha * shift;
        }
    }
    Ok(())
}

/// Lines of `rows` values in the matrix's own order, from those in the order of the walk.
fn in_order<T: Copy + Default>(lines: &[T], order: &[usize], rows: usize) -> Vec<T> {
    let mut out = vec![T::default(); lines.len()];
    for (line, &j) in lines.chunks_exact(rows).zip(order) {
        out[j * rows..][..rows].copy_from_slice(line);
    }
    out
}

/// Seconds between steps.
struct Clock {
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Clock {
    fn new() -> Self {
        Self { last: Instant::now(), laps: Vec::new() }
    }

    fn lap(&mut self, step: &'static str) {
        let now = Instant::now();
        self.laps.push((step, (now - self.last).as_secs_f64()));
        self.last = now;
    }
}
