use std::fs;
use std::path::{Path, PathBuf};

use bevel_base::TensorView;
use indexmap::{IndexMap, IndexSet};

use super::{Header, INDEX, SINGLE};
use crate::shards::{Shards, map};
use crate::wrong_file::{PICKLE, wrong_file};
use crate::{Error, Result, TensorInfo};

/// The tensors of a Hugging Face model, mapped into memory.
///
/// Opening reads the headers only. Tensor data is paged in when it is touched. The default has no files and no tensors.
#[derive(Debug, Default)]
pub struct Checkpoint {
    metadata: IndexMap<String, String>,
    shards: Shards,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index (`*.index.json`) with the shards it names, or a
    /// directory. In a directory `model.safetensors` is looked for, then
    /// `model.safetensors.index.json`, then a single file with another name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::WrongFile`] where there is nothing to open, the errors of
    /// [`Header::parse`], and [`Error::Shards`] where index and shards contradict each other.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { find_in(path)? } else { path.to_owned() };
        if file.extension().is_some_and(|extension| extension == "json") {
            return Self::open_index(&file);
        }
        let mapping = map(&file)?;
        let header = Header::parse(&file, mapping.bytes())?;
        let mut shards = Shards::default();
        shards.add(file, mapping, header.data_start, header.tensors)?;
        Ok(Self { metadata: header.metadata, shards })
    }

    fn open_index(path: &Path) -> Result<Self> {
        let places = parse_index(path, map(path)?.bytes())?;
        let mut metadata = IndexMap::new();
        let mut shards = Shards::default();
        let files: IndexSet<&str> = places.values().map(String::as_str).collect();
        for file in files {
            let shard = path.with_file_name(file);
            let mapping = map(&shard)?;
            let header = Header::parse(&shard, mapping.bytes())?;
            // Where the index puts a tensor elsewhere, this copy of it is not the model's.
            let here = |name: &String| places.get(name).is_none_or(|place| place == file);
            let tensors = header.tensors.into_iter().filter(|(name, _)| here(name));
            shards.add(shard, mapping, header.data_start, tensors)?;
            for (key, value) in header.metadata {
                metadata.entry(key).or_insert(value);
            }
        }
        match places.iter().find(|(name, _)| !shards.tensors.contains_key(*name)) {
            Some((name, file)) => {
                let reason = format!("tensor `{name}` should be in `{file}`, but is not");
                Err(Error::Shards { path: path.to_owned(), reason })
            }
            None => Ok(Self { metadata, shards }),
        }
    }

    /// What the files carry under `__metadata__`; the first shard wins.
    pub fn metadata(&self) -> &IndexMap<String, String> {
        &self.metadata
    }

    /// Tensors in the order of their data, shard after shard.
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

    /// The files that hold tensors.
    pub fn paths(&self) -> &[PathBuf] {
        &self.shards.paths
    }
}

/// Longer indexes are refused: a thousand times that of a large model.
const MAX_INDEX: usize = 100_000_000;

/// The file to open in a model's directory.
fn find_in(directory: &Path) -> Result<PathBuf> {
    for name in [SINGLE, INDEX] {
        let file = directory.join(name);
        if file.exists() {
            return Ok(file);
        }
    }
    let entries = fs::read_dir(directory).map_err(Error::io("open", directory))?;
    let files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let with_extension = |wanted: &'static str| {
        files.iter().filter(move |file| file.extension().is_some_and(|found| found == wanted))
    };
    let mut candidates = with_extension("safetensors");
    let found = match (candidates.next(), candidates.next()) {
        (Some(file), None) => return Ok(file.clone()),
        (Some(_), Some(_)) => format!(
            "it holds several `.safetensors` files, but no `{SINGLE}` and no `{INDEX}`; name the file"
        ),
        (None, _) => {
            match ["bin", "pt", "pth", "pkl"].iter().find_map(|e| with_extension(e).next()) {
                Some(file) => {
                    format!("of its weights there is only `{}`; {PICKLE}", file.display())
                }
                None => format!("it holds neither `{SINGLE}` nor `{INDEX}`"),
            }
        }
    };
    let expected = "directory with a safetensors model";
    Err(Error::WrongFile { path: directory.to_owned(), expected, found })
}

/// The file that an index (`model.safetensors.index.json`) lying in `bytes` names for each tensor.
/// `path` is used in messages.
///
/// # Errors
/// [`Error::WrongFile`] where `bytes` do not begin like an index, [`Error::Header`] where they are
/// no JSON of the right form, name no tensors, or name a file outside the index's directory.
pub fn parse_index(path: &Path, bytes: &[u8]) -> Result<IndexMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: IndexMap<String, String>,
    }
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(wrong_file(path, "safetensors index", bytes));
    }
    let wrong = |reason: String| Error::Header { path: path.to_owned(), reason };
    if bytes.len() > MAX_INDEX {
        let len = bytes.len();
        return Err(wrong(format!("it has {len} bytes; bevel reads up to {MAX_INDEX}")));
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
    if index.weight_map.is_empty() {
        return Err(wrong("`weight_map` names no tensors".to_owned()));
    }
    for (name, file) in &index.weight_map {
        // A name with directories in it could lead out of the model's own.
        if Path::new(file).file_name().is_none_or(|plain| plain != file.as_str()) {
            let reason = "an index may name only files beside it";
            return Err(wrong(format!("tensor `{name}` is put in `{file}`; {reason}")));
        }
    }
    Ok(index.weight_map)
}
