use std::borrow::Cow;
use std::ops::Range;

use bevel_base::{DType, GroupedMatrix, pack};
use bevel_kernels::linalg::Rows;
use bevel_model::{Checkpoint, Error, Result};

/// A matrix `[out, in]` that is not trained, as its file has it. Rows are unpacked as they are needed, so products are
/// those of the dequantized model.
#[derive(Debug)]
pub(crate) struct Frozen<'c> {
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
    pub(crate) fn load(
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
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Row `index`, `[in]`.
    ///
    /// # Panics
    /// Where there is no such row.
    pub(crate) fn row(&self, index: usize, out: &mut [f32]) {
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
}

impl Rows for Frozen<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn read(&self, index: usize, out: &mut [f32]) {
        self.row(index, out);
    }
}
