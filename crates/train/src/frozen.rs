use std::borrow::Cow;
use std::ops::Range;

use bevel_base::{DType, GroupedMatrix, pack};
use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Update, View};
use bevel_model::{Checkpoint, Error, Result};

use crate::room::Precision;

/// Values that are unpacked together: with fewer the other factor would be packed for products again and again.
const TILE: usize = 1 << 20;

/// A matrix `[out, in]` that is not trained, as its file has it. Rows are unpacked to single precision as they are
/// needed, so products are those of the dequantized model.
#[derive(Debug)]
pub struct Frozen<'c> {
    source: Source<'c>,
    rows: usize,
    cols: usize,
}

#[derive(Debug)]
enum Source<'c> {
    /// Rows of a type, of so many bytes each.
    Stored { dtype: DType, bytes: Cow<'c, [u8]>, first: usize, row_bytes: usize },
    /// Codes in groups, the matrix's own beginning at row `first`.
    Codes { matrix: Box<GroupedMatrix>, first: usize },
}

impl<'c> Frozen<'c> {
    /// The tensor `name` of a checkpoint, or some of its rows.
    ///
    /// # Errors
    /// Those of reading it, and [`Error::Tensor`] for a type that cannot be unpacked.
    pub fn load(
        checkpoint: &'c Checkpoint,
        name: &str,
        rows: Option<Range<usize>>,
    ) -> Result<Self> {
        let entry = checkpoint.entry(name)?;
        let dims = entry.shape.dims();
        let (&cols, outer) = dims.split_last().expect("checked shapes have dimensions");
        let total = outer.iter().product();
        let rows = rows.unwrap_or(0..total);
        let source = match checkpoint.read_grouped(name, 0)? {
            Some(matrix) => Source::Codes { matrix: Box::new(matrix), first: rows.start },
            None => {
                let bytes = checkpoint.read(name)?;
                let row_bytes = bytes.len() / total;
                Source::Stored { dtype: entry.dtype, bytes, first: rows.start, row_bytes }
            }
        };
        let frozen = Self { source, rows: rows.len(), cols };
        // What fails for one row fails for all.
        let mut row = vec![0.0; cols];
        frozen.unpack_row(0, &mut row).map_err(|source| Error::Tensor {
            path: checkpoint.path().to_owned(),
            tensor: name.to_owned(),
            source,
        })?;
        Ok(frozen)
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `index`, `[in]`.
    ///
    /// # Panics
    /// Where there is no such row.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        self.unpack_row(index, out).expect("the first row could be unpacked");
    }

    fn unpack_row(&self, index: usize, out: &mut [f32]) -> bevel_base::Result<()> {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        match &self.source {
            Source::Codes { matrix, first } => {
                matrix.dequantize_row(first + index, out);
                Ok(())
            }
            Source::Stored { dtype, bytes, first, row_bytes } => {
                let row = &bytes[(first + index) * row_bytes..][..*row_bytes];
                pack::dequantize(*dtype, row, out)
            }
        }
    }

    /// `y = x Wᵀ` for `n` rows: `y` is `[n, out]`, `x` is `[n, in]`.
    ///
    /// # Panics
    /// Where the lengths do not fit.
    pub fn forward(
        &self,
        cpu: &Cpu,
        precision: Precision,
        y: &mut [f32],
        x: &[f32],
        n: usize,
        tile: &mut Vec<f32>,
    ) {
        assert_eq!((y.len(), x.len()), (n * self.rows, n * self.cols), "forward: lengths");
        if n == 0 {
            return;
        }
        let x = View::new(x, n, self.cols);
        self.for_each_tile(cpu, tile, |rows, weights| {
            let weights = View::new(weights, rows.len(), self.cols).transposed();
            let y = &mut y[rows.start..];
            precision.product_in(cpu, Update::Set, x, weights, y, self.rows);
        });
    }

    /// `d_x = d_y W` or `d_x += d_y W` for `n` rows: `d_x` is `[n, in]`, `d_y` is `[n, out]`.
    ///
    /// # Panics
    /// Where the lengths do not fit.
    #[allow(clippy::too_many_arguments)] // Those of a product.
    pub fn backward(
        &self,
        cpu: &Cpu,
        precision: Precision,
        update: Update,
        d_x: &mut [f32],
        d_y: &[f32],
        n: usize,
        tile: &mut Vec<f32>,
    ) {
        assert_eq!((d_y.len(), d_x.len()), (n * self.rows, n * self.cols), "backward: lengths");
        if n == 0 {
            return;
        }
        let d_y = View::new(d_y, n, self.rows);
        self.for_each_tile(cpu, tile, |rows, weights| {
            let update = if rows.start > 0 { Update::Add } else { update };
            let weights = View::new(weights, rows.len(), self.cols);
            precision.product(cpu, update, d_y.part(0..n, rows), weights, d_x);
        });
    }

    /// Calls `work` with some rows after others, unpacked.
    pub(crate) fn for_each_tile(
        &self,
        cpu: &Cpu,
        tile: &mut Vec<f32>,
        mut work: impl FnMut(Range<usize>, &[f32]),
    ) {
        let most = (TILE / self.cols.max(1)).clamp(1, self.rows.max(1));
        tile.resize(tile.len().max(most * self.cols), 0.0);
        for first in (0..self.rows).step_by(most) {
            let rows = first..self.rows.min(first + most);
            let weights = &mut tile[..rows.len() * self.cols];
            cpu.pool().run_chunks(weights, self.cols, |i, row| self.row(first + i, row));
            work(rows, weights);
        }
    }
}
