//! The optimal brain surgeon as its paper has it: an explicit inverse Hessian in f64, from which the
//! column that is done is eliminated.

use super::Layer;

/// Walks over the columns in `order`; `quantize(row, column, w)` says what a weight becomes, where
/// `w` are the row's weights as they are then.
pub(super) fn walk(
    layer: &Layer,
    order: &[usize],
    damping: f64,
    mut quantize: impl FnMut(usize, usize, &[f64]) -> f64,
) -> Vec<f64> {
    let cols = layer.cols;
    let mut inverse = inverse(layer, damping);
    let mut w: Vec<f64> = layer.w.iter().map(|&w| f64::from(w)).collect();
    for (done, &j) in order.iter().enumerate() {
        let rest = &order[done + 1..];
        let pivot = inverse[j * cols + j];
        for (row, w) in w.chunks_exact_mut(cols).enumerate() {
            let q = quantize(row, j, w);
            let error = (w[j] - q) / pivot;
            rest.iter().for_each(|&k| w[k] -= error * inverse[j * cols + k]);
            w[j] = q;
        }
        for &a in rest {
            for &b in rest {
                inverse[a * cols + b] -= inverse[a * cols + j] * inverse[j * cols + b] / pivot;
            }
        }
    }
    w
}

/// The inverse of `H + λI` by Gauss and Jordan.
pub(super) fn inverse(layer: &Layer, damping: f64) -> Vec<f64> {
    let cols = layer.cols;
    let mean = (0..cols).map(|j| layer.h(j, j)).sum::<f64>() / cols as f64;
    let mut a: Vec<f64> = (0..cols * cols).map(|at| layer.h(at / cols, at % cols)).collect();
    let mut inverse = vec![0.0; cols * cols];
    for j in 0..cols {
        a[j * cols + j] += damping * mean;
        inverse[j * cols + j] = 1.0;
    }
    for k in 0..cols {
        let pivot = a[k * cols + k];
        let done = |m: &mut [f64]| m[k * cols..][..cols].iter_mut().for_each(|v| *v /= pivot);
        done(&mut a);
        done(&mut inverse);
        for i in (0..cols).filter(|&i| i != k) {
            let factor = a[i * cols + k];
            for j in 0..cols {
                a[i * cols + j] -= factor * a[k * cols + j];
                inverse[i * cols + j] -= factor * inverse[k * cols + j];
            }
        }
    }
    inverse
}

/// The columns by decreasing `H_jj`.
pub(super) fn by_size(layer: &Layer) -> Vec<usize> {
    let mut order: Vec<usize> = (0..layer.cols).collect();
    order.sort_by(|&a, &b| layer.h(b, b).total_cmp(&layer.h(a, a)));
    order
}

/// Rows are alike, to rounding, but for some where a weight lay between two levels or a group
/// between two scales: at most one in `rare`, and one.
#[track_caller]
pub(super) fn check_rows(found: &[f32], expected: &[f64], cols: usize, rare: usize) {
    let rows = found.chunks_exact(cols).zip(expected.chunks_exact(cols));
    let alike = |(found, expected): &(&[f32], &[f64])| {
        found.iter().zip(*expected).all(|(a, b)| (f64::from(*a) - b).abs() < 2e-4)
    };
    let (count, same) = (found.len() / cols, rows.filter(alike).count());
    assert!(same + 1 + count / rare >= count, "{same} of {count} rows are alike");
}
