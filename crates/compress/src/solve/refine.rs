//! Coordinate descent over finished codes and scales, in the spirit of QuantEase (arXiv 2309.01885).
//!
//! The walk of GPTQ never looks back: a code is chosen before those of later columns are known. With
//! `D = Q − W` and the gradient `G = D H`, each column's best value, all others given, is
//! `q_j − G_j / H_jj`, and the best change of a group's scale `−(v Gᵀ) / (v H vᵀ)` along the group's
//! levels `v`. The error falls with every step.
//!
//! 1. `G = H Dᵀ`, `[cols, rows]`.
//! 2. Take a block of columns: whole groups.
//! 3. The scale of each of its groups, rounded as it is stored, where that is better.
//! 4. Each column in turn: the nearest level to the best value; `G` follows in the block.
//! 5. `G += H[:, block] · Δ` for all columns, in the last sweep for those to come. The next block.
//!
//! Packed layouts store the scales of a span together, and step 3 cannot change one: every other sweep
//! goes over spans instead, as [`resolve`](super::resolve) has it.

use std::ops::Range;

use bevel_kernels::linalg::{Region, Update, View, gemm};
use bevel_kernels::{Cpu, Wide, run_wide};

use super::grid::Grid;
use super::quantizer::Rounded;
use super::stripes::{add_products, side_by_side, stripes};

/// What is minimized: `tr(D H Dᵀ)`.
pub(super) struct Refinement<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) grid: &'a Grid,
    /// `H`, `[cols, cols]`, both triangles, in the order of positions.
    pub(super) h: &'a [f32],
    pub(super) rows: usize,
}

/// A stripe's part of a block.
struct Part<'a> {
    rows: Range<usize>,
    rounded: &'a mut Rounded,
    /// `[width, rows]`: the gradient, the weights, and how they changed.
    g: Vec<f32>,
    q: Vec<f32>,
    change: Vec<f32>,
    /// How columns changed in step 4, only those where any row did.
    moved: Vec<f32>,
    /// What all changes so far gained: the sum of the changes of what is minimized.
    gain: f64,
}

impl Refinement<'_> {
    /// Columns of a block: whole groups, where they are not too long.
    fn width(&self) -> usize {
        match self.grid.group {
            group if group <= LONGEST => group * (LONGEST / group),
            _ => LONGEST,
        }
    }

    /// Improves the codes and scales of all stripes, `sweeps` times over all columns. `q` and `w`
    /// are `[cols, rows]`; `q` is what the codes stand for. Results in `tr(D H Dᵀ)` as it is then, which
    /// follows from what each step gained.
    pub(super) fn run(
        &self,
        w: &[f32],
        q: &mut [f32],
        stripes_of: &mut [Rounded],
        sweeps: usize,
    ) -> f64 {
        let (rows, cols) = (self.rows, w.len() / self.rows.max(1));
        // (1)
        let mut d = vec![0.0; w.len()];
        let before = &*q;
        self.cpu.pool().run_chunks(&mut d, CHUNK, |i, d| {
            let from = i * CHUNK;
            for ((d, q), w) in d.iter_mut().zip(&before[from..]).zip(&w[from..]) {
                *d = q - w;
            }
        });
        let mut g = vec![0.0; w.len()];
        // Symmetric, and the faster to pack of the two that are the same.
        let h = View::new(self.h, cols, cols).transposed();
        gemm(self.cpu, Update::Add, h, View::new(&d, cols, rows), &mut g, rows, Region::Whole);
        let mut parts = vec![0.0; d.len().div_ceil(CHUNK)];
        self.cpu.pool().run_chunks(&mut parts, 1, |i, part| {
            let range = i * CHUNK..d.len().min((i + 1) * CHUNK);
            part[0] = dot(&d[range.clone()], &g[range]);
        });
        let mut minimized: f64 = parts.iter().sum();
        for sweep in 0..sweeps {
            let is_last = sweep + 1 == sweeps;
            // Every other time whole spans, where scales cannot be changed by themselves.
            if sweep % 2 == 1 && self.grid.adjustable().is_none() {
                for first in (0..cols).step_by(self.grid.span) {
                    let span = first..cols.min(first + self.grid.span);
                    minimized += self.resolve(span, &mut g, q, stripes_of, is_last);
                }
            } else {
                minimized += self.descend(&mut g, q, stripes_of, is_last);
            }
        }
        minimized
    }

    /// The columns whose gradient will be asked for once a block of columns has changed.
    pub(super) fn concerned(
        &self,
        block: &Range<usize>,
        cols: usize,
        is_last: bool,
    ) -> Range<usize> {
        if is_last { block.end..cols } else { 0..cols }
    }

    /// One sweep over all columns, and what it gained.
    fn descend(
        &self,
        g: &mut [f32],
        q: &mut [f32],
        stripes_of: &mut [Rounded],
        is_last: bool,
    ) -> f64 {
        let (rows, cols) = (self.rows, q.len() / self.rows);
        let h = View::new(self.h, cols, cols).transposed();
        let width = self.width();
        let mut parts: Vec<Part<'_>> = stripes(rows)
            .zip(stripes_of)
            .map(|(rows, rounded)| {
                let buffer = || vec![0.0; width * rows.len()];
                let moved = buffer();
                Part { rounded, g: buffer(), q: buffer(), change: buffer(), moved, gain: 0.0, rows }
            })
            .collect();
        let mut changes = vec![0.0; width * rows];
        for first in (0..cols).step_by(width) {
            // (2)
            let block = first..cols.min(first + width);
            let at = first * rows..block.end * rows;
            let (seen, weights) = (&g[at.clone()], &q[at.clone()]);
            self.cpu.pool().run_chunks(&mut parts, 1, |_, part| {
                let part = &mut part[0];
                let n = part.rows.len();
                for (k, line) in seen.chunks_exact(rows).enumerate() {
                    part.g[k * n..][..n].copy_from_slice(&line[part.rows.clone()]);
                }
                for (k, line) in weights.chunks_exact(rows).enumerate() {
                    part.q[k * n..][..n].copy_from_slice(&line[part.rows.clone()]);
                }
                let step = Step { grid: self.grid, h: self.h, cols, block: block.clone(), part };
                run_wide(self.cpu.isa(), step);
            });
            let changes = &mut changes[..at.len()];
            side_by_side(self.cpu, &parts, changes, rows, |part| (&part.rows, &part.change));
            side_by_side(self.cpu, &parts, &mut q[at], rows, |part| (&part.rows, &part.q));
            // (5)
            let concerned = self.concerned(&block, cols, is_last);
            if changes.iter().any(|&change| change != 0.0) {
                let g = &mut g[concerned.start * rows..];
                let h = h.part(concerned, block.clone());
                let changes = View::new(changes, block.len(), rows);
                gemm(self.cpu, Update::Add, h, changes, g, rows, Region::Whole);
            }
        }
        parts.iter().map(|part| part.gain).sum()
    }
}

/// `Σ a b`
fn dot(a: &[f32], b: &[f32]) -> f64 {
    /// Sums side by side, so that additions do not wait for one another.
    const LANES: usize = 8;
    let mut sums = [0f64; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    sums.iter().sum()
}

/// Values that one task sums up.
const CHUNK: usize = 1 << 14;

/// Columns of a block, at most.
const LONGEST: usize = 128;

/// The descent over a block in one stripe.
struct Step<'a, 'b> {
    grid: &'a Grid,
    h: &'a [f32],
    cols: usize,
    block: Range<usize>,
    part: &'a mut Part<'b>,
}

impl Wide for Step<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let n = self.part.rows.len();
        let width = self.block.len();
        self.part.change.fill(0.0);
        // (3)
        if let Some(spec) = self.grid.adjustable() {
            let group = self.grid.group;
            if self.block.start.is_multiple_of(group) && group <= width {
                for start in (0..width).step_by(group) {
                    self.rescale(spec, start..width.min(start + group));
                }
            }
        }
        // (4)
        let (mut target, mut value, mut gains) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        // Columns that changed, and how much they matter to the next one.
        let (mut movers, mut factors) = (Vec::with_capacity(width), Vec::with_capacity(width));
        for k in 0..width {
            let column = self.block.start + k;
            let row_h = &self.h[column * self.cols + self.block.start..][..width];
            let inverse = 1.0 / row_h[k];
            let part = &mut *self.part;
            let g = &mut part.g[k * n..][..n];
            factors.clear();
            factors.extend(movers.iter().map(|&k: &usize| row_h[k]));
            add_products(g, &part.moved, &factors);
            let q = &mut part.q[k * n..][..n];
            for ((target, q), g) in target.iter_mut().zip(&*q).zip(&*g) {
                *target = q - g * inverse;
            }
            let codes = &mut part.rounded.codes[column * n..][..n];
            let scales = &part.rounded.scales;
            scales.round(&self.grid.levels, column / self.grid.group, &target, codes, &mut value);
            let changes = part.change[k * n..][..n].iter_mut();
            let moved = part.moved[movers.len() * n..][..n].iter_mut();
            let mut any = false;
            for (((change, q), value), moved) in changes.zip(q).zip(&value).zip(moved) {
                *moved = value - *q;
                *change += *moved;
                *q = *value;
                any |= *moved != 0.0;
            }
            if any {
                let moved = &part.moved[movers.len() * n..][..n];
                for ((gain, moved), g) in gains.iter_mut().zip(moved).zip(&*g) {
                    *gain += moved * (2.0 * g + moved * row_h[k]);
                }
                movers.push(k);
            }
        }
        self.part.gain += gains.iter().copied().map(f64::from).sum::<f64>();
    }
}

impl Step<'_, '_> {
    /// The best scale of a group, given its codes.
    #[inline(always)]
    fn rescale(&mut self, spec: &super::GroupSpec, columns: Range<usize>) {
        let part = &mut *self.part;
        let n = part.rows.len();
        let at = (self.block.start + columns.start) / self.grid.group;
        let mut levels = vec![0.0; columns.len() * n];
        let (mut slope, mut curvature) = (vec![0.0; n], vec![0.0; n]);
        for (i, k) in columns.clone().enumerate() {
            let codes = &part.rounded.codes[(self.block.start + k) * n..][..n];
            let levels = &mut levels[i * n..][..n];
            part.rounded.scales.levels(&self.grid.levels, at, codes, levels);
            for ((slope, level), g) in slope.iter_mut().zip(levels).zip(&part.g[k * n..]) {
                *slope += *level * g;
            }
        }
        let mut product = vec![0.0; n];
        for (i, k) in columns.clone().enumerate() {
            let start = (self.block.start + k) * self.cols + self.block.start + columns.start;
            let h = &self.h[start..][..columns.len()];
            product.fill(0.0);
            add_products(&mut product, &levels, &h[..i]);
            let levels = &levels[i * n..][..n];
            for ((curvature, level), product) in curvature.iter_mut().zip(levels).zip(&product) {
                *curvature += level * (h[i] * level + 2.0 * product);
            }
        }
        let mut moved = vec![0.0; n];
        for r in 0..n {
            let [step, shift, offset] = part.rounded.scales.get(r, at);
            if curvature[r] > 0.0 {
                let better = self.grid.stored(spec, step - slope[r] / curvature[r]);
                let change = better - step;
                let gain = change * (2.0 * slope[r] + change * curvature[r]);
                if gain < 0.0 && better != 0.0 {
                    part.rounded.scales.set(r, at, [better, shift, offset]);
                    moved[r] = change;
                    part.gain += f64::from(gain);
                }
            }
        }
        for (i, k) in columns.clone().enumerate() {
            for r in 0..n {
                // As rounding computes it, so that unchanged codes are unchanged weights.
                let [step, _, offset] = part.rounded.scales.get(r, at);
                let q = step * levels[i * n + r] + offset;
                let change = q - part.q[k * n + r];
                part.q[k * n + r] = q;
                part.change[k * n + r] += change;
                levels[i * n + r] = change;
            }
        }
        if moved.iter().all(|&moved| moved == 0.0) {
            return;
        }
        for later in 0..self.block.len() {
            let start = (self.block.start + later) * self.cols + self.block.start + columns.start;
            let g = &mut part.g[later * n..][..n];
            add_products(g, &levels, &self.h[start..][..columns.len()]);
        }
    }
}
