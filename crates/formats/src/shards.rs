use std::path::{Path, PathBuf};

use bevel_base::{Mapping, TensorView};
use indexmap::IndexMap;

use crate::{Error, Result, TensorInfo};

/// The files of one model, mapped into memory, and the tensors they hold together.
#[derive(Debug, Default)]
pub(crate) struct Shards {
    pub(crate) paths: Vec<PathBuf>,
    mappings: Vec<Mapping>,
    pub(crate) tensors: IndexMap<String, TensorInfo>,
}

impl Shards {
    /// Adds a file whose header was parsed. `tensors` are the ones to take from it.
    ///
    /// The pages of the header, `..header_len`, are given back.
    pub(crate) fn add(
        &mut self,
        path: PathBuf,
        mapping: Mapping,
        header_len: usize,
        tensors: impl IntoIterator<Item = (String, TensorInfo)>,
    ) -> Result<()> {
        mapping.release(0..header_len);
        let file = self.paths.len();
        for (name, info) in tensors {
            if let Some(first) = self.tensors.get(&name) {
                let reason =
                    format!("tensor `{name}` is in `{}` too", self.paths[first.file].display());
                return Err(Error::Shards { path, reason });
            }
            self.tensors.insert(name, TensorInfo { file, ..info });
        }
        self.paths.push(path);
        self.mappings.push(mapping);
        Ok(())
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let info = self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.paths.first().cloned().unwrap_or_default(),
            tensor: name.to_owned(),
        })?;
        let data = self.data_of(info);
        TensorView::new(info.dtype, info.shape.clone(), data).map_err(|error| Error::Tensor {
            path: self.paths[info.file].clone(),
            tensor: name.to_owned(),
            reason: error.to_string(),
        })
    }

    pub(crate) fn data(&self, name: &str) -> Option<&[u8]> {
        self.tensors.get(name).map(|info| self.data_of(info))
    }

    /// The header's parser has checked that the range lies within the file.
    fn data_of(&self, info: &TensorInfo) -> &[u8] {
        &self.mappings[info.file].bytes()[info.range.clone()]
    }

    pub(crate) fn release(&self, name: &str) {
        if let Some(info) = self.tensors.get(name) {
            self.mappings[info.file].release(info.range.clone());
        }
    }

    pub(crate) fn release_bytes(&self, bytes: &[u8]) {
        let range = bytes.as_ptr_range();
        for mapping in &self.mappings {
            let whole = mapping.bytes().as_ptr_range();
            if whole.start <= range.start && range.end <= whole.end {
                let start = range.start.addr() - whole.start.addr();
                mapping.release(start..start + bytes.len());
            }
        }
    }

    pub(crate) fn file_size(&self) -> u64 {
        self.mappings.iter().map(|mapping| mapping.bytes().len() as u64).sum()
    }
}

/// Maps a file that should hold a model.
pub(crate) fn map(path: &Path) -> Result<Mapping> {
    Mapping::open(path).map_err(|error| {
        let source = match error {
            bevel_base::Error::Io { source, .. } => source,
            other => std::io::Error::other(other),
        };
        Error::Io { action: "open", path: path.to_owned(), source }
    })
}
