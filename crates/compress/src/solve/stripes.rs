//! A matrix as solvers walk it: transposed, so that a column's rows are next to each other, and cut
//! into stripes of rows for threads.

use std::ops::Range;

use bevel_kernels::Cpu;

/// Rows in a stripe: some vectors, and many stripes in a matrix.
pub(super) const STRIPE: usize = 64;

/// The rows of each stripe.
pub(super) fn stripes(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(STRIPE).map(move |first| first..rows.min(first + STRIPE))
}

/// `x += factor · y`
#[inline(always)]
pub(super) fn add_scaled(x: &mut [f32], y: &[f32], factor: f32) {
    // Whole stripes have a length the compiler knows.
    if let (([x], []), ([y], [])) = (x.as_chunks_mut::<STRIPE>(), y.as_chunks::<STRIPE>()) {
        for r in 0..STRIPE {
            x[r] = factor.mul_add(y[r], x[r]);
        }
        return;
    }
    for (x, y) in x.iter_mut().zip(y) {
        *x = factor.mul_add(*y, *x);
    }
}

/// `w`, `[rows, cols]`, as `[cols, rows]` with its columns in the given order.
pub(super) fn transposed(cpu: &Cpu, w: &[f32], rows: usize, order: &[usize]) -> Vec<f32> {
    let cols = order.len();
    let mut out = vec![0.0; rows * cols];
    if out.is_empty() {
        return out;
    }
    cpu.pool().run_chunks(&mut out, TILE * rows, |tile, out| {
        let order = &order[tile * TILE..];
        for rows_of in stripes(rows) {
            for (line, &col) in out.chunks_exact_mut(rows).zip(order) {
                for row in rows_of.clone() {
                    line[row] = w[row * cols + col];
                }
            }
        }
    });
    out
}

/// What [`transposed`] made of some rows, as it was: from `[cols, rows]` to `[rows, cols]`.
pub(super) fn restored<T: Copy>(t: &[T], rows: usize, order: &[usize], out: &mut [T]) {
    let cols = order.len();
    // Some rows at a time, so that lines of both stay in the cache.
    for (i, out) in out.chunks_mut(TILE * cols.max(1)).enumerate() {
        for (line, &col) in t.chunks_exact(rows).zip(order) {
            for (row, &value) in out.chunks_exact_mut(cols).zip(&line[i * TILE..]) {
                row[col] = value;
            }
        }
    }
}

/// Lines that one task transposes.
const TILE: usize = 32;
