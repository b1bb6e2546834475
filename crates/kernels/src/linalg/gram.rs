//! What calibration adds up over tokens.

use super::{Region, Update, View, gemm};
use crate::Cpu;
use crate::dispatch::for_each_isa;

/// Adds `xᵀ x` to `out`, `[cols, cols]`, for the `n` rows of `x`, `[n, cols]`: on and below the
/// diagonal; what lies above is not defined until [`mirror`].
///
/// # Panics
/// Where the lengths do not fit `n` and `cols`.
pub fn gram(cpu: &Cpu, x: &[f32], n: usize, cols: usize, out: &mut [f32]) {
    assert_eq!(out.len(), cols * cols, "gram: length of the result");
    let x = View::new(x, n, cols);
    gemm(cpu, Update::Add, x.transposed(), x, out, cols, Region::Lower);
}

/// Columns that one task of [`mirror`] and [`column_sums`] takes care of.
const STRIP: usize = 64;

/// Copies the part of a `[n, n]` matrix below the diagonal to above it.
///
/// # Panics
/// Where the length is not `n · n`.
pub fn mirror(cpu: &Cpu, matrix: &mut [f32], n: usize) {
    assert_eq!(matrix.len(), n * n, "mirror: length of the matrix");
    let values = Shared(matrix.as_mut_ptr());
    cpu.pool().run(n.div_ceil(STRIP), |strip| {
        let rows = strip * STRIP..n.min((strip + 1) * STRIP);
        for first in (rows.start..n).step_by(STRIP) {
            for i in rows.clone() {
                for j in first.max(i + 1)..n.min(first + STRIP) {
                    // SAFETY: only places above the diagonal are written, each by the task of its
                    // row, and only places below it are read.
                    unsafe { *values.get().add(i * n + j) = *values.get().add(j * n + i) };
                }
            }
        }
    });
}

/// A pointer that tasks share.
struct Shared<T>(*mut T);

// SAFETY: tasks write to disjoint places.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

/// Adds to each column's sums over the `n` rows of `x`, `[n, cols]`: `Σ x²`, `Σ |x|` and the largest
/// `|x|`. The same bits on every instruction set.
///
/// # Panics
/// Where the lengths do not fit `n` and `cols`.
pub fn column_sums(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    cols: usize,
    squares: &mut [f64],
    magnitudes: &mut [f64],
    largest: &mut [f32],
) {
    assert_eq!(x.len(), n * cols, "column_sums: length of x");
    let lengths = (squares.len(), magnitudes.len(), largest.len());
    assert_eq!(lengths, (cols, cols, cols), "column_sums: lengths of the sums");
    let (squares, magnitudes) = (Shared(squares.as_mut_ptr()), Shared(magnitudes.as_mut_ptr()));
    let largest = Shared(largest.as_mut_ptr());
    cpu.pool().run(cols.div_ceil(STRIP), |strip| {
        let first = strip * STRIP;
        let width = STRIP.min(cols - first);
        // SAFETY: strips of different tasks do not overlap and lie inside the sums, which this call
        // borrows mutably.
        let (squares, magnitudes, largest) = unsafe {
            (
                std::slice::from_raw_parts_mut(squares.get().add(first), width),
                std::slice::from_raw_parts_mut(magnitudes.get().add(first), width),
                std::slice::from_raw_parts_mut(largest.get().add(first), width),
            )
        };
        strip_sums(cpu.isa(), &x[first..], cols, squares, magnitudes, largest);
    });
}

for_each_isa! {
    fn strip_sums(
        x: &[f32],
        stride: usize,
        squares: &mut [f64],
        magnitudes: &mut [f64],
        largest: &mut [f32],
    ) {
        for row in x.chunks(stride) {
            let sums = squares.iter_mut().zip(&mut *magnitudes).zip(&mut *largest);
            for (&x, ((square, magnitude), largest)) in row.iter().zip(sums) {
                let size = x.abs();
                *square += f64::from(x) * f64::from(x);
                *magnitude += f64::from(size);
                *largest = if size > *largest { size } else { *largest };
            }
        }
    }
}
