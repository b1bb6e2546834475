//! The optimal brain surgeon's walk over columns, shared by GPTQ (arXiv 2210.17323) and SparseGPT
//! (arXiv 2301.00774): what is lost in a column is made up for in those that follow.
//!
//! With `U` upper triangular, `H⁻¹ = Uᵀ U`, for each column `j`:
//! ```text
//! q = what becomes of column j          e = (w_j − q) / U_jj
//! W[:, j+1..] −= e · U[j, j+1..]
//! ```
//! 1. Take a block of columns; the method may look at all of its rows.
//! 2. Walk over its columns, updating those of the block: each stripe of rows by itself.
//! 3. Update all columns that follow at once: `W[:, end..] −= E · U[block, end..]`.
//!
//! The matrix is transposed here, `[cols, rows]`: a column is a vector, and rows do not mix.

use std::ops::Range;

use bevel_kernels::linalg::{Region, Update, View, gemm};
use bevel_kernels::{Cpu, Wide, run_wide};

use super::stripes::{add_scaled, side_by_side, stripes};

/// What a method does with columns.
pub(super) trait Columns: Sync {
    /// What belongs to a stripe of rows.
    type Stripe: Send + Sync;

    /// Sees a block before its columns are walked: `w` is `[width, rows]`.
    fn block(&mut self, cpu: &Cpu, first: usize, w: &[f32]);

    /// Sets `q` to what becomes of column `column` in a stripe: `w` is this column and those that
    /// follow it in the block, `[.., rows of the stripe]`, up to date.
    ///
    /// Implementations are `#[inline(always)]`.
    fn column(&self, stripe: &mut Self::Stripe, column: usize, w: &[f32], q: &mut [f32]);
}

/// The matrix along which errors move.
pub(super) struct Surgeon<'a> {
    pub(super) cpu: &'a Cpu,
    /// `[cols, cols]`
    pub(super) u: &'a [f32],
}

/// A stripe's part of a block.
struct Part<S> {
    rows: Range<usize>,
    /// `[width, rows]`: columns as they were when reached, what became of them, and `e`.
    w: Vec<f32>,
    q: Vec<f32>,
    e: Vec<f32>,
    /// Σ e² so far.
    lost: f64,
    own: S,
}

impl Surgeon<'_> {
    /// Walks over `w`, `[cols, rows]`, in blocks of `width` columns, and leaves the result there. Results
    /// in the stripes' own and in what the outputs lost, `tr(ΔW H ΔWᵀ) = Σ e²`.
    pub(super) fn walk<C: Columns>(
        &self,
        w: &mut [f32],
        rows: usize,
        width: usize,
        columns: &mut C,
        own: Vec<C::Stripe>,
    ) -> (Vec<C::Stripe>, f64) {
        let cols = w.len() / rows.max(1);
        let mut parts: Vec<Part<C::Stripe>> = stripes(rows)
            .zip(own)
            .map(|(rows, own)| {
                let buffer = || vec![0.0; width * rows.len()];
                Part { w: buffer(), q: buffer(), e: buffer(), lost: 0.0, own, rows }
            })
            .collect();
        let mut error = vec![0.0; width * rows];
        for first in (0..cols).step_by(width) {
            let last = cols.min(first + width);
            let (block, rest) = w[first * rows..].split_at_mut((last - first) * rows);
            // (1)
            columns.block(self.cpu, first, block);
            // (2)
            let (shared, seen) = (&*columns, &*block);
            self.cpu.pool().run_chunks(&mut parts, 1, |_, part| {
                let part = &mut part[0];
                for (w, line) in
                    part.w.chunks_exact_mut(part.rows.len()).zip(seen.chunks_exact(rows))
                {
                    w.copy_from_slice(&line[part.rows.clone()]);
                }
                let step = Step { surgeon: self, columns: shared, part, range: first..last, cols };
                run_wide(self.cpu.isa(), step);
            });
            let error = &mut error[..(last - first) * rows];
            side_by_side(self.cpu, &parts, error, rows, |part| (&part.rows, &part.e));
            side_by_side(self.cpu, &parts, block, rows, |part| (&part.rows, &part.q));
            // (3)
            let u = View::new(self.u, cols, cols).part(first..last, last..cols).transposed();
            let error = View::new(error, last - first, rows);
            gemm(self.cpu, Update::Subtract, u, error, rest, rows, Region::Whole);
        }
        let lost = parts.iter().map(|part| part.lost).sum();
        (parts.into_iter().map(|part| part.own).collect(), lost)
    }
}

/// The walk over a block's columns in one stripe.
struct Step<'a, C: Columns> {
    surgeon: &'a Surgeon<'a>,
    columns: &'a C,
    part: &'a mut Part<C::Stripe>,
    range: Range<usize>,
    cols: usize,
}

impl<C: Columns> Wide for Step<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Step { surgeon, columns, part, range, cols } = self;
        let (rows, width) = (part.rows.len(), range.len());
        let mut squares = vec![0f32; rows];
        for k in 0..width {
            let column = range.start + k;
            let q = &mut part.q[k * rows..][..rows];
            columns.column(&mut part.own, column, &part.w[k * rows..width * rows], q);
            let (done, later) = part.w.split_at_mut((k + 1) * rows);
            let (w, e) = (&done[k * rows..], &mut part.e[k * rows..][..rows]);
            let following = column * cols + column + 1..column * cols + range.end;
            let inverse = 1.0 / surgeon.u[column * cols + column];
            for r in 0..rows {
                e[r] = (w[r] - q[r]) * inverse;
                squares[r] += e[r] * e[r];
            }
            for (later, &u) in later.chunks_exact_mut(rows).zip(&surgeon.u[following]) {
                add_scaled(later, e, -u);
            }
        }
        part.lost += squares.iter().copied().map(f64::from).sum::<f64>();
    }
}
