//! Importance matrices as llama.cpp's `llama-imatrix` writes them: for each matrix of a model, the
//! sum of the squares of every input column over the tokens of a calibration text.
//!
//! Two formats are read and written: GGUF, and the older `.dat`. `docs/formats/imatrix.md` shows
//! both. What is written from the same numbers has the bytes that llama.cpp writes.

mod gguf;
mod legacy;

use std::path::Path;

use indexmap::IndexMap;

use crate::shards::map;
use crate::{Error, Result};

/// What a model's matrices were fed with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the GGUF name of the weight: `blk.0.attn_q.weight`.
    pub entries: IndexMap<String, ImatrixEntry>,
    /// Names of the texts.
    pub datasets: Vec<String>,
    /// Chunks that the texts were cut into.
    pub chunks: u32,
    /// Tokens of a chunk; 0 where a file does not tell, as the older format does not.
    pub chunk_size: u32,
}

/// What one tensor was fed with: one matrix, or one for each expert.
#[derive(Clone, Debug, PartialEq)]
pub struct ImatrixEntry {
    /// Σ x² of each input column, `[matrices, columns]`.
    pub sums: Vec<f32>,
    /// Tokens that the sums are over: one number for each matrix, or one for all of them. In the
    /// older format it is the number of chunks, and the sums are scaled to match.
    pub counts: Vec<u64>,
}

impl ImatrixEntry {
    /// Sums over `count` tokens of one matrix.
    pub fn dense(sums: Vec<f32>, count: u64) -> Self {
        Self { sums, counts: vec![count] }
    }

    /// The mean of x² of each column, `[matrices, columns]`. A matrix that saw no token, an expert
    /// never chosen, gets 1 everywhere: all its columns count the same.
    pub fn mean_squares(&self) -> Vec<f32> {
        let columns = self.sums.len() / self.counts.len().max(1);
        let mut means = self.sums.clone();
        for (means, &count) in means.chunks_mut(columns.max(1)).zip(&self.counts) {
            match count {
                0 => means.fill(1.0),
                _ => means.iter_mut().for_each(|mean| *mean /= count as f32),
            }
        }
        means
    }

    /// What is wrong with the entry, if anything.
    fn check(&self) -> Result<(), String> {
        let (sums, counts) = (self.sums.len(), self.counts.len());
        if sums == 0 || counts == 0 || !sums.is_multiple_of(counts) {
            return Err(format!("{sums} sums do not divide among {counts} counts"));
        }
        match self.sums.iter().position(|sum| !sum.is_finite() || *sum < 0.0) {
            Some(i) => Err(format!("sum {i} is {}, which no sum of squares is", self.sums[i])),
            None => Ok(()),
        }
    }
}

impl Imatrix {
    /// Reads a file of either format.
    ///
    /// # Errors
    /// [`Error::Io`], and those of [`Imatrix::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, map(path)?.bytes())
    }

    /// Reads a whole file lying in `bytes`. `path` is used in messages.
    ///
    /// # Errors
    /// [`Error::WrongFile`] for what is no importance matrix, [`Error::Header`] and
    /// [`Error::Tensor`] for one that is damaged.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let found = match bytes.starts_with(b"GGUF") {
            true => gguf::parse(path, bytes)?,
            false => legacy::parse(path, bytes)?,
        };
        for (name, entry) in &found.entries {
            entry.check().map_err(|reason| Error::Tensor {
                path: path.to_owned(),
                tensor: name.clone(),
                reason,
            })?;
        }
        Ok(found)
    }

    /// Writes the GGUF format, entries in the order of their names.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where an entry is empty, not finite or has too long a name;
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        gguf::write(self, path, &self.sorted(path)?)
    }

    /// Writes the older `.dat` format, which has no counts for single experts: an expert's sums are
    /// scaled to the tensor's count. Tensors that saw no token are left out.
    ///
    /// # Errors
    /// As [`Imatrix::write`].
    pub fn write_legacy(&self, path: &Path) -> Result<()> {
        legacy::write(self, path, &self.sorted(path)?)
    }

    /// The mean squares of a tensor's columns, `[matrices, columns]`; `None` where the file does not
    /// have the tensor.
    ///
    /// # Errors
    /// Says so where the file's tensor has another size.
    pub fn importance(
        &self,
        tensor: &str,
        matrices: usize,
        columns: usize,
    ) -> Result<Option<Vec<f32>>, String> {
        let Some(entry) = self.entries.get(tensor) else { return Ok(None) };
        let found = entry.sums.len();
        if matrices.checked_mul(columns) != Some(found) {
            return Err(format!(
                "the importance matrix has {found} columns for tensor `{tensor}`, which has {matrices} × {columns}; it was made with another model"
            ));
        }
        Ok(Some(entry.mean_squares()))
    }

    fn sorted(&self, path: &Path) -> Result<Vec<(&str, &ImatrixEntry)>> {
        let wrong = |reason| Error::Unwritable { path: path.to_owned(), reason };
        let mut entries: Vec<_> = self.entries.iter().map(|(n, e)| (n.as_str(), e)).collect();
        entries.sort_unstable_by_key(|entry| entry.0);
        for (name, entry) in &entries {
            entry.check().map_err(|reason| wrong(format!("tensor `{name}`: {reason}")))?;
        }
        match entries.is_empty() {
            true => Err(wrong("the importance matrix has no entries".to_owned())),
            false => Ok(entries),
        }
    }
}
