//! A column's rounding to a grid, as the surgeon's walk asks for it.

use bevel_kernels::Cpu;

use super::grid::Grid;
use super::obs::Columns;
use super::scales::Scales;
use super::stripes::{restored, stripes};
use super::{Form, SolveError, SolveResult};

/// Rounds each column to the grid.
pub(super) struct Quantizer<'a> {
    pub(super) grid: &'a Grid,
    /// The column of the matrix at each position of the walk.
    pub(super) order: &'a [usize],
    /// Weights of errors in the columns at each position.
    pub(super) importance: &'a [f32],
    /// Whether the scales are there already, in groups of the matrix's own columns. Otherwise groups
    /// are made of columns that are walked one after another.
    pub(super) fixed: bool,
    pub(super) isa: bevel_kernels::Isa,
}

/// A stripe's scales and codes.
pub(super) struct Rounded {
    pub(super) scales: Scales,
    /// `[cols, rows]`
    pub(super) codes: Vec<u8>,
    /// The first thing that went wrong.
    pub(super) error: Option<SolveError>,
}

impl Quantizer<'_> {
    /// Stripes without scales.
    pub(super) fn stripes(&self, rows: usize) -> Vec<Rounded> {
        let cols = self.order.len();
        let stripe = |rows: std::ops::Range<usize>| Rounded {
            scales: Scales::new(self.grid, rows.len(), cols),
            codes: vec![0; cols * rows.len()],
            error: None,
        };
        stripes(rows).map(stripe).collect()
    }

    /// Chooses the scales of all groups of `w`, `[rows, cols]`, with errors weighted by
    /// `importance`, `[cols]`.
    pub(super) fn fix(
        &self,
        cpu: &Cpu,
        w: &[f32],
        importance: Option<&[f32]>,
        stripes: &mut [Rounded],
    ) -> SolveResult<()> {
        let (grid, cols) = (self.grid, self.order.len());
        cpu.pool().run_chunks(stripes, 1, |i, stripe| {
            let stripe = &mut stripe[0];
            let rows = stripe.scales.rows();
            let first = i * super::stripes::STRIPE;
            for row in 0..rows {
                let x = &w[(first + row) * cols..][..cols];
                for (span, x) in x.chunks(grid.span).enumerate() {
                    let start = span * grid.span;
                    let importance = importance.map(|w| &w[start..start + x.len()]);
                    let fitted = grid.fit(self.isa, &mut stripe.scales, row, span, x, importance);
                    if let Err(error) = fitted {
                        stripe.error = Some(error);
                        return;
                    }
                }
            }
        });
        first_error(stripes)
    }

    /// Chooses the scales of the span that begins at position `first`: `w` is its columns,
    /// `[span, rows]`.
    #[inline(never)]
    fn fit(&self, stripe: &mut Rounded, first: usize, w: &[f32]) {
        let rows = stripe.scales.rows();
        let end = self.order.len().min(first + self.grid.span);
        let mut x = vec![0.0; end - first];
        for row in 0..rows {
            for (i, x) in x.iter_mut().enumerate() {
                *x = w[i * rows + row];
            }
            let span = first / self.grid.span;
            let importance = Some(&self.importance[first..end]);
            let fitted = self.grid.fit(self.isa, &mut stripe.scales, row, span, &x, importance);
            if let Err(error) = fitted {
                stripe.error.get_or_insert(error);
                return;
            }
        }
    }

    /// What is to be written.
    pub(super) fn form(
        &self,
        cpu: &Cpu,
        mut stripes: Vec<Rounded>,
        rows: usize,
        group_of: Option<Vec<u32>>,
    ) -> SolveResult<Form> {
        first_error(&mut stripes)?;
        let cols = self.order.len();
        let mut codes = vec![0; rows * cols];
        cpu.pool().run_chunks(&mut codes, super::stripes::STRIPE * cols.max(1), |i, codes| {
            let stripe = &stripes[i];
            let rows = stripe.scales.rows();
            restored(&stripe.codes, rows, self.order, codes);
        });
        let scales: Vec<Scales> = stripes.into_iter().map(|stripe| stripe.scales).collect();
        self.grid.form(&scales, codes, cols, group_of)
    }
}

fn first_error(stripes: &mut [Rounded]) -> SolveResult<()> {
    stripes.iter_mut().find_map(|stripe| stripe.error.take()).map_or(Ok(()), Err)
}

impl Columns for Quantizer<'_> {
    type Stripe = Rounded;

    fn block(&mut self, _: &Cpu, _: usize, _: &[f32]) {}

    #[inline(always)]
    fn column(&self, stripe: &mut Rounded, column: usize, w: &[f32], q: &mut [f32]) {
        if !self.fixed && column.is_multiple_of(self.grid.span) {
            self.fit(stripe, column, w);
        }
        let rows = q.len();
        let at = if self.fixed { self.order[column] } else { column };
        let codes = &mut stripe.codes[column * rows..][..rows];
        stripe.scales.round(&self.grid.levels, at / self.grid.group, &w[..rows], codes, q);
    }
}
