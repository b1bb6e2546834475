use std::ops::Range;

use half::bf16;

use super::transpose::{self, SIDE};
use crate::Isa;

/// A matrix that lies somewhere in a slice: element `(i, j)` is `data[i · row_stride + j · col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix `[rows, cols]`.
    ///
    /// # Panics
    /// Where `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "values of a [{rows}, {cols}] matrix");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transposed matrix.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The part at the given rows and columns.
    ///
    /// # Panics
    /// Where it is not inside the matrix.
    pub fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(
            cols.start <= cols.end && cols.end <= self.cols,
            "columns {cols:?} of {}",
            self.cols
        );
        let (height, width) = (rows.len(), cols.len());
        let data = if height == 0 || width == 0 {
            &[]
        } else {
            let first = rows.start * self.row_stride + cols.start * self.col_stride;
            let last = first + (height - 1) * self.row_stride + (width - 1) * self.col_stride;
            &self.data[first..=last]
        };
        Self { data, rows: height, cols: width, ..self }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The element at row `i`, column `j`.
    ///
    /// # Panics
    /// Where there is none.
    pub fn at(&self, i: usize, j: usize) -> f32 {
        assert!(i < self.rows && j < self.cols, "({i}, {j}) of [{}, {}]", self.rows, self.cols);
        self.data[i * self.row_stride + j * self.col_stride]
    }

    /// [`View::pack`] where a whole panel is there, of a tile whose width the compiler knows: a call to copy
    /// a few values takes longer than copying them.
    fn pack_whole<const WIDTH: usize>(&self, rows: Range<usize>, first: usize, out: &mut [f32]) {
        for (k, line) in rows.zip(out.as_chunks_mut::<WIDTH>().0) {
            let from = &self.data[k * self.row_stride + first..][..WIDTH];
            line.copy_from_slice(from);
        }
    }

    /// `out[k, i] = (k, first + i)` for the rows `k` of the range and `i` in `0..width`; zero where
    /// the matrix ends before.
    pub(super) fn pack(
        &self,
        isa: Isa,
        rows: Range<usize>,
        first: usize,
        width: usize,
        out: &mut [f32],
    ) {
        let there = width.min(self.cols.saturating_sub(first));
        if self.col_stride == 1 {
            match (there == width, width) {
                (true, 6) => self.pack_whole::<6>(rows, first, out),
                (true, 8) => self.pack_whole::<8>(rows, first, out),
                (true, 12) => self.pack_whole::<12>(rows, first, out),
                (true, 16) => self.pack_whole::<16>(rows, first, out),
                (true, 32) => self.pack_whole::<32>(rows, first, out),
                _ => {
                    for (k, line) in rows.zip(out.chunks_exact_mut(width)) {
                        let from = &self.data[k * self.row_stride + first..];
                        line[..there].copy_from_slice(&from[..there]);
                        line[there..].fill(0.0);
                    }
                }
            }
        } else if self.row_stride == 1 {
            // Along what lies side by side.
            let whole = match transpose::is_fast(isa) {
                true => rows.len() / SIDE * SIDE,
                false => 0,
            };
            for i in (0..there).step_by(SIDE) {
                let cols = SIDE.min(there - i);
                for k in (0..whole).step_by(SIDE) {
                    let from = rows.start + k + (first + i) * self.col_stride;
                    let out = &mut out[k * width + i..];
                    transpose::transpose(
                        isa,
                        &self.data[from..],
                        self.col_stride,
                        cols,
                        out,
                        width,
                    );
                }
            }
            for i in 0..there {
                // With bounds checked once for a column.
                let column = &self.data[rows.start + (first + i) * self.col_stride..][..rows.len()];
                let lines = out.chunks_exact_mut(width);
                for (value, line) in column.iter().zip(lines).skip(whole) {
                    line[i] = *value;
                }
            }
            for line in out.chunks_exact_mut(width).take(rows.len()) {
                line[there..].fill(0.0);
            }
        } else {
            let lines = out.chunks_exact_mut(width);
            for (k, line) in rows.zip(lines) {
                for (i, value) in line[..there].iter_mut().enumerate() {
                    *value = self.data[k * self.row_stride + (first + i) * self.col_stride];
                }
                line[there..].fill(0.0);
            }
        }
    }

    /// The same in bf16, the rows `2k` and `2k + 1` in one word, `2k` in its lower half; zero where there is none.
    /// Only where the processor has AVX-512 with BF16.
    pub(super) fn pack_bf16(
        &self,
        rows: Range<usize>,
        first: usize,
        width: usize,
        out: &mut [f32],
    ) {
        let there = width.min(self.cols.saturating_sub(first));
        if self.col_stride == 1 && there > 0 {
            let from = &self.data[rows.start * self.row_stride + first..];
            transpose::interleave(from, self.row_stride, rows.len(), there, out, width);
            return;
        }
        // Rows that whole registers take; the others one by one.
        let mut done_rows = 0;
        if self.row_stride == 1 {
            done_rows = rows.len() / (2 * SIDE) * (2 * SIDE);
            for i in (0..there).step_by(SIDE) {
                let cols = SIDE.min(there - i);
                for k in (0..done_rows).step_by(2 * SIDE) {
                    let from = &self.data[rows.start + k + (first + i) * self.col_stride..];
                    let out = &mut out[k / 2 * width + i..];
                    transpose::transpose_bf16(from, self.col_stride, cols, out, width);
                }
            }
        }
        let bits = |k: usize, i: usize| match k < rows.end {
            true => {
                let at = k * self.row_stride + (first + i) * self.col_stride;
                u32::from(bf16::from_f32(self.data[at]).to_bits())
            }
            false => 0,
        };
        for (k, line) in rows.clone().step_by(2).zip(out.chunks_exact_mut(width)) {
            if k - rows.start >= done_rows {
                for (i, word) in line[..there].iter_mut().enumerate() {
                    *word = f32::from_bits(bits(k, i) | bits(k + 1, i) << 16);
                }
            }
            if there < width {
                line[there..].fill(0.0);
            }
        }
    }
}
