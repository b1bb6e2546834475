use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::METADATA;
use crate::split::{runs, shard_path};
use crate::stream::{Placement, ShardLayout, TensorStream};
use crate::{AtomicFile, Error, Result, TensorSpec};

/// Writes safetensors. Metadata and tensors are declared first, so that every offset is known; then
/// the data streams through, tensor after tensor, in pieces of any size.
///
/// Within a file tensors lie sorted by element size, largest first, which keeps every one aligned
/// without gaps; data still comes in the declared order. Nothing appears under the final names
/// before [`SafetensorsWriter::finish`]; a writer that is dropped removes what it has written.
#[derive(Debug)]
pub struct SafetensorsWriter {
    stream: TensorStream,
    /// Name and content, where there is more than one shard.
    index: Option<(PathBuf, String)>,
}

/// Headers are filled with spaces up to a multiple of this, so that data is aligned.
const ALIGNMENT: usize = 8;

impl SafetensorsWriter {
    /// Starts `path`, or, where the tensors take more than `max_shard_bytes`, shards named
    /// `NAME-00001-of-00003.safetensors` beside it and the index `NAME.safetensors.index.json`.
    /// Every file carries `metadata`; transformers expects the pair `format`, `pt` there.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where safetensors cannot express a tensor, [`Error::Io`].
    pub fn create(
        path: &Path,
        metadata: &IndexMap<String, String>,
        tensors: &[TensorSpec],
        max_shard_bytes: Option<u64>,
    ) -> Result<Self> {
        let wrong = |reason: String| Error::Unwritable { path: path.to_owned(), reason };
        let mut names = HashSet::new();
        let mut byte_lens = Vec::with_capacity(tensors.len());
        for TensorSpec { name, dtype, shape } in tensors {
            if name == METADATA || !names.insert(name) {
                return Err(wrong(format!("tensor `{name}` comes twice or has a reserved name")));
            }
            if dtype.is_packed() {
                return Err(wrong(format!(
                    "tensor `{name}`: safetensors has no type {dtype}; write GGUF or convert the tensor to another one"
                )));
            }
            let len = shape
                .byte_len(*dtype)
                .map_err(|error| wrong(format!("tensor `{name}`: {error}")))?;
            byte_lens.push(len as u64);
        }
        let total = byte_lens.iter().try_fold(0u64, |sum, &len| sum.checked_add(len));
        let total = total.ok_or_else(|| wrong("its size overflows".to_owned()))?;

        let runs = runs(&byte_lens, max_shard_bytes);
        let count = runs.len();
        let mut shards = Vec::with_capacity(count);
        let mut weight_map = Map::new();
        for (number, run) in runs.into_iter().enumerate() {
            let path = shard_path(path, number, count);
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for spec in &tensors[run.clone()] {
                weight_map.insert(spec.name.clone(), file.clone().into());
            }
            shards.push(layout(path, metadata, &tensors[run.clone()], &byte_lens[run]));
        }
        let index = (count > 1).then(|| {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(".index.json");
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            (path.with_file_name(name), format!("{index:#}\n"))
        });
        Ok(Self { stream: TensorStream::new(path, shards)?, index })
    }

    /// Takes the next bytes of tensor `name`. Tensors come in the declared order.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where another tensor is due or bytes are too many, [`Error::Io`].
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.stream.write(name, data)
    }

    /// Syncs the files and renames them into place, the index last. Returns the names of the
    /// files with tensors.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where data is missing, [`Error::Io`].
    pub fn finish(self) -> Result<Vec<PathBuf>> {
        let paths = self.stream.finish()?;
        if let Some((path, text)) = self.index {
            let mut file = AtomicFile::create(&path)?;
            file.write_all(text.as_bytes()).map_err(Error::io("write", &path))?;
            file.finish()?;
        }
        Ok(paths)
    }
}

fn layout(
    path: PathBuf,
    metadata: &IndexMap<String, String>,
    tensors: &[TensorSpec],
    byte_lens: &[u64],
) -> ShardLayout {
    let mut by_element_size: Vec<usize> = (0..tensors.len()).collect();
    by_element_size.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.block_bytes()));

    let mut entries: Map<String, Value> = Map::new();
    if !metadata.is_empty() {
        entries.insert(METADATA.to_owned(), json!(metadata));
    }
    let mut starts = vec![0; tensors.len()];
    let mut end = 0;
    for i in by_element_size {
        starts[i] = end;
        end += byte_lens[i];
        let TensorSpec { name, dtype, shape } = &tensors[i];
        let entry = json!({
            "dtype": dtype.name(),
            "shape": shape.dims(),
            "data_offsets": [starts[i], end],
        });
        entries.insert(name.clone(), entry);
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);

    let data_start = header.len() as u64;
    let place = |i: usize| Placement {
        name: tensors[i].name.clone(),
        offset: data_start + starts[i],
        byte_len: byte_lens[i],
    };
    let placements = (0..tensors.len()).map(place).collect();
    ShardLayout { path, header, tensors: placements, file_len: data_start + end }
}
