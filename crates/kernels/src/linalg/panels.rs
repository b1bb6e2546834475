//! Factors of products, packed as kernels read them: in panels as wide as a tile of the result, along the common
//! dimension.

use std::ops::Range;

use bevel_base::AlignedVec;

use super::View;
use super::tile::{self, Factors, Shape};
use super::transpose;
use crate::{Cpu, Isa};

/// A matrix whose rows can be read, though they may not lie in memory as numbers.
pub trait Rows: Sync {
    /// How many there are.
    fn rows(&self) -> usize;

    /// Values of each.
    fn cols(&self) -> usize;

    /// Writes row `index` into `out`, `[cols]`.
    fn read(&self, index: usize, out: &mut [f32]);
}

/// What products multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Numbers rounded to bf16, added up in single precision: twice as fast where
    /// [`Isa::has_bf16_products`](crate::Isa::has_bf16_products). Single precision elsewhere.
    #[default]
    Bf16,
    /// Single-precision numbers.
    Single,
}

/// How much of the common dimension is multiplied at a time: a panel of `B` stays in the first cache. Sums are cut here,
/// and nowhere else.
const DEPTH: usize = 256;

/// The same for factors in bf16, at most: it is cut into equal parts, and a panel of `A` stays in the first cache.
const DEPTH_BF16: usize = 1024;

/// Panels that one task packs, at most.
const PACKED: usize = 8;

/// Words that one thread packs faster than several could begin to.
const ALONE: usize = 16 << 10;

/// Rows that one task reads, to pack them as rows of `B`.
const READ: usize = 16;

/// One factor, packed. Its memory is used again by the next.
#[derive(Default)]
pub struct Panels {
    words: AlignedVec<f32>,
    pub(super) factors: Factors,
    /// Columns of a panel.
    pub(super) width: usize,
    /// Columns of all.
    pub(super) count: usize,
    /// Length of the common dimension.
    pub(super) k: usize,
}

impl Precision {
    pub(super) fn factors(self, isa: Isa) -> Factors {
        match self {
            Self::Bf16 if isa.has_bf16_products() => Factors::Bf16,
            _ => Factors::F32,
        }
    }
}

impl Factors {
    /// How `k` is cut.
    pub(super) fn depth(self, k: usize) -> usize {
        match self {
            Self::F32 => k.clamp(1, DEPTH),
            Self::Bf16 => k.div_ceil(k.div_ceil(DEPTH_BF16).max(1)).next_multiple_of(2).max(2),
        }
    }
}

impl Panels {
    /// What every panel's width divides.
    pub const WIDTHS: usize = 96;

    /// Packs the left factor of a product, `[m, k]`.
    pub fn pack_left(&mut self, cpu: &Cpu, precision: Precision, a: View<'_>) {
        let Shape { rows, .. } = tile::shape(cpu.isa(), a.rows(), usize::MAX);
        self.pack(cpu, precision.factors(cpu.isa()), a.transposed(), rows);
    }

    /// Packs the right factor of a product, `[k, n]`.
    pub fn pack_right(&mut self, cpu: &Cpu, precision: Precision, b: View<'_>) {
        let Shape { cols, .. } = tile::shape(cpu.isa(), usize::MAX, b.cols());
        self.pack(cpu, precision.factors(cpu.isa()), b, cols);
    }

    /// Packs the transpose of some rows of a matrix as the right factor of a product: a row has the common dimension.
    pub fn pack_turned_rows(
        &mut self,
        cpu: &Cpu,
        precision: Precision,
        matrix: &dyn Rows,
        rows: Range<usize>,
    ) {
        let Shape { cols: width, .. } = tile::shape(cpu.isa(), usize::MAX, matrix.rows());
        let (factors, k) = (precision.factors(cpu.isa()), matrix.cols());
        let panels = self.resize(factors, width, rows.len(), k);
        let words = factors.words(k);
        cpu.pool().run_chunks(panels, words * width, |panel, out| {
            let first = rows.start + panel * width;
            let there = width.min(rows.end - first);
            with_scratch(k + there * words, |scratch| {
                let (row, lines) = scratch.split_at_mut(k);
                for (i, line) in lines.chunks_exact_mut(words).enumerate() {
                    factors.read(matrix, first + i, row, line);
                }
                // A word is a word, whatever it holds.
                let lines = View::new(lines, there, words).transposed();
                lines.pack(cpu.isa(), 0..words, 0, width, out);
            });
        });
    }

    /// Packs some rows of a matrix as the right factor of a product: there are as many as the common dimension has.
    pub fn pack_rows(
        &mut self,
        cpu: &Cpu,
        precision: Precision,
        matrix: &dyn Rows,
        rows: Range<usize>,
    ) {
        let (cols, k) = (matrix.cols(), rows.len());
        let Shape { cols: width, .. } = tile::shape(cpu.isa(), usize::MAX, cols);
        let factors = precision.factors(cpu.isa());
        let panels = Everywhere(self.resize(factors, width, cols, k).as_mut_ptr());
        let (len, line) = (factors.words(k) * width, factors.words(cols));
        cpu.pool().run(k.div_ceil(READ), |task| {
            let part = task * READ..k.min((task + 1) * READ);
            with_scratch(cols + part.len() * line, |scratch| {
                let (row, lines) = scratch.split_at_mut(cols);
                for (i, line) in lines.chunks_exact_mut(line).enumerate() {
                    factors.read(matrix, rows.start + part.start + i, row, line);
                }
                for panel in 0..cols.div_ceil(width) {
                    let start = panel * len + factors.words(part.start) * width;
                    let words = factors.words(part.len()) * width;
                    // SAFETY: tasks write disjoint words of the panels, which are borrowed mutably.
                    let out = unsafe { std::slice::from_raw_parts_mut(panels.at(start), words) };
                    let first = panel * width;
                    match factors {
                        Factors::F32 => {
                            let lines = View::new(lines, part.len(), cols);
                            lines.pack(cpu.isa(), 0..part.len(), first, width, out);
                        }
                        Factors::Bf16 => {
                            let there = width.min(cols - first);
                            transpose::interleave_rounded(lines, line, first, there, out, width);
                        }
                    }
                }
            });
        });
    }

    /// Packs columns of `matrix`, `[k, count]`.
    pub(super) fn pack(&mut self, cpu: &Cpu, factors: Factors, matrix: View<'_>, width: usize) {
        let (k, count) = (matrix.rows(), matrix.cols());
        let panels = self.resize(factors, width, count, k);
        let len = factors.words(k) * width;
        if panels.is_empty() {
            return;
        }
        // So that there is something for each thread, where that is worth it.
        let each = match panels.len() <= ALONE {
            true => count.div_ceil(width),
            false => PACKED.min(count.div_ceil(width).div_ceil(2 * cpu.pool().threads())),
        };
        cpu.pool().run_chunks(panels, each * len, |task, panels| {
            let first = task * each;
            for (i, panel) in panels.chunks_exact_mut(len).enumerate() {
                factors.pack(cpu.isa(), matrix, 0..k, (first + i) * width, width, panel);
            }
        });
    }

    fn resize(&mut self, factors: Factors, width: usize, count: usize, k: usize) -> &mut [f32] {
        (self.factors, self.width, self.count, self.k) = (factors, width, count, k);
        let len = count.div_ceil(width) * factors.words(k) * width;
        if self.words.len() < len {
            self.words = AlignedVec::zeroed(len);
        }
        &mut self.words[..len]
    }

    /// Panels there are.
    pub(super) fn panels(&self) -> usize {
        self.count.div_ceil(self.width)
    }

    /// A panel's part along the common dimension, from `first` on, which is even.
    pub(super) fn part(&self, panel: usize, k: Range<usize>) -> &[f32] {
        let start = panel * self.factors.words(self.k) + self.factors.words(k.start);
        &self.words[start * self.width..][..self.factors.words(k.len()) * self.width]
    }
}

impl Factors {
    /// A row of `matrix` in words: neighbours in one word where a word has two. `row` is room for it.
    fn read(self, matrix: &dyn Rows, index: usize, row: &mut [f32], line: &mut [f32]) {
        match self {
            Self::F32 => matrix.read(index, line),
            Self::Bf16 => {
                matrix.read(index, row);
                transpose::round_bf16(row, line);
            }
        }
    }

    /// Packs a panel of `width` columns from `first` on.
    pub(super) fn pack(
        self,
        isa: Isa,
        matrix: View<'_>,
        rows: Range<usize>,
        first: usize,
        width: usize,
        out: &mut [f32],
    ) {
        match self {
            Self::F32 => matrix.pack(isa, rows, first, width, out),
            Self::Bf16 => matrix.pack_bf16(rows, first, width, out),
        }
    }
}

impl std::fmt::Debug for Panels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "panels of [{}, {}]", self.k, self.count)
    }
}

/// Where tasks write.
struct Everywhere(*mut f32);

// SAFETY: tasks write to disjoint places.
unsafe impl Sync for Everywhere {}

impl Everywhere {
    /// # Safety
    /// The place lies inside the buffer.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's word.
        unsafe { self.0.add(offset) }
    }
}

thread_local! {
    static SCRATCH: std::cell::Cell<Vec<f32>> = const { std::cell::Cell::new(Vec::new()) };
}

/// Calls `work` with so many values, of this thread, whatever they are.
fn with_scratch(len: usize, work: impl FnOnce(&mut [f32])) {
    let mut values = SCRATCH.take();
    values.resize(values.len().max(len), 0.0);
    work(&mut values[..len]);
    SCRATCH.set(values);
}
