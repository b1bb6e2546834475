//! Coordinate descent over finished codes and scales, in the spirit of QuantEase (arXiv 2309.01885).
//!
//! The walk of GPTQ never looks back: a code is chosen before those of later columns are known. With
//! `D = Q − W` and the gradient `G = D H`, each column's best value, all others given, is
//! `q_j − G_j / H_jj`, and the best change of a group's scale `−(v Gᵀ) / (v H vᵀ)` along the group's
//! levels `v`. The error falls with every step.
//!
//! 1. Take a block of columns: whole groups.
//! 2. Their gradient as things are now: `H[block, :] Dᵀ`, `[width, rows]`.
//! 3. The scale of each of its groups, rounded as it is stored, where that is better.
//! 4. Each column in turn: the nearest level to the best value; `G` follows in the block.
//! 5. `D` of the block. The next one.
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
    /// `[width, rows]`: the gradient and the weights.
    g: Vec<f32>,
    q: Vec<f32>,
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
    /// are `[cols, rows]`; `q` is what the codes stand for. Results in what `tr(D H Dᵀ)` changed by: the
    /// sum of what each step did.
    pub(super) fn run(
        &self,
        w: &[f32],
        q: &mut [f32],
        stripes_of: &mut [Rounded],
        sweeps: usize,
    ) -> f64 {
        let (rows, cols) = (self.rows, w.len() / self.rows.max(1));
        let mut d = vec![0.0; w.len()];
        self.subtract(q, w, &mut d);
        let mut gain = 0.0;
        for sweep in 0..sweeps {
            // Every other time whole spans, where scales cannot be changed by themselves.
            if sweep % 2 == 1 && self.grid.adjustable().is_none() {
                for first in (0..cols).step_by(self.grid.span) {
                    let span = first..cols.min(first + self.grid.span);
                    let at = span.start * rows..span.end * rows;
                    let g = self.gradient(&span, &d);
                    gain += self.resolve(span, &g, &mut q[at.clone()], stripes_of);
                    self.subtract(&q[at.clone()], &w[at.clone()], &mut d[at]);
                }
            } else {
                gain += self.descend(w, &mut d, q, stripes_of);
            }
        }
        gain
    }

    /// `D` of some columns.
    fn subtract(&self, q: &[f32], w: &[f32], d: &mut [f32]) {
        self.cpu.pool().run_chunks(d, CHUNK, |i, d| {
            let from = i * CHUNK;
            for ((d, q), w) in d.iter_mut().zip(&q[from..]).zip(&w[from..]) {
                *d = q - w;
            }
        });
    }

    /// (2) The gradient of some columns, `[width, rows]`.
    fn gradient(&self, block: &Range<usize>, d: &[f32]) -> Vec<f32> {
        let (rows, cols) = (self.rows, d.len() / self.rows);
        // Symmetric, and the faster to pack of the two that are the same.
        let h = View::new(self.h, cols, cols).transposed().part(block.clone(), 0..cols);
        let mut g = vec![0.0; block.len() * rows];
        gemm(self.cpu, Update::Add, h, View::new(d, cols, rows), &mut g, rows, Region::Whole);
        g
    }

    /// One sweep over all columns, and what it gained.
    fn descend(&self, w: &[f32], d: &mut [f32], q: &mut [f32], stripes_of: &mut [Rounded]) -> f64 {
        let (rows, cols) = (self.rows, q.len() / self.rows);
        let width = self.width();
        let mut parts: Vec<Part<'_>> = stripes(rows)
            .zip(stripes_of)
            .map(|(rows, rounded)| {
                let buffer = || vec![0.0; width * rows.len()];
                Part { rounded, g: buffer(), q: buffer(), moved: buffer(), gain: 0.0, rows }
            })
            .collect();
        // (1)
        for first in (0..cols).step_by(width) {
            let block = first..cols.min(first + width);
            let at = first * rows..block.end * rows;
            // (2)
            let g = self.gradient(&block, d);
            let weights = &q[at.clone()];
            self.cpu.pool().run_chunks(&mut parts, 1, |_, part| {
                let part = &mut part[0];
                let n = part.rows.len();
                let lines = g.chunks_exact(rows).zip(weights.chunks_exact(rows));
                for (k, (g, q)) in lines.enumerate() {
                    part.g[k * n..][..n].copy_from_slice(&g[part.rows.clone()]);
                    part.q[k * n..][..n].copy_from_slice(&q[part.rows.clone()]);
                }
                let step = Step { grid: self.grid, h: self.h, cols, block: block.clone(), part };
                run_wide(self.cpu.isa(), step);
            });
            side_by_side(self.cpu, &parts, &mut q[at.clone()], rows, |part| (&part.rows, &part.q));
            // (5)
            self.subtract(&q[at.clone()], &w[at.clone()], &mut d[at]);
        }
        parts.iter().map(|part| part.gain).sum()
    }
}

/// Values that one task subtracts.
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
            let moved = part.moved[movers.len() * n..][..n].iter_mut();
            let mut any = false;
            for ((q, value), moved) in q.iter_mut().zip(&value).zip(moved) {
                *moved = value - *q;
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
