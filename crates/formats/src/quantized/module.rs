//! The tensors of one module, read with their types and dimensions checked.

use bevel_base::{DType, TensorView};

use crate::safetensors::Checkpoint;
use crate::{Error, Result, TensorInfo};

/// A module of a checkpoint: the tensors `NAME.PART`.
pub(super) struct Module<'a> {
    files: &'a Checkpoint,
    name: &'a str,
}

/// 32-bit words, `[rows, cols]`.
pub(super) struct Words<'a> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    words: &'a [[u8; 4]],
}

impl Words<'_> {
    pub(super) fn at(&self, row: usize, col: usize) -> u32 {
        u32::from_le_bytes(self.words[row * self.cols + col])
    }

    pub(super) fn row(&self, row: usize) -> impl Iterator<Item = u32> {
        self.words[row * self.cols..][..self.cols].iter().map(|&word| u32::from_le_bytes(word))
    }
}

impl<'a> Module<'a> {
    pub(super) fn new(files: &'a Checkpoint, name: &'a str) -> Self {
        Self { files, name }
    }

    pub(super) fn name(&self) -> &'a str {
        self.name
    }

    fn full(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    pub(super) fn info(&self, part: &str) -> Option<&'a TensorInfo> {
        self.files.tensors().get(&self.full(part))
    }

    pub(super) fn has(&self, part: &str) -> bool {
        self.info(part).is_some()
    }

    /// The element type of a part that is there.
    pub(super) fn dtype(&self, part: &str) -> Option<DType> {
        self.info(part).map(|info| info.dtype)
    }

    pub(super) fn error(&self, part: &str, reason: impl Into<String>) -> Error {
        let paths = self.files.paths();
        let file = self.info(part).map_or(0, |info| info.file);
        let path = paths.get(file).cloned().unwrap_or_default();
        Error::Tensor { path, tensor: self.full(part), reason: reason.into() }
    }

    /// The part's dimensions, of which there must be two, none of them zero.
    pub(super) fn matrix(&self, part: &str) -> Result<[usize; 2]> {
        let view = self.view(part)?;
        match *view.shape().dims() {
            [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => Err(self.error(part, format!("{} is no matrix", view.shape()))),
        }
    }

    pub(super) fn view(&self, part: &str) -> Result<TensorView<'a>> {
        self.files.tensor(&self.full(part))
    }

    /// A part that must have one of some types.
    pub(super) fn typed(&self, part: &str, dtypes: &[DType]) -> Result<TensorView<'a>> {
        let view = self.view(part)?;
        match dtypes.contains(&view.dtype()) {
            true => Ok(view),
            false => {
                let expected: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
                let reason =
                    format!("its type is {}; expected {}", view.dtype(), expected.join(" or "));
                Err(self.error(part, reason))
            }
        }
    }

    /// A part that must be of `expected` dimensions.
    pub(super) fn expect(&self, part: &str, expected: &[usize]) -> Result<()> {
        let view = self.view(part)?;
        match view.shape().dims() == expected {
            true => Ok(()),
            false => {
                let reason = format!("its dimensions are {}; expected {expected:?}", view.shape());
                Err(self.error(part, reason))
            }
        }
    }

    pub(super) fn words(&self, part: &str) -> Result<Words<'a>> {
        let [rows, cols] = self.matrix(part)?;
        let view = self.typed(part, &[DType::I32, DType::U32])?;
        Ok(Words { rows, cols, words: view.data().as_chunks().0 })
    }

    /// Floating-point numbers of any width.
    pub(super) fn floats(&self, part: &str) -> Result<Vec<f32>> {
        let view = self.typed(part, &[DType::F16, DType::BF16, DType::F32, DType::F64])?;
        view.to_f32().map_err(|error| self.error(part, error.to_string()))
    }

    /// Integers of any width, as many as the file has.
    pub(super) fn integers(&self, part: &str) -> Result<Vec<i64>> {
        let view = self.typed(part, &[DType::I32, DType::I64])?;
        Ok(match view.dtype() {
            DType::I32 => {
                let values = view.data().as_chunks().0.iter();
                values.map(|&bytes| i64::from(i32::from_le_bytes(bytes))).collect()
            }
            _ => view.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
        })
    }

    /// One floating-point number.
    pub(super) fn number(&self, part: &str) -> Result<f32> {
        match self.floats(part)?[..] {
            [number] => Ok(number),
            _ => Err(self.error(part, "it should be one number")),
        }
    }

    /// The group of each column as `part` has it; `None` where they lie in order, or where the
    /// part is missing or was never filled in.
    pub(super) fn group_of(
        &self,
        part: &str,
        cols: usize,
        group_size: usize,
    ) -> Result<Option<Vec<u32>>> {
        if !self.has(part) {
            return Ok(None);
        }
        self.expect(part, &[cols])?;
        let groups = self.integers(part)?;
        let in_order = groups.iter().enumerate().all(|(col, &g)| g == (col / group_size) as i64);
        if in_order || groups.iter().all(|&group| group == -1) {
            return Ok(None);
        }
        let groups: Option<Vec<u32>> = groups.iter().map(|&group| group.try_into().ok()).collect();
        groups.map(Some).ok_or_else(|| self.error(part, "it has a negative group"))
    }
}

/// `[rows, cols]` becomes `[cols, rows]`.
pub(super) fn transpose<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}
