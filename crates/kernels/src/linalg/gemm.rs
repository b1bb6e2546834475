//! Matrix products, blocked for caches: both factors are packed into panels as wide as a tile of
//! the result, [`DEPTH`] of their common dimension at a time.

use std::cell::Cell;
use std::ops::Range;

use bevel_base::AlignedVec;

use super::View;
use super::tile::{self, Factors, MOST, Shape};
use crate::Cpu;

/// What becomes of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// `C += A · B`
    Add,
    /// `C −= A · B`
    Subtract,
    /// `C = A · B`
    Set,
}

/// Which elements of the result are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// All.
    Whole,
    /// Those on and below the diagonal. Others may be written or not.
    Lower,
}

/// How much of the common dimension is packed at a time: a panel of `B` stays in the first cache.
/// Sums are cut here, and nowhere else.
const DEPTH: usize = 256;

/// The same for factors in bf16, at most: the run is cut into equal parts, and a panel of `A` stays in the first cache.
const DEPTH_BF16: usize = 1024;

/// Rows and columns of the result that one task computes, about: the panels of `A` stay in the
/// second cache.
const TASK: (usize, usize) = (192, 512);

/// Tasks for each thread, where there is enough to do, so that none is idle for long at the end.
const SPREAD: usize = 4;

/// Panels that one task packs.
const PACKED: usize = 8;

/// `C ±= A · B`, with `A` `[m, k]`, `B` `[k, n]`, and `C` `[m, n]` in rows that begin `stride` values
/// apart in `c`.
///
/// Every element is a sum of chains of [`f32::mul_add`] over 256 of `k` each: the same bits on every
/// instruction set and number of threads.
///
/// # Panics
/// Where the dimensions do not fit.
pub fn gemm(
    cpu: &Cpu,
    update: Update,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
    region: Region,
) {
    product(cpu, Factors::F32, update, a, b, c, stride, region);
}

/// [`gemm`] of factors that are rounded to bf16, added up in single precision: twice as fast where
/// [`Isa::has_bf16_products`](crate::Isa::has_bf16_products). Elsewhere it is [`gemm`], and rounds nothing.
///
/// # Panics
/// Where the dimensions do not fit.
pub fn gemm_bf16(
    cpu: &Cpu,
    update: Update,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
) {
    let factors = if cpu.isa().has_bf16_products() { Factors::Bf16 } else { Factors::F32 };
    product(cpu, factors, update, a, b, c, stride, Region::Whole);
}

#[allow(clippy::too_many_arguments)] // Those of a product.
fn product(
    cpu: &Cpu,
    factors: Factors,
    update: Update,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
    region: Region,
) {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    assert_eq!(k, b.rows(), "gemm: common dimension");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= c.len(), "gemm: [{m}, {n}] in {}", c.len());
    if k == 0 {
        if update == Update::Set {
            c.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let shape = tile::shape(cpu.isa(), m);
    let depth = match factors {
        Factors::F32 => k.min(DEPTH),
        Factors::Bf16 => k.div_ceil(k.div_ceil(DEPTH_BF16)).next_multiple_of(2),
    };
    let (tall, wide) = (m.div_ceil(shape.rows), n.div_ceil(shape.cols));
    let words = factors.words(depth);
    let (left_len, right_len) = (tall * shape.rows * words, wide * shape.cols * words);
    let mut panels = PANELS.replace(AlignedVec::zeroed(0));
    if panels.len() < left_len + right_len {
        panels = AlignedVec::zeroed(left_len + right_len);
    }
    // First those that are read as vectors, so that they are aligned.
    let (right, left) = panels.split_at_mut(right_len);
    let out = Output { values: c.as_mut_ptr(), stride, m, n, region };
    for first in (0..k).step_by(depth) {
        let range = first..k.min(first + depth);
        let words = factors.words(range.len());
        let left = &mut left[..tall * shape.rows * words];
        let right = &mut right[..wide * shape.cols * words];
        pack(cpu, factors, a.transposed(), range.clone(), shape.rows, left);
        pack(cpu, factors, b, range, shape.cols, right);
        let update = match update {
            Update::Set if first > 0 => Update::Add,
            update => update,
        };
        multiply(cpu, factors, update, shape, words, left, right, &out);
    }
    PANELS.set(panels);
}

thread_local! {
    /// Room for packed panels, as large as the largest product of this thread needed: there are many
    /// small products, and fresh memory has to be zeroed.
    static PANELS: Cell<AlignedVec<f32>> = Cell::new(AlignedVec::zeroed(0));
}

/// Packs rows of `matrix` into panels of `width` columns.
fn pack(
    cpu: &Cpu,
    factors: Factors,
    matrix: View<'_>,
    rows: Range<usize>,
    width: usize,
    panels: &mut [f32],
) {
    let len = factors.words(rows.len()) * width;
    cpu.pool().run_chunks(panels, PACKED * len, |task, panels| {
        for (i, panel) in panels.chunks_exact_mut(len).enumerate() {
            let first = (task * PACKED + i) * width;
            match factors {
                Factors::F32 => matrix.pack(cpu.isa(), rows.clone(), first, width, panel),
                Factors::Bf16 => matrix.pack_bf16(rows.clone(), first, width, panel),
            }
        }
    });
}

/// `C` as its tasks see it.
struct Output {
    values: *mut f32,
    stride: usize,
    m: usize,
    n: usize,
    region: Region,
}

// SAFETY: tasks write to disjoint tiles.
unsafe impl Sync for Output {}

/// Adds the product of packed panels, `words` deep.
#[allow(clippy::too_many_arguments)] // Those of a product.
fn multiply(
    cpu: &Cpu,
    factors: Factors,
    update: Update,
    shape: Shape,
    words: usize,
    left: &[f32],
    right: &[f32],
    out: &Output,
) {
    let (a_len, b_len) = (shape.rows * words, shape.cols * words);
    let (tall, wide) = (left.len() / a_len, right.len() / b_len);
    let (task_tall, mut task_wide) = (TASK.0 / shape.rows, TASK.1 / shape.cols);
    let tall_tasks = tall.div_ceil(task_tall);
    while task_wide > 1 && tall_tasks * wide.div_ceil(task_wide) < SPREAD * cpu.pool().threads() {
        task_wide /= 2;
    }
    let tasks = (tall_tasks, wide.div_ceil(task_wide));
    cpu.pool().run(tasks.0 * tasks.1, |task| {
        // The last rows have the most to do where only the lower triangle is wanted: first things
        // first.
        let (row, col) = (tasks.0 - 1 - task / tasks.1, task % tasks.1);
        let sign = if update == Update::Subtract { -1.0 } else { 1.0 };
        for j in col * task_wide..wide.min((col + 1) * task_wide) {
            for i in row * task_tall..tall.min((row + 1) * task_tall) {
                let (top, side) = (i * shape.rows, j * shape.cols);
                if out.region == Region::Lower && top + shape.rows <= side {
                    continue;
                }
                let (a, b) = (&left[i * a_len..][..a_len], &right[j * b_len..][..b_len]);
                let (height, width) = (shape.rows.min(out.m - top), shape.cols.min(out.n - side));
                if update == Update::Set {
                    for i in 0..height {
                        // SAFETY: inside `c`, which `gemm` borrows mutably and checked for length; tiles of different
                        // `(i, j)` do not overlap.
                        unsafe {
                            let start = out.values.add((top + i) * out.stride + side);
                            std::slice::from_raw_parts_mut(start, width).fill(0.0);
                        }
                    }
                }
                if (height, width) == (shape.rows, shape.cols) {
                    // SAFETY: the tile lies inside `c`, as above; a `Cpu` carries an instruction set
                    // only where the processor has it.
                    unsafe {
                        let place = out.values.add(top * out.stride + side);
                        tile::accumulate(cpu.isa(), factors, shape, a, b, sign, place, out.stride);
                    }
                    continue;
                }
                // A tile that reaches over the edge.
                let mut sums = [0.0; MOST];
                // SAFETY: there is room for any tile; for the processor as above.
                unsafe {
                    let (place, stride) = (sums.as_mut_ptr(), shape.cols);
                    tile::accumulate(cpu.isa(), factors, shape, a, b, sign, place, stride);
                }
                for (i, sums) in sums.chunks_exact(shape.cols).take(height).enumerate() {
                    // SAFETY: inside `c`, as above.
                    let line = unsafe {
                        let start = out.values.add((top + i) * out.stride + side);
                        std::slice::from_raw_parts_mut(start, width)
                    };
                    line.iter_mut().zip(sums).for_each(|(c, s)| *c += s);
                }
            }
        }
    });
}
