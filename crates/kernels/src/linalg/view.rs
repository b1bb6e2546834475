use std::ops::Range;

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

    /// `out[k, i] = (k, first + i)` for the rows `k` of the range and `i` in `0..width`; zero where
    /// the matrix ends before.
    pub(super) fn pack(&self, rows: Range<usize>, first: usize, width: usize, out: &mut [f32]) {
        let there = width.min(self.cols.saturating_sub(first));
        let lines = out.chunks_exact_mut(width);
        if self.col_stride == 1 {
            for (k, line) in rows.zip(lines) {
                line[..there].copy_from_slice(&self.data[k * self.row_stride + first..][..there]);
                line[there..].fill(0.0);
            }
        } else {
            for (k, line) in rows.zip(lines) {
                for (i, value) in line[..there].iter_mut().enumerate() {
                    *value = self.data[k * self.row_stride + (first + i) * self.col_stride];
                }
                line[there..].fill(0.0);
            }
        }
    }
}
