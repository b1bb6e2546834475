//! Products with a matrix whose rows are read, or unpacked, some at a time.

use std::ops::Range;

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Panels, Precision, Rows, Term, Update, multiply};

/// Values that are read together.
const TILE: usize = 2 << 20;

/// Rows that are read together, at most, of so many with so many columns.
pub(crate) fn most_rows(rows: usize, cols: usize) -> usize {
    (TILE / cols.max(1)).clamp(1, rows.max(1)).next_multiple_of(Panels::WIDTHS)
}

/// Rows that are read together.
pub(crate) fn tiles(matrix: &dyn Rows) -> impl Iterator<Item = Range<usize>> + use<> {
    let rows = matrix.rows();
    let most = most_rows(rows, matrix.cols());
    (0..rows).step_by(most).map(move |first| first..rows.min(first + most))
}

/// `y = x Wᵀ`, and `more` terms of as many columns: `y` is `[n, out]`, `x` is `[n, in]`, packed as the left factor.
pub(crate) fn forward(
    cpu: &Cpu,
    precision: Precision,
    w: &dyn Rows,
    y: &mut [f32],
    x: &Panels,
    more: &[Term<'_>],
    right: &mut Panels,
) {
    for rows in tiles(w) {
        right.pack_turned_rows(cpu, precision, w, rows.clone());
        let more = more.iter().map(|term| Term { column: rows.start, ..*term });
        let terms: Vec<Term<'_>> = std::iter::once(Term::new(x, right)).chain(more).collect();
        multiply(cpu, Update::Set, &terms, &mut y[rows.start..], w.rows());
    }
}

/// `d_x = d_y W`, and `more` terms, or what `update` says: `d_x` is `[n, in]`, `d_y` is `[n, out]`, packed as the left
/// factor.
#[allow(clippy::too_many_arguments)] // Those of a product.
pub(crate) fn backward(
    cpu: &Cpu,
    precision: Precision,
    w: &dyn Rows,
    update: Update,
    d_x: &mut [f32],
    d_y: &Panels,
    more: &[Term<'_>],
    right: &mut Panels,
) {
    for rows in tiles(w) {
        let first = rows.start;
        let (update, more) = if first > 0 { (Update::Add, &[][..]) } else { (update, more) };
        right.pack_rows(cpu, precision, w, rows);
        let term = Term { first, ..Term::new(d_y, right) };
        let terms: Vec<Term<'_>> = [term].iter().chain(more).copied().collect();
        multiply(cpu, update, &terms, d_x, w.cols());
    }
}

/// Calls `work` with some rows after others.
pub(crate) fn for_each(
    cpu: &Cpu,
    w: &dyn Rows,
    tile: &mut Vec<f32>,
    mut work: impl FnMut(Range<usize>, &[f32]),
) {
    for rows in tiles(w) {
        tile.resize(tile.len().max(rows.len() * w.cols()), 0.0);
        let weights = &mut tile[..rows.len() * w.cols()];
        cpu.pool().run_chunks(weights, w.cols(), |i, row| w.read(rows.start + i, row));
        work(rows, weights);
    }
}
