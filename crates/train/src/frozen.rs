use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use bevel_base::grouped::Coding;
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
    /// Codes in groups, the matrix's own beginning at row `first`. Those of up to 4 bits lie in `halves` and not in the
    /// matrix.
    Codes { matrix: Box<GroupedMatrix>, halves: Option<Halves>, first: usize },
}

impl Source<'_> {
    fn codes(mut matrix: GroupedMatrix, first: usize) -> Self {
        let halves = Halves::of(&matrix);
        if halves.is_some() {
            matrix.codes = Vec::new();
        }
        Self::Codes { matrix: Box::new(matrix), halves, first }
    }
}

thread_local! {
    /// A row's codes.
    static CODES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Codes of up to 4 bits, two a byte: a row's first half in the lower bits, its second half in the upper ones.
#[derive(Debug)]
struct Halves {
    bytes: Vec<u8>,
    row_bytes: usize,
}

impl Halves {
    /// Those of a matrix; `None` where codes are larger.
    fn of(matrix: &GroupedMatrix) -> Option<Self> {
        let is_small = match &matrix.coding {
            Coding::Integer { bits, .. } | Coding::Affine { bits, .. } => *bits <= 4,
            Coding::Levels(_) => true,
            Coding::Float8 => false,
        };
        if !is_small {
            return None;
        }
        let row_bytes = matrix.cols.div_ceil(2);
        let pack = |row: &[u8]| {
            let (low, high) = row.split_at(row_bytes);
            let high = high.iter().copied().chain([0]);
            low.iter().zip(high).map(|(low, high)| low | high << 4).collect::<Vec<u8>>()
        };
        let bytes = matrix.codes.chunks_exact(matrix.cols.max(1)).flat_map(pack).collect();
        Some(Self { bytes, row_bytes })
    }

    fn row(&self, index: usize, codes: &mut [u8]) {
        let bytes = &self.bytes[index * self.row_bytes..][..self.row_bytes];
        let (low, high) = codes.split_at_mut(self.row_bytes);
        low.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte & 15);
        high.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> 4);
    }
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
            Some(matrix) => {
                checkpoint.release(name);
                Source::codes(matrix, rows.start)
            }
            None => {
                let bytes = checkpoint.read(name)?;
                if let Cow::Owned(_) = bytes {
                    checkpoint.release(name);
                }
                let row_bytes = bytes.len() / total;
                Source::Stored { dtype: entry.dtype, bytes, first: rows.start, row_bytes }
            }
        };
        let frozen = Self { source, rows: rows.len(), cols };
        frozen.check(checkpoint, name)?;
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

    /// The matrices of a stack, as experts are.
    ///
    /// # Errors
    /// Those of [`Frozen::load`].
    pub(crate) fn stack(checkpoint: &'c Checkpoint, name: &str) -> Result<Vec<Self>> {
        let entry = checkpoint.entry(name)?;
        let &[count, rows, cols] = entry.shape.dims() else {
            unreachable!("checked stacks have three dimensions")
        };
        let mut all = Vec::with_capacity(count);
        if entry.is_coded() {
            for index in 0..count {
                let Some(matrix) = checkpoint.read_grouped(name, index)? else { break };
                all.push(Self { source: Source::codes(matrix, 0), rows, cols });
            }
            checkpoint.release(name);
        }
        if all.is_empty() {
            let bytes = checkpoint.read(name)?;
            let row_bytes = bytes.len() / (count * rows);
            let part = |index: usize| index * rows * row_bytes..(index + 1) * rows * row_bytes;
            let source = |bytes| Source::Stored { dtype: entry.dtype, bytes, first: 0, row_bytes };
            let parts: Vec<Cow<'c, [u8]>> = match bytes {
                Cow::Borrowed(bytes) => {
                    (0..count).map(|i| Cow::Borrowed(&bytes[part(i)])).collect()
                }
                Cow::Owned(bytes) => {
                    (0..count).map(|i| Cow::Owned(bytes[part(i)].to_vec())).collect()
                }
            };
            if let Cow::Owned(_) = parts[0] {
                checkpoint.release(name);
            }
            all.extend(parts.into_iter().map(|part| Self { source: source(part), rows, cols }));
        }
        all[0].check(checkpoint, name)?;
        Ok(all)
    }

    /// What fails for one row fails for all.
    fn check(&self, checkpoint: &Checkpoint, name: &str) -> Result<()> {
        self.unpack_row(0, &mut vec![0.0; self.cols]).map_err(|source| Error::Tensor {
            path: checkpoint.path().to_owned(),
            tensor: name.to_owned(),
            source,
        })
    }

    /// Bytes in memory, those of pages of the file counted.
    pub(crate) fn bytes(&self) -> usize {
        match &self.source {
            Source::Stored { row_bytes, .. } => self.rows * row_bytes,
            Source::Codes { matrix, halves, .. } => {
                let codes = halves.as_ref().map_or(matrix.codes.len(), |halves| halves.bytes.len());
                codes + 4 * matrix.scales.len()
            }
        }
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
            Source::Codes { matrix, halves, first } => {
                let row = first + index;
                match halves {
                    None => matrix.dequantize_row(row, out),
                    Some(halves) => CODES.with_borrow_mut(|codes| {
                        codes.resize(out.len(), 0);
                        halves.row(row, codes);
                        matrix.dequantize_codes(row, codes, out);
                    }),
                }
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

#[cfg(test)]
mod tests {
    use bevel_base::grouped::nf4;

    use super::*;

    #[test]
    fn codes_in_halves_of_bytes_are_the_same() {
        for cols in [64, 65, 1] {
            let values: Vec<f32> = (0..3 * cols).map(|i| (i * i % 23) as f32 - 11.0).collect();
            let matrix = nf4::quantize(&values, 3, cols, nf4::Levels::Nf4, 64.min(cols)).unwrap();
            let halves = Halves::of(&matrix).unwrap();
            assert_eq!(halves.bytes.len(), 3 * cols.div_ceil(2));
            for (row, expected) in matrix.codes.chunks(cols).enumerate() {
                let mut codes = vec![0; cols];
                halves.row(row, &mut codes);
                assert_eq!(codes, expected);
            }
        }
    }
}
