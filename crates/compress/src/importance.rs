//! An importance matrix from a file, in place of calibration data: what `llama-imatrix`, or
//! [`gather_imatrix`](crate::gather_imatrix), found out about the inputs of a model's matrices.

use std::path::PathBuf;

use bevel_formats::gguf::{Metadata, Value};
use bevel_formats::imatrix::Imatrix;
use bevel_model::Place;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::plan::PlannedTensor;
use crate::provenance::hexadecimal;
use crate::{Error, Recipe, Result};

/// The file of an importance matrix, as the table `[imatrix]` of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImatrixFile {
    /// Its path.
    pub file: PathBuf,
    /// The SHA-256 that it must have, in hexadecimal digits. Outputs carry it, so that their recipe
    /// does not give something else when the file has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// An importance matrix that was read.
#[derive(Clone, Debug)]
pub(crate) struct Importance {
    /// With the hash.
    file: ImatrixFile,
    imatrix: Imatrix,
}

impl Importance {
    /// Reads a file. A hash that it must have is compared.
    pub(crate) fn read(wanted: &ImatrixFile) -> Result<Self> {
        let path = &wanted.file;
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let sha256 = hexadecimal(&Sha256::digest(&bytes));
        if let Some(wanted) = wanted.sha256.as_ref().filter(|w| !w.eq_ignore_ascii_case(&sha256)) {
            return Err(Error::Imatrix {
                path: path.clone(),
                reason: format!(
                    "its SHA-256 is {sha256}, but the recipe asks for {wanted}; give the file that the recipe was made with, or leave `sha256` out to take this one"
                ),
            });
        }
        let imatrix = Imatrix::parse(path, &bytes)?;
        Ok(Self { file: ImatrixFile { file: path.clone(), sha256: Some(sha256) }, imatrix })
    }

    /// The recipe with the hash of the file that was read.
    pub(crate) fn recorded_in(&self, recipe: &Recipe) -> Recipe {
        Recipe { imatrix: Some(self.file.clone()), ..recipe.clone() }
    }

    /// The mean squares of a tensor's input columns, `[matrices, columns]`; `None` where the file does
    /// not know the tensor.
    pub(crate) fn of(&self, tensor: &PlannedTensor) -> Result<Option<Vec<f32>>> {
        let (dims, columns) = (tensor.shape.dims(), tensor.shape.row_len());
        let matrices = dims[..dims.len().saturating_sub(2)].iter().product();
        self.imatrix
            .importance(&tensor.name, matrices, columns)
            .map_err(|reason| self.refused(format!("{reason}; {MAKE_ONE}")))
    }

    /// Refuses a matrix of another model, which is one that has a layer too many, a tensor of another
    /// size, or no tensor in common. What is merely missing is returned as sentences.
    pub(crate) fn check(&self, tensors: &[PlannedTensor], layers: usize) -> Result<Vec<String>> {
        let entries = &self.imatrix.entries;
        let beyond = |name: &&String| matches!(Place::of(name), Place::Layer(l, _) if l >= layers);
        if let Some(name) = entries.keys().find(beyond) {
            return Err(self.refused(format!(
                "it has the tensor `{name}`, but the model has {layers} layers; it was made with another model: {MAKE_ONE}"
            )));
        }
        let (known, unknown): (Vec<_>, Vec<_>) =
            entries.keys().partition(|name| tensors.iter().any(|t| t.name == **name));
        if known.is_empty() {
            return Err(self.refused(format!(
                "none of its {} tensors, the first is `{}`, is one of this model's: {MAKE_ONE}",
                unknown.len(),
                unknown[0]
            )));
        }
        let mut missing = Vec::new();
        let mut unseen: Vec<(&str, usize)> = Vec::new();
        for tensor in tensors.iter().filter(|t| t.to.is_packed() && t.from != t.to) {
            match self.of(tensor)? {
                // An embedding has no inputs, and llama.cpp does not look at the output head's.
                None if matches!(Place::of(&tensor.name), Place::Global(_)) => {}
                None => missing.push(tensor.name.as_str()),
                Some(_) => {
                    let counts = &entries[&tensor.name].counts;
                    let count = counts.iter().filter(|count| **count == 0).count();
                    unseen.extend((count > 0).then_some((tensor.name.as_str(), count)));
                }
            }
        }
        let mut warnings = Vec::new();
        let file = self.file.file.display();
        if let Some(first) = missing.first() {
            warnings.push(format!(
                "{} tensors, the first is `{first}`, are not in the importance matrix `{file}` and are rounded to nearest without",
                missing.len()
            ));
        }
        if let Some((first, count)) = unseen.first() {
            warnings.push(format!(
                "{} tensors, the first is `{first}`, have experts ({count} of its) that no token came to when the importance matrix `{file}` was made: all of their columns count the same",
                unseen.len()
            ));
        }
        if let Some(first) = unknown.first() {
            warnings.push(format!(
                "{} tensors of the importance matrix `{file}`, the first is `{first}`, are none of this model's",
                unknown.len()
            ));
        }
        Ok(warnings)
    }

    /// What llama.cpp's files say about the matrix they were made with.
    pub(crate) fn describe(&self, metadata: &mut Metadata) {
        let Imatrix { entries, datasets, chunks, .. } = &self.imatrix;
        let mut insert = |key: &str, value: Value| {
            metadata.insert(format!("quantize.imatrix.{key}"), value);
        };
        insert("file", self.file.file.display().to_string().as_str().into());
        if let Some(first) = datasets.first() {
            insert("dataset", first.as_str().into());
        }
        insert("entries_count", Value::I32(i32::try_from(entries.len()).unwrap_or(i32::MAX)));
        if *chunks > 0 {
            insert("chunks_count", Value::I32(i32::try_from(*chunks).unwrap_or(i32::MAX)));
        }
    }

    fn refused(&self, reason: String) -> Error {
        Error::Imatrix { path: self.file.file.clone(), reason }
    }
}

/// What to do about a matrix that does not fit.
const MAKE_ONE: &str = "give one of this model; `bevel imatrix MODEL -o FILE` makes it";
