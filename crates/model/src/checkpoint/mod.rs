//! A model's files as one set of named tensors. A Hugging Face directory is presented *as the GGUF
//! file it would become*: same names, same order of rows, same contents. So loading, converting and
//! quantizing know one convention, and a converted file runs exactly like its source.

mod adapted;
mod blank;
mod naming;
mod open;
mod rotation;

pub use naming::{HfTensor, Place, Transform, source_row};

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use bevel_base::{DType, GroupedMatrix, Shape, TensorView, pack};
use bevel_formats::quantized::Scheme;
use bevel_formats::{gguf, safetensors};
use indexmap::IndexMap;

use crate::tokenizer::Tokenizer;
use crate::{Error, ModelConfig, Result};

/// An opened model: its configuration and its tensors, by GGUF names. Nothing but headers is read
/// until a tensor is.
#[derive(Debug)]
pub struct Checkpoint {
    path: String,
    config: ModelConfig,
    tensors: IndexMap<String, Entry>,
    unused: Vec<String>,
    source: Source,
    adapted: adapted::Adapted,
    rotated: Option<rotation::Rotated>,
}

#[derive(Debug)]
enum Source {
    Gguf(gguf::GgufFile),
    HuggingFace { dir: PathBuf, files: safetensors::Checkpoint, scheme: Option<Scheme> },
}

/// A tensor of a [`Checkpoint`].
#[derive(Clone, Debug)]
pub struct Entry {
    /// The type its values are read in.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub shape: Shape,
    origin: Origin,
}

impl Entry {
    /// One that follows from the configuration.
    fn computed(values: Vec<f32>) -> Self {
        let shape = [values.len()].into();
        Self { dtype: DType::F32, shape, origin: Origin::Computed(values) }
    }

    /// Bytes of the values in the entry's type.
    pub fn byte_len(&self) -> usize {
        self.shape.byte_len(self.dtype).unwrap_or(usize::MAX)
    }

    /// Bytes that the tensor takes in the files, scales counted.
    pub fn stored_len(&self) -> u64 {
        match &self.origin {
            Origin::Coded { bytes, .. } => *bytes,
            _ => self.byte_len() as u64,
        }
    }

    /// True where the files hold codes in groups, which [`Checkpoint::read_grouped`] gives;
    /// [`Checkpoint::read`] gives the numbers they stand for.
    pub fn is_coded(&self) -> bool {
        matches!(self.origin, Origin::Coded { .. })
    }
}

#[derive(Clone, Debug)]
enum Origin {
    /// Lies in the files under this name.
    Stored(String),
    /// Made of these stored tensors.
    Derived(HfTensor),
    /// Put together from codes and scales, which take so many bytes, in modules of these names.
    Coded { hf: HfTensor, bytes: u64 },
    /// Follows from the configuration.
    Computed(Vec<f32>),
}

impl Checkpoint {
    /// Opens a GGUF file (or the first of its shards) or a Hugging Face directory.
    ///
    /// # Errors
    /// Whatever is wrong with the files, the configuration, or the presence, shape and type of a
    /// tensor.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() { Self::open_hf(path) } else { Self::open_gguf(path) }
    }

    /// What the files call a tensor, for messages: GGUF names are unknown to a user who has a
    /// Hugging Face directory.
    pub(crate) fn shown_name(&self, name: &str) -> String {
        match self.tensors.get(name).map(|entry| &entry.origin) {
            Some(Origin::Stored(stored)) => stored.clone(),
            Some(Origin::Derived(hf) | Origin::Coded { hf, .. }) => hf.names[0].clone(),
            Some(Origin::Computed(_)) | None => name.to_owned(),
        }
    }

    /// The file or directory.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tensors by their GGUF names, in file order.
    pub fn tensors(&self) -> &IndexMap<String, Entry> {
        &self.tensors
    }

    /// Tensors in the files that the forward pass has no use for.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// GGUF metadata, where the model is a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&gguf::Metadata> {
        match &self.source {
            Source::Gguf(file) => Some(file.metadata()),
            Source::HuggingFace { .. } => None,
        }
    }

    /// The directory, where the model is a Hugging Face checkpoint.
    pub fn hf_dir(&self) -> Option<&Path> {
        match &self.source {
            Source::Gguf(_) => None,
            Source::HuggingFace { dir, .. } => Some(dir),
        }
    }

    /// The tokenizer that comes with the model. [`Tokenizer::warnings`] tells what it had to guess.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where there is none, or none that bevel can use.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match &self.source {
            Source::Gguf(file) => Tokenizer::from_gguf(file.metadata()),
            Source::HuggingFace { dir, .. } => Tokenizer::from_hf(dir),
        };
        tokenizer.map_err(|source| Error::Tokenizer { path: self.path.clone(), source })
    }

    /// True where weights are others than those in the files: [rotated](Checkpoint::rotated),
    /// [replaced](Checkpoint::replaced), or with an adapter [merged](Checkpoint::adapted) into them.
    pub fn is_changed(&self) -> bool {
        self.rotated.is_some() || self.adapted.is_some()
    }

    /// How the linear layers of a Hugging Face checkpoint are quantized, where they are.
    pub fn scheme(&self) -> Option<&Scheme> {
        match &self.source {
            Source::Gguf(_) => None,
            Source::HuggingFace { scheme, .. } => scheme.as_ref(),
        }
    }

    /// What the checkpoint asks for and the forward pass does not do, a sentence each.
    pub fn warnings(&self) -> &[String] {
        self.scheme().map_or(&[], Scheme::warnings)
    }

    /// Bytes of all tensors in the files.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(Entry::stored_len).sum()
    }

    /// Weights in all tensors.
    pub fn parameters(&self) -> u64 {
        let computed = |t: &&Entry| !matches!(t.origin, Origin::Computed(_));
        self.tensors.values().filter(computed).map(|t| t.shape.len() as u64).sum()
    }

    /// The entry of a tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() }
    }

    /// A tensor's values in its entry's type: borrowed from the mapping where they lie there as they
    /// are, else put together.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and those of reading the file.
    pub fn read(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        match &self.rotated {
            Some(rotated) => self.read_rotated(rotated, name),
            None => self.read_entry(name, self.entry(name)?),
        }
    }

    /// The bytes of a tensor that lies in the files just as [`Checkpoint::read`] gives it; `None` where it
    /// has to be made.
    pub(crate) fn in_place(&self, name: &str) -> Option<&[u8]> {
        let is_changed = self.rotated.is_some() || self.adapted.stored(name).is_some();
        match (is_changed, &self.tensors.get(name)?.origin, &self.source) {
            (false, Origin::Stored(stored), Source::Gguf(file)) => file.data(stored),
            (false, Origin::Stored(stored), Source::HuggingFace { files, .. }) => {
                files.data(stored)
            }
            _ => None,
        }
    }

    /// A tensor before it is rotated.
    fn read_entry(&self, name: &str, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        match self.adapted.stored(name) {
            Some(stored) => self.read_adapted(name, stored),
            None => self.read_stored(name, entry),
        }
    }

    /// A tensor as the files have it.
    fn read_stored(&self, name: &str, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        match &entry.origin {
            Origin::Stored(stored) => Ok(Cow::Borrowed(self.stored(stored)?.data())),
            Origin::Computed(values) => {
                Ok(Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            }
            Origin::Derived(hf) => {
                let mut bytes = Vec::with_capacity(entry.byte_len());
                for part in &hf.names {
                    let view = self.stored(part)?;
                    bytes.extend_from_slice(&self.derive(
                        name,
                        &view,
                        entry.dtype,
                        hf.transform,
                    )?);
                }
                Ok(Cow::Owned(bytes))
            }
            Origin::Coded { hf, .. } => {
                let mut bytes = Vec::with_capacity(entry.byte_len());
                for index in 0..hf.names.len() {
                    let matrix = self.grouped(hf, index)?;
                    bytes.extend(matrix.dequantize().iter().flat_map(|v| v.to_le_bytes()));
                }
                Ok(Cow::Owned(bytes))
            }
        }
    }

    /// The codes of a tensor that [is coded](Entry::is_coded), or of matrix `index` of a stack of
    /// experts, rows in the order that GGUF files have; `None` where it is not coded, or changed.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub fn read_grouped(&self, name: &str, index: usize) -> Result<Option<GroupedMatrix>> {
        let is_changed = self.rotated.is_some() || self.adapted.stored(name).is_some();
        match &self.entry(name)?.origin {
            Origin::Coded { hf, .. } if !is_changed => self.grouped(hf, index).map(Some),
            _ => Ok(None),
        }
    }

    fn grouped(&self, hf: &HfTensor, index: usize) -> Result<GroupedMatrix> {
        let Source::HuggingFace { files, scheme: Some(scheme), .. } = &self.source else {
            unreachable!("only a quantized checkpoint has coded tensors")
        };
        let matrix = scheme.read(files, module_of(&hf.names[index]))?;
        Ok(match hf.transform {
            Transform::InterleaveRows { .. } => {
                matrix.permute_rows(|r| source_row(r, self.config.head_dim, true))
            }
            Transform::None | Transform::PlusOne => matrix,
        })
    }

    /// One stored tensor, transformed and in the entry's type.
    fn derive(
        &self,
        name: &str,
        view: &TensorView<'_>,
        dtype: DType,
        transform: Transform,
    ) -> Result<Vec<u8>> {
        let wrap =
            |source| Error::Tensor { path: self.path.clone(), tensor: name.to_owned(), source };
        let mut bytes = view.data().to_vec();
        if dtype != view.dtype() || transform == Transform::PlusOne {
            let mut values = view.to_f32().map_err(wrap)?;
            if transform == Transform::PlusOne {
                values.iter_mut().for_each(|v| *v += 1.0);
            }
            bytes = vec![0; view.shape().byte_len(dtype).map_err(wrap)?];
            pack::quantize(dtype, &values, None, &mut bytes).map_err(wrap)?;
        }
        if let Transform::InterleaveRows { .. } = transform {
            bytes = regroup_rows(&bytes, view.shape().dims()[0], self.config.head_dim, true);
        }
        Ok(bytes)
    }

    /// A tensor's values as f32. For norms, biases and other small ones.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        self.unpack(name, entry, &self.read(name)?)
    }

    fn entry_to_f32(&self, name: &str, entry: &Entry) -> Result<Vec<f32>> {
        self.unpack(name, entry, &self.read_entry(name, entry)?)
    }

    fn unpack(&self, name: &str, entry: &Entry, bytes: &[u8]) -> Result<Vec<f32>> {
        let wrap =
            |source| Error::Tensor { path: self.path.clone(), tensor: name.to_owned(), source };
        TensorView::new(entry.dtype, entry.shape.clone(), bytes)
            .and_then(|v| v.to_f32())
            .map_err(wrap)
    }

    /// Lets the system take back the memory of a tensor's file pages.
    pub fn release(&self, name: &str) {
        let parts: &[String] = match self.tensors.get(name).map(|t| &t.origin) {
            Some(Origin::Stored(stored)) => std::slice::from_ref(stored),
            Some(Origin::Derived(hf) | Origin::Coded { hf, .. }) => &hf.names,
            _ => &[],
        };
        for part in parts {
            match &self.source {
                Source::Gguf(file) => file.release(part),
                Source::HuggingFace { files, scheme: Some(scheme), .. } => {
                    let coded = scheme.module_tensors(files, module_of(part));
                    coded.iter().chain([part]).for_each(|name| files.release(name));
                }
                Source::HuggingFace { files, .. } => files.release(part),
            }
        }
    }

    /// Lets the system take back the memory of bytes that were read in place.
    pub(crate) fn release_bytes(&self, bytes: &[u8]) {
        match &self.source {
            Source::Gguf(file) => file.release_bytes(bytes),
            Source::HuggingFace { files, .. } => files.release_bytes(bytes),
        }
    }

    fn stored(&self, name: &str) -> Result<TensorView<'_>> {
        Ok(match &self.source {
            Source::Gguf(file) => file.tensor(name)?,
            Source::HuggingFace { files, .. } => files.tensor(name)?,
        })
    }
}

/// The module that a weight belongs to.
fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// Regroups the rows of query or key projections between the two orders of rope; `rows` may be a
/// bias's values. See [`Transform::InterleaveRows`].
pub fn regroup_rows(bytes: &[u8], rows: usize, head_dim: usize, to_gguf: bool) -> Vec<u8> {
    let row_bytes = bytes.len() / rows.max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for r in 0..rows {
        let from = source_row(r, head_dim, to_gguf);
        out.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
    out
}

/// Reads and parses a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let shown = || path.display().to_string();
    let text = std::fs::read(path).map_err(|source| Error::Io { path: shown(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: shown(), source })
}
