use std::path::{Path, PathBuf};

use bevel_base::TensorView;
use indexmap::IndexMap;

use super::{Header, Metadata, SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, Value};
use crate::shards::{Shards, map};
use crate::split::{parse_shard_path, shard_path};
use crate::{Error, Result, TensorInfo};

/// A GGUF model mapped into memory: one file, or all shards of a split one.
///
/// Opening reads the headers only. Tensor data is paged in when it is touched.
#[derive(Debug)]
pub struct GgufFile {
    metadata: Metadata,
    shards: Shards,
}

impl GgufFile {
    /// Opens a file. Where it is a shard, `name-00002-of-00003.gguf`, the others are opened too,
    /// and the metadata is that of the first one without the keys that describe the split.
    ///
    /// # Errors
    /// [`Error::Io`], the errors of [`Header::parse`], and [`Error::Shards`] where shards are
    /// misnamed, or contradict each other.
    pub fn open(path: &Path) -> Result<Self> {
        let mapping = map(path)?;
        let header = Header::parse(path, mapping.bytes())?;
        let mut shards = Shards::default();
        if split_value(&header, SPLIT_COUNT).unwrap_or(1) <= 1 {
            shards.add(path.to_owned(), mapping, header.data_start, header.tensors)?;
            return Ok(Self { metadata: header.metadata, shards });
        }

        drop(mapping);
        let wrong = |reason: String| Error::Shards { path: path.to_owned(), reason };
        let count = split_value(&header, SPLIT_COUNT).unwrap_or_default();
        let (unsplit, _, named) =
            parse_shard_path(path).filter(|(_, _, named)| *named == count).ok_or_else(|| {
                let example = shard_path(Path::new("model.gguf"), 0, count);
                let example = example.display();
                wrong(format!("it is one of {count}, so its name should look like `{example}`"))
            })?;
        let mut metadata = Metadata::new();
        for index in 0..named {
            let path = shard_path(&unsplit, index, named);
            let mapping = map(&path)?;
            let header = Header::parse(&path, mapping.bytes())?;
            let is = (split_value(&header, SPLIT_NUMBER), split_value(&header, SPLIT_COUNT));
            if is != (Some(index), Some(named)) {
                let path = path.display();
                return Err(wrong(format!(
                    "`{path}` does not say in `{SPLIT_NUMBER}` and `{SPLIT_COUNT}` that it is number {index}, counted from 0, of {named}"
                )));
            }
            shards.add(path, mapping, header.data_start, header.tensors)?;
            if index == 0 {
                metadata = header.metadata;
            }
        }
        let found = shards.tensors.len();
        match metadata.get(SPLIT_TENSORS).and_then(Value::as_usize) {
            Some(expected) if expected != found => {
                return Err(wrong(format!(
                    "they should hold {expected} tensors, but hold {found}"
                )));
            }
            _ => {}
        }
        metadata.retain(|key, _| !is_split_key(key));
        Ok(Self { metadata, shards })
    }

    /// Key–value pairs in file order.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Tensors in file order, shard after shard.
    pub fn tensors(&self) -> &IndexMap<String, TensorInfo> {
        &self.shards.tensors
    }

    /// A tensor's data as it lies in the file.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.shards.tensor(name)
    }

    /// The bytes alone of a tensor's data, without allocating anything; `None` where there is no such tensor.
    pub fn data(&self, name: &str) -> Option<&[u8]> {
        self.shards.data(name)
    }

    /// Lets the system drop the tensor's pages from memory; they are read again on the next touch.
    pub fn release(&self, name: &str) {
        self.shards.release(name);
    }

    /// Lets the system drop the pages of some bytes of the files, such as a part of a tensor's; bytes that lie
    /// elsewhere are left alone.
    pub fn release_bytes(&self, bytes: &[u8]) {
        self.shards.release_bytes(bytes);
    }

    /// Bytes of all files together.
    pub fn file_size(&self) -> u64 {
        self.shards.file_size()
    }

    /// The files, shards in order.
    pub fn paths(&self) -> &[PathBuf] {
        &self.shards.paths
    }
}

fn split_value(header: &Header, key: &str) -> Option<usize> {
    header.metadata.get(key).and_then(Value::as_usize)
}

/// True for the keys that belong to one way of splitting a model and not to the model.
pub(super) fn is_split_key(key: &str) -> bool {
    [SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS].contains(&key)
}
