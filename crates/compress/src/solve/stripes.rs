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

/// `x += Σ_j factors[j] · y_j` with the lines `y_j` of `y`, `[factors, rows]`: each value one chain of
/// fused multiply-adds in the order of `j`, the same as line after line, but kept in registers.
#[inline(always)]
pub(super) fn add_products(x: &mut [f32], y: &[f32], factors: &[f32]) {
    const LANES: usize = STRIPE / 4;
    let rows = x.len();
    if rows != STRIPE {
        for (y, &factor) in y.chunks_exact(rows).zip(factors) {
            add_scaled(x, y, factor);
        }
        return;
    }
    let (a, rest) = x.split_at_mut(LANES);
    let (b, rest) = rest.split_at_mut(LANES);
    let (c, d) = rest.split_at_mut(LANES);
    let mut sums = [[0f32; LANES]; 4];
    let [s, t, u, v] = &mut sums;
    s.copy_from_slice(a);
    t.copy_from_slice(b);
    u.copy_from_slice(c);
    v.copy_from_slice(d);
    for (y, &factor) in y.as_chunks::<STRIPE>().0.iter().zip(factors) {
        for l in 0..LANES {
            s[l] = factor.mul_add(y[l], s[l]);
        }
        for l in 0..LANES {
            t[l] = factor.mul_add(y[LANES + l], t[l]);
        }
        for l in 0..LANES {
            u[l] = factor.mul_add(y[2 * LANES + l], u[l]);
        }
        for l in 0..LANES {
            v[l] = factor.mul_add(y[3 * LANES + l], v[l]);
        }
    }
    a.copy_from_slice(s);
    b.copy_from_slice(t);
    c.copy_from_slice(u);
    d.copy_from_slice(v);
}

/// Lines of all rows, `[lines, rows]`, from those of the stripes, `[lines, rows of the stripe]`: `of` has
/// a stripe's rows and its lines.
pub(super) fn side_by_side<S: Sync>(
    cpu: &Cpu,
    stripes: &[S],
    out: &mut [f32],
    rows: usize,
    of: impl Fn(&S) -> (&Range<usize>, &[f32]) + Sync,
) {
    cpu.pool().run_chunks(out, rows, |k, line| {
        for (rows, lines) in stripes.iter().map(&of) {
            line[rows.clone()].copy_from_slice(&lines[k * rows.len()..][..rows.len()]);
        }
    });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rows: usize, lines: usize) {
        let value = |i: usize| ((i * 2654435761) % 1000) as f32 / 500.0 - 1.0;
        let y: Vec<f32> = (0..rows * lines).map(value).collect();
        let factors: Vec<f32> = (0..lines).map(|j| value(j + 7)).collect();
        let mut together: Vec<f32> = (0..rows).map(|r| value(r + 3)).collect();
        let mut apart = together.clone();
        add_products(&mut together, &y, &factors);
        for (y, factor) in y.chunks_exact(rows).zip(factors) {
            add_scaled(&mut apart, y, factor);
        }
        assert_eq!(together, apart, "{rows} rows, {lines} lines");
    }

    #[test]
    fn products_are_added_in_their_order() {
        for lines in [0, 1, 2, 17] {
            check(STRIPE, lines);
            check(STRIPE - 5, lines);
        }
    }
}
