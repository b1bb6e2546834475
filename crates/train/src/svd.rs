//! The largest singular values of a matrix and their vectors, by subspace iteration from a random start
//! (arXiv 0909.4061, algorithm 4.4).

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Region, Update, View, gemm};
use rand::RngExt;
use rand_pcg::Pcg64Mcg;

/// Directions beyond those that are wanted, so that the wanted ones converge.
const BEYOND: usize = 8;
/// Times that the matrix is multiplied with: neighbouring singular values of weights lie close together.
const ROUNDS: usize = 12;

/// L `[rows, rank]` and R `[rank, cols]` whose product is the nearest of that rank to `w`, `[rows, cols]`: L = U √Σ and
/// R = √Σ Vᵀ of the singular value decomposition. Where the matrix has a lower rank, the rest is zero.
pub(crate) fn principal(
    cpu: &Cpu,
    w: &[f32],
    (rows, cols): (usize, usize),
    rank: usize,
    random: &mut Pcg64Mcg,
) -> (Vec<f32>, Vec<f32>) {
    let width = (rank + BEYOND).min(rows).min(cols);
    let w = View::new(w, rows, cols);
    // Directions are rows here: a basis of the outputs is [width, rows].
    let mut inputs: Vec<f32> =
        (0..width * cols).map(|_| random.random_range(-1.0f32..1.0)).collect();
    let mut outputs = vec![0.0; width * rows];
    for _ in 0..ROUNDS {
        let directions = View::new(&inputs, width, cols);
        gemm(cpu, Update::Set, directions, w.transposed(), &mut outputs, rows, Region::Whole);
        orthonormalize(&mut outputs, rows);
        let directions = View::new(&outputs, width, rows);
        gemm(cpu, Update::Set, directions, w, &mut inputs, cols, Region::Whole);
        if inputs.iter().all(|&value| value == 0.0) {
            break;
        }
    }
    // W ≈ Qᵀ (Q W), and the singular vectors of the small factor are the eigenvectors of (Q W)(Q W)ᵀ.
    let projected = View::new(&inputs, width, cols);
    let mut square = vec![0.0f32; width * width];
    gemm(cpu, Update::Set, projected, projected.transposed(), &mut square, width, Region::Whole);
    let mut square: Vec<f64> = square.into_iter().map(f64::from).collect();
    let vectors = eigenvectors(&mut square, width);
    let mut order: Vec<usize> = (0..width).collect();
    order.sort_by(|&i, &j| square[j * width + j].total_cmp(&square[i * width + i]));
    let (mut left, mut right) = (vec![0.0; rows * rank], vec![0.0; rank * cols]);
    for (k, &i) in order.iter().take(rank).enumerate() {
        let root = square[i * width + i].max(0.0).sqrt().sqrt(); // √σ
        if root == 0.0 {
            continue;
        }
        for j in 0..width {
            let part = vectors[j * width + i];
            for (row, q) in outputs[j * rows..][..rows].iter().enumerate() {
                left[row * rank + k] += (part * root * f64::from(*q)) as f32;
            }
            for (value, p) in right[k * cols..][..cols].iter_mut().zip(&inputs[j * cols..]) {
                *value += (part / root * f64::from(*p)) as f32;
            }
        }
    }
    (left, right)
}

/// Makes rows of `len` values orthogonal and of length 1, by Gram and Schmidt twice. A row that depends on those before
/// becomes zero.
fn orthonormalize(rows: &mut [f32], len: usize) {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    for i in 0..rows.len() / len {
        let (before, row) = rows.split_at_mut(i * len);
        let row = &mut row[..len];
        let start = dot(row, row).sqrt();
        for _ in 0..2 {
            for other in before.chunks_exact(len) {
                let along = dot(row, other) as f32;
                row.iter_mut().zip(other).for_each(|(value, o)| *value -= along * o);
            }
        }
        let length = dot(row, row).sqrt();
        let factor = if length > 1e-6 * start { 1.0 / length } else { 0.0 };
        row.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    }
}

/// Eigenvectors of a symmetric matrix `[n, n]` as columns, by Jacobi's rotations; its diagonal is left with the
/// eigenvalues.
fn eigenvectors(a: &mut [f64], n: usize) -> Vec<f64> {
    let mut vectors: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
    for _sweep in 0..30 {
        let size: f64 = a.iter().map(|value| value * value).sum();
        let off: f64 = (0..n * n).filter(|i| i / n != i % n).map(|i| a[i] * a[i]).sum();
        if off <= 1e-24 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p * n + q] == 0.0 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * a[p * n + q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let cos = 1.0 / (t * t + 1.0).sqrt();
                let sin = t * cos;
                let turn = |x: &mut f64, y: &mut f64| {
                    (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
                };
                for k in 0..n {
                    let (mut x, mut y) = (a[k * n + p], a[k * n + q]);
                    turn(&mut x, &mut y);
                    (a[k * n + p], a[k * n + q]) = (x, y);
                }
                for k in 0..n {
                    let (mut x, mut y) = (a[p * n + k], a[q * n + k]);
                    turn(&mut x, &mut y);
                    (a[p * n + k], a[q * n + k]) = (x, y);
                    let (mut x, mut y) = (vectors[k * n + p], vectors[k * n + q]);
                    turn(&mut x, &mut y);
                    (vectors[k * n + p], vectors[k * n + q]) = (x, y);
                }
            }
        }
    }
    vectors
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_nearest_matrix_of_a_rank_is_found() {
        let (rows, cols, rank) = (40, 23, 3);
        let cpu = Cpu::new(2).unwrap();
        let mut random = Pcg64Mcg::seed_from_u64(1);
        // Of rank 3, and small numbers beside.
        let part: Vec<f32> =
            (0..(rows + cols) * rank).map(|_| random.random_range(-1.0..1.0)).collect();
        let exact: Vec<f32> = (0..rows * cols)
            .map(|i| {
                let (row, col) = (i / cols, i % cols);
                (0..rank).map(|k| part[row * rank + k] * part[(rows + col) * rank + k]).sum()
            })
            .collect();
        let noisy: Vec<f32> =
            exact.iter().map(|value| value + random.random_range(-1e-3..1e-3)).collect();
        let (left, right) = principal(&cpu, &noisy, (rows, cols), rank, &mut random);
        for i in 0..rows * cols {
            let found: f32 =
                (0..rank).map(|k| left[i / cols * rank + k] * right[k * cols + i % cols]).sum();
            assert!((found - exact[i]).abs() < 2e-3, "{i}: {found} and {}", exact[i]);
        }
        // Both factors have the same share.
        let norm = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>();
        assert!((norm(&left) / norm(&right) - 1.0).abs() < 1e-4);
    }

    #[test]
    fn a_matrix_of_zeros_has_no_directions() {
        let cpu = Cpu::new(1).unwrap();
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let (left, right) = principal(&cpu, &[0.0; 35], (5, 7), 2, &mut random);
        assert!(left.iter().chain(&right).all(|&value| value == 0.0));
    }
}
