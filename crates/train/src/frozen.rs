use std::borrow::Cow;
use std::ops::Range;

use bevel_base::{DType, GroupedMatrix, pack};
use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Panels, Precision, Rows, Term, Update, multiply};
use bevel_model::{Checkpoint, Error, Result};

/// Values that are unpacked together.
const TILE: usize = 2 << 20;

/// A matrix `[out, in]` that is not trained, as its file has it. Rows are unpacked as they are needed, so products are
/// those of the dequantized model.
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

    /// `y = x Wᵀ`, and `more` terms of as many columns: `y` is `[n, out]`, `x` is `[n, in]`, packed as the left factor.
    ///
    /// # Panics
    /// Where the lengths do not fit.
    #[allow(clippy::too_many_arguments)] // Those of a product.
    pub fn forward(
        &self,
        cpu: &Cpu,
        precision: Precision,
        y: &mut [f32],
        x: &Panels,
        more: &[Term<'_>],
        right: &mut Panels,
    ) {
        for rows in self.tiles() {
            right.pack_turned_rows(cpu, precision, self, rows.clone());
            let more = more.iter().map(|term| Term { column: rows.start, ..*term });
            let terms: Vec<Term<'_>> = std::iter::once(Term::new(x, right)).chain(more).collect();
            multiply(cpu, Update::Set, &terms, &mut y[rows.start..], self.rows);
        }
    }

    /// `d_x = d_y W`, and `more` terms, or what `update` says: `d_x` is `[n, in]`, `d_y` is `[n, out]`, packed as the left
    /// factor.
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
        d_y: &Panels,
        more: &[Term<'_>],
        right: &mut Panels,
    ) {
        for rows in self.tiles() {
            let first = rows.start;
            let (update, more) = if first > 0 { (Update::Add, &[][..]) } else { (update, more) };
            right.pack_rows(cpu, precision, self, rows);
            let term = Term { first, ..Term::new(d_y, right) };
            let terms: Vec<Term<'_>> = [term].iter().chain(more).copied().collect();
            multiply(cpu, update, &terms, d_x, self.cols);
        }
    }

    /// Rows that are unpacked together.
    fn tiles(&self) -> impl Iterator<Item = Range<usize>> {
        let most = (TILE / self.cols.max(1)).clamp(1, self.rows.max(1));
        let most = most.next_multiple_of(Panels::WIDTHS);
        let rows = self.rows;
        (0..rows).step_by(most).map(move |first| first..rows.min(first + most))
    }

    /// Calls `work` with some rows after others, unpacked.
    pub(crate) fn for_each_tile(
        &self,
        cpu: &Cpu,
        tile: &mut Vec<f32>,
        mut work: impl FnMut(Range<usize>, &[f32]),
    ) {
        for rows in self.tiles() {
            tile.resize(tile.len().max(rows.len() * self.cols), 0.0);
            let weights = &mut tile[..rows.len() * self.cols];
            cpu.pool().run_chunks(weights, self.cols, |i, row| self.row(rows.start + i, row));
            work(rows, weights);
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
