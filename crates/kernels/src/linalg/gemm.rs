//! Matrix products, blocked for caches: both factors are packed into panels as wide as a tile of the result.

use std::cell::Cell;

use bevel_base::AlignedVec;

use super::View;
use super::panels::{Panels, Precision};
use super::tile::{self, Factors, MOST, Shape};
use crate::{Cpu, Isa};

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

impl Update {
    /// A sum's effect on an element.
    pub(super) fn apply(self, c: &mut f32, sum: f32) {
        match self {
            Self::Add => *c += sum,
            Self::Subtract => *c -= sum,
            Self::Set => *c = sum,
        }
    }

    /// The same for what comes after the first part of a sum.
    pub(super) fn next(self) -> Self {
        match self {
            Self::Set => Self::Add,
            update => update,
        }
    }
}

/// Which elements of the result are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// All.
    Whole,
    /// Those on and below the diagonal. Others may be written or not.
    Lower,
}

/// Rows and columns of the result that one task computes, about: the panels of `A` stay in the
/// second cache.
const TASK: (usize, usize) = (192, 512);

/// Tasks for each thread, where there is enough to do, so that none is idle for long at the end.
const SPREAD: usize = 4;

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
    product(cpu, Precision::Single, update, a, b, c, stride, region);
}

/// [`gemm`] of the whole result in a precision: the same bits on every number of threads, but not on every instruction set
/// where factors are rounded.
///
/// # Panics
/// Where the dimensions do not fit.
pub fn gemm_in(
    cpu: &Cpu,
    precision: Precision,
    update: Update,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
) {
    product(cpu, precision, update, a, b, c, stride, Region::Whole);
}

#[allow(clippy::too_many_arguments)] // Those of a product.
fn product(
    cpu: &Cpu,
    precision: Precision,
    update: Update,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
    region: Region,
) {
    let k = a.cols();
    assert_eq!(k, b.rows(), "gemm: common dimension");
    let (mut left, mut right) = PANELS.take();
    // So much of the common dimension that packed factors take little memory.
    let step = precision.factors(cpu.isa()).depth(k);
    for first in (0..k.max(1)).step_by(step) {
        let range = first..k.min(first + step);
        left.pack_left(cpu, precision, a.part(0..a.rows(), range.clone()));
        right.pack_right(cpu, precision, b.part(range, 0..b.cols()));
        let update = if first > 0 { update.next() } else { update };
        let term = Term { left: &left, right: &right, first: 0, column: 0 };
        multiply_region(cpu, update, &[term], c, stride, region);
    }
    PANELS.set((left, right));
}

thread_local! {
    /// Room for packed panels, as large as the largest product of this thread needed: there are many
    /// small products, and fresh memory has to be zeroed.
    static PANELS: Cell<(Panels, Panels)> = Cell::default();
}

/// A product of packed factors, or one of several that are added up.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// `A`
    pub left: &'a Panels,
    /// `B`
    pub right: &'a Panels,
    /// Where the common dimension of `B` begins in that of `A`, of which `B` may be a part: an even number.
    pub first: usize,
    /// The column of `B` that makes the first of the result: a multiple of [`Panels::WIDTHS`].
    pub column: usize,
}

impl<'a> Term<'a> {
    /// `A · B`
    pub fn new(left: &'a Panels, right: &'a Panels) -> Self {
        Self { left, right, first: 0, column: 0 }
    }
}

/// `C ±= Σ A · B`, as [`gemm`] has it, of factors that are packed already. `C` has as many columns as the first term's `B`
/// from its [`Term::column`] on; where there is no term it stays as it is.
///
/// # Panics
/// Where the dimensions do not fit, or the factors are packed in different precisions or for another instruction set.
pub fn multiply(cpu: &Cpu, update: Update, terms: &[Term<'_>], c: &mut [f32], stride: usize) {
    multiply_region(cpu, update, terms, c, stride, Region::Whole);
}

/// `C` as its tasks see it.
struct Output(*mut f32);

// SAFETY: tasks write to disjoint tiles.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// The place lies inside `C`.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's word.
        unsafe { self.0.add(offset) }
    }
}

fn multiply_region(
    cpu: &Cpu,
    update: Update,
    terms: &[Term<'_>],
    c: &mut [f32],
    stride: usize,
    region: Region,
) {
    let Some(Term { left, right, column, .. }) = terms.first() else { return };
    let (m, n, factors) = (left.count, right.count.saturating_sub(*column), left.factors);
    let shape = Shape { rows: left.width, cols: right.width };
    for Term { left, right, first, column } in terms {
        assert_eq!([left.factors, right.factors], [factors; 2], "factors of one kind");
        let whole = *first == 0 && right.k == left.k;
        let part = first.is_multiple_of(2) && first + right.k <= left.k;
        assert!(whole || part, "gemm: common dimension");
        assert!(left.count == m && column + n <= right.count, "terms of one shape");
        assert!(column.is_multiple_of(right.width), "whole panels");
        assert_eq!([left.width, right.width], [shape.rows, shape.cols], "panels of one width");
    }
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= c.len(), "gemm: [{m}, {n}] in {}", c.len());
    // Kernels trust in it: tiles of another instruction set's shape would be written outside of `c`.
    assert!(tile::has_shape(cpu.isa(), shape), "panels packed for this instruction set");
    let (tall, wide) = (left.panels(), n.div_ceil(shape.cols));
    let tall_tasks = tall.div_ceil(TASK.0 / shape.rows);
    let (task_tall, mut task_wide) = (tall.div_ceil(tall_tasks), TASK.1 / shape.cols);
    while task_wide > 1 && tall_tasks * wide.div_ceil(task_wide) < SPREAD * cpu.pool().threads() {
        task_wide /= 2;
    }
    let tasks = (tall.div_ceil(task_tall), wide.div_ceil(task_wide));
    let out = Output(c.as_mut_ptr());
    cpu.pool().run(tasks.0 * tasks.1, |task| {
        let (row, col) = match region {
            // A thread takes neighbouring tasks: those of the panels of `B` that it packed.
            Region::Whole => (task % tasks.0, task / tasks.0),
            // The last rows have the most to do: first things first.
            Region::Lower => (tasks.0 - 1 - task / tasks.1, task % tasks.1),
        };
        let (tops, sides) = (
            row * task_tall..tall.min((row + 1) * task_tall),
            col * task_wide..wide.min((col + 1) * task_wide),
        );
        let mut update = update;
        for Term { left, right, first, column } in terms {
            let depth = factors.depth(right.k);
            // A product along nothing is 0, which is to be written as well.
            for start in (0..right.k.max(1)).step_by(depth) {
                let range = start..right.k.min(start + depth);
                for j in sides.clone() {
                    let b = right.part(column / shape.cols + j, range.clone());
                    for i in tops.clone() {
                        let (top, side) = (i * shape.rows, j * shape.cols);
                        if region == Region::Lower && top + shape.rows <= side {
                            continue;
                        }
                        let a = left.part(i, first + range.start..first + range.end);
                        let (height, width) = (shape.rows.min(m - top), shape.cols.min(n - side));
                        // SAFETY: the tile lies inside `c`, which is borrowed mutably and was checked for length; those
                        // of different tasks do not overlap; a `Cpu` carries an instruction set only where the
                        // processor has it.
                        unsafe {
                            let place = out.at(top * stride + side);
                            let (isa, size) = (cpu.isa(), (height, width));
                            put_tile(isa, factors, shape, a, b, update, place, stride, size);
                        }
                    }
                }
                update = update.next();
            }
        }
    });
}

/// Puts a tile of a product into `C`, of which so many rows and columns are there.
///
/// # Safety
/// These lie at `place`, in rows that begin `stride` values apart, nobody else looks at them, and the processor has `isa`.
#[allow(clippy::too_many_arguments)] // Those of a product.
unsafe fn put_tile(
    isa: Isa,
    factors: Factors,
    shape: Shape,
    a: &[f32],
    b: &[f32],
    update: Update,
    place: *mut f32,
    stride: usize,
    (height, width): (usize, usize),
) {
    if (height, width) == (shape.rows, shape.cols) {
        // SAFETY: the caller's word.
        unsafe { tile::accumulate(isa, factors, shape, a, b, update, place, stride) };
        return;
    }
    // A tile that reaches over the edge.
    let mut sums = [0.0; MOST];
    // SAFETY: there is room for any tile; for the processor the caller's word.
    unsafe {
        tile::accumulate(isa, factors, shape, a, b, Update::Set, sums.as_mut_ptr(), shape.cols);
    }
    for (i, sums) in sums.chunks_exact(shape.cols).take(height).enumerate() {
        // SAFETY: the caller's word.
        let line = unsafe { std::slice::from_raw_parts_mut(place.add(i * stride), width) };
        line.iter_mut().zip(sums).for_each(|(c, sum)| update.apply(c, *sum));
    }
}

/// `C += A · B` on this thread alone, for factors that are small: in single precision every element is one chain of
/// [`f32::mul_add`]. `panels` is room that is used again.
///
/// # Panics
/// Where the dimensions do not fit.
#[allow(clippy::too_many_arguments)] // Those of a product.
pub(crate) fn multiply_alone(
    isa: Isa,
    precision: Precision,
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    stride: usize,
    panels: &mut AlignedVec<f32>,
) {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    assert_eq!(k, b.rows(), "common dimension");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= c.len(), "[{m}, {n}] in {}", c.len());
    let (factors, shape) = (precision.factors(isa), tile::shape(isa, m, n));
    let words = factors.words(k);
    let (a_len, b_len) = (shape.rows * words, shape.cols * words);
    let tall = m.div_ceil(shape.rows);
    if panels.len() < tall * a_len + b_len {
        *panels = AlignedVec::zeroed(tall * a_len + b_len);
    }
    let (right, left) = panels.split_at_mut(b_len);
    for (i, panel) in left.chunks_exact_mut(a_len.max(1)).take(tall).enumerate() {
        factors.pack(isa, a.transposed(), 0..k, i * shape.rows, shape.rows, panel);
    }
    for side in (0..n).step_by(shape.cols) {
        factors.pack(isa, b, 0..k, side, shape.cols, right);
        for (i, panel) in left.chunks_exact(a_len.max(1)).take(tall).enumerate() {
            let top = i * shape.rows;
            let size = (shape.rows.min(m - top), shape.cols.min(n - side));
            let place = c[top * stride + side..].as_mut_ptr();
            // SAFETY: `c` was checked for length and is borrowed mutably; callers have `isa` from a `Cpu`.
            unsafe {
                put_tile(isa, factors, shape, panel, right, Update::Add, place, stride, size);
            }
        }
    }
}
