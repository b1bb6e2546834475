//! The triangular factor of an inverse that GPTQ and SparseGPT walk along.
//!
//! 1. Reverse rows and columns of `H`; call the result `R`.
//! 2. `R = L Lᵀ`, block by block: a diagonal block is factored in double precision, the panel below
//!    it multiplied by the block's inverse, and the rest updated by the panel.
//! 3. `X = L⁻¹`, one block of rows at a time, in the place of `L`.
//! 4. Reverse `X`: that is `U`, upper triangular, with `H⁻¹ = Uᵀ U`.
//!
//! For with `P` the reversal, `H = P L Lᵀ P = (P L P)(P L P)ᵀ`, and the inverse of the upper
//! triangular `P L P` is `P L⁻¹ P`. One factorization instead of two, and no inverse in between.

use super::{Region, Update, View, gemm};
use crate::Cpu;
use crate::dispatch::for_each_isa;

/// A matrix without a Cholesky factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the matrix is not positive definite at row {pivot}")]
pub struct NotPositive {
    /// The first row, in the order of elimination, that the rows before it determine.
    pub pivot: usize,
}

/// Columns that are eliminated together: by one thread, so not many.
const BLOCK: usize = 96;

/// Replaces the symmetric `h`, `[n, n]` with both triangles, by the upper triangular `U` with
/// `H⁻¹ = Uᵀ U`; what lies below the diagonal becomes zero.
///
/// # Errors
/// [`NotPositive`]; `h` is spoilt then.
///
/// # Panics
/// Where the length is not `n · n`.
pub fn inverse_cholesky_upper(cpu: &Cpu, h: &mut [f32], n: usize) -> Result<(), NotPositive> {
    assert_eq!(h.len(), n * n, "inverse_cholesky_upper: length of the matrix");
    // (1)
    h.reverse();
    // (2)
    let inverses = factor(cpu, h, n).map_err(|error| NotPositive { pivot: n - 1 - error.pivot })?;
    // (3)
    invert(cpu, h, n, &inverses);
    // (4)
    h.reverse();
    Ok(())
}

/// Replaces the lower triangle of the symmetric `a`, `[n, n]`, by the lower triangular `L` with
/// `A = L Lᵀ`; what lies above the diagonal becomes zero.
///
/// # Errors
/// [`NotPositive`]; `a` is spoilt then.
///
/// # Panics
/// Where the length is not `n · n`.
pub fn cholesky(cpu: &Cpu, a: &mut [f32], n: usize) -> Result<(), NotPositive> {
    assert_eq!(a.len(), n * n, "cholesky: length of the matrix");
    factor(cpu, a, n)?;
    for (i, row) in a.chunks_exact_mut(n.max(1)).enumerate() {
        row[i + 1..].fill(0.0);
    }
    Ok(())
}

/// Puts `L` on and below the diagonal of `a`. Results in the inverses of its diagonal blocks,
/// transposed: upper triangular, `BLOCK` rows of `BLOCK` each.
fn factor(cpu: &Cpu, a: &mut [f32], n: usize) -> Result<Vec<f32>, NotPositive> {
    let mut inverses = vec![0.0; n.div_ceil(BLOCK) * BLOCK * BLOCK];
    let mut panel = vec![0.0; n.saturating_sub(BLOCK) * BLOCK];
    let mut work = vec![0.0f64; 2 * BLOCK * BLOCK];
    for (first, inverse) in (0..n).step_by(BLOCK).zip(inverses.chunks_exact_mut(BLOCK * BLOCK)) {
        let last = n.min(first + BLOCK);
        let width = last - first;
        let (block, inverted) = work.split_at_mut(BLOCK * BLOCK);
        // The block's upper triangle is its lower one, transposed.
        for i in 0..width {
            for j in i..width {
                block[i * BLOCK + j] = f64::from(a[(first + j) * n + first + i]);
            }
        }
        factor_upper(cpu.isa(), block, width)
            .map_err(|error| NotPositive { pivot: first + error.pivot })?;
        invert_upper(cpu.isa(), block, inverted, width);
        for i in 0..width {
            for j in i..width {
                a[(first + j) * n + first + i] = block[i * BLOCK + j] as f32;
                inverse[i * BLOCK + j] = inverted[i * BLOCK + j] as f32;
            }
        }
        let below = n - last;
        if below == 0 {
            break;
        }
        let panel = &mut panel[..below * BLOCK];
        panel.fill(0.0);
        let square = View::new(a, n, n).part(last..n, first..last);
        let inverse = View::new(inverse, BLOCK, BLOCK);
        gemm(cpu, Update::Add, square, inverse, panel, BLOCK, Region::Whole);
        for (row, panel) in a[last * n..].chunks_exact_mut(n).zip(panel.chunks_exact(BLOCK)) {
            row[first..last].copy_from_slice(panel);
        }
        let panel = View::new(panel, below, BLOCK);
        let rest = &mut a[last * n + last..];
        gemm(cpu, Update::Subtract, panel, panel.transposed(), rest, n, Region::Lower);
    }
    Ok(inverses)
}

/// Replaces `L` on and below the diagonal by `X = L⁻¹`, and what lies above by zeros.
fn invert(cpu: &Cpu, l: &mut [f32], n: usize, inverses: &[f32]) {
    let mut products = vec![0.0; n * BLOCK];
    for (first, inverse) in (0..n).step_by(BLOCK).zip(inverses.chunks_exact(BLOCK * BLOCK)) {
        let last = n.min(first + BLOCK);
        let width = last - first;
        let inverse = View::new(inverse, BLOCK, BLOCK).part(0..width, 0..width).transposed();
        let (above, rows) = l.split_at_mut(first * n);
        let rows = &mut rows[..width * n];
        if first > 0 {
            // X[rows, ..first] = -L[rows, rows]⁻¹ (L[rows, ..first] X[..first, ..first])
            let products = &mut products[..width * first];
            products.fill(0.0);
            let (x, left) = (View::new(above, first, n), View::new(rows, width, n));
            for start in (0..first).step_by(2 * BLOCK) {
                let end = first.min(start + 2 * BLOCK);
                let (left, x) = (left.part(0..width, start..end), x.part(start..end, 0..end));
                gemm(cpu, Update::Add, left, x, products, first, Region::Whole);
            }
            rows.chunks_exact_mut(n).for_each(|row| row[..first].fill(0.0));
            let products = View::new(products, width, first);
            gemm(cpu, Update::Subtract, inverse, products, rows, n, Region::Whole);
        }
        for (i, row) in rows.chunks_exact_mut(n).enumerate() {
            row[first..].fill(0.0);
            for j in 0..=i {
                row[first + j] = inverse.at(i, j);
            }
        }
    }
}

for_each_isa! {
    /// Replaces the upper triangle of the first `width` rows and columns of `a`, `[BLOCK, BLOCK]`,
    /// by `R` with `A = Rᵀ R`.
    fn factor_upper(a: &mut [f64], width: usize) -> Result<(), NotPositive> {
        for j in 0..width {
            let (done, below) = a.split_at_mut((j + 1) * BLOCK);
            let row = &mut done[j * BLOCK..][..width];
            // Also false for a NaN.
            let positive = row[j] > 0.0 && row[j].is_finite();
            if !positive {
                return Err(NotPositive { pivot: j });
            }
            let inverse = 1.0 / row[j].sqrt();
            row[j..].iter_mut().for_each(|r| *r *= inverse);
            for (i, other) in (j + 1..width).zip(below.chunks_exact_mut(BLOCK)) {
                let factor = row[i];
                for (a, r) in other[i..width].iter_mut().zip(&row[i..]) {
                    *a -= factor * r;
                }
            }
        }
        Ok(())
    }

    /// Writes the inverse of the upper triangular `r` into the upper triangle of `x`.
    fn invert_upper(r: &[f64], x: &mut [f64], width: usize) {
        for i in (0..width).rev() {
            let (above, below) = x.split_at_mut((i + 1) * BLOCK);
            let row = &mut above[i * BLOCK..][..width];
            row[i..].fill(0.0);
            for (k, other) in (i + 1..width).zip(below.chunks_exact(BLOCK)) {
                let factor = r[i * BLOCK + k];
                for (x, other) in row[k..].iter_mut().zip(&other[k..]) {
                    *x -= factor * other;
                }
            }
            let inverse = 1.0 / r[i * BLOCK + i];
            row[i + 1..].iter_mut().for_each(|x| *x *= inverse);
            row[i] = inverse;
        }
    }
}
