//! Conversion between GGUF files and Hugging Face directories.

pub(crate) mod from_gguf;
mod from_hf;

use std::path::Path;

use bevel_base::DType;
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use indexmap::IndexMap;

use crate::gguf::is_gguf;
use crate::output::{has_space, is_replaceable, may_write};
use crate::progress::OnProgress;
use crate::provenance::source_files;
use crate::{Base, Error, Options, Provenance, Recipe, Report, Result};

/// What a conversion makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A GGUF file.
    Gguf,
    /// A directory with `config.json`, the tokenizer's files and safetensors.
    HuggingFace,
}

impl Target {
    /// By the output's name: `.gguf` makes a GGUF file, everything else a directory.
    pub fn of(out: &Path) -> Self {
        if is_gguf(out) { Target::Gguf } else { Target::HuggingFace }
    }
}

/// Converts a model to the format that `out`'s name asks for, tensor by tensor.
///
/// In a Hugging Face directory the recipe's type is that of all tensors, norms included; packed
/// tensors that should keep their type become F16. Patterns are matched with GGUF names, or, from
/// one such directory to another, with the names there.
///
/// # Errors
/// Those of [`quantize`](crate::quantize), and [`Error::Target`] where a directory should hold
/// packed types or is named like a file of weights.
pub fn convert(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    out: &Path,
    options: &Options,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let rotated = crate::rotated(checkpoint, recipe)?;
    let checkpoint = rotated.as_ref().unwrap_or(checkpoint);
    if Target::of(out) == Target::Gguf || matches!(recipe.base, Base::Grouped(_)) {
        return crate::quantize(checkpoint, recipe, None, out, options, cpu, on_progress);
    }
    refuse_packed(recipe, out)?;
    refuse_file_name(out)?;
    may_write(out, &source_files(checkpoint), options)?;
    is_replaceable(out, checkpoint.hf_dir())?;
    match checkpoint.hf_dir().filter(|_| !checkpoint.is_changed()) {
        Some(dir) => from_hf::convert(checkpoint, dir, recipe, out, options, cpu, on_progress),
        None => from_gguf::convert(checkpoint, recipe, out, options, cpu, on_progress),
    }
}

/// A directory named like a file is a surprise.
pub(crate) fn refuse_file_name(out: &Path) -> Result<()> {
    const FILES: [&str; 5] = ["safetensors", "bin", "pt", "pth", "ggml"];
    let extension = out.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    if !FILES.contains(&extension.as_str()) {
        return Ok(());
    }
    let reason = format!(
        "a directory with `config.json`, the tokenizer and the weights is written, and no `.{extension}` file; choose a directory's name, or one that ends in `.gguf`"
    );
    Err(Error::Target { path: out.to_owned(), reason })
}

fn refuse_packed(recipe: &Recipe, out: &Path) -> Result<()> {
    match recipe.packed_type() {
        Some(dtype) => Err(Error::Target {
            path: out.to_owned(),
            reason: format!(
                "a Hugging Face directory cannot hold {dtype}; choose F32, F16 or BF16, or an output that ends in `.gguf`"
            ),
        }),
        None => Ok(()),
    }
}

/// The type of a tensor in a Hugging Face directory; `tied` is whether the embedding is the head too.
fn hf_type(recipe: &Recipe, name: &str, tied: bool, from: DType) -> DType {
    let kept = if from.is_packed() { DType::F16 } else { from };
    if !from.is_weight() || recipe.keeps(name) {
        return kept;
    }
    match (recipe.type_of(name, tied), recipe.base) {
        (Some(dtype), _) => dtype,
        (None, Base::Keep | Base::Grouped(_)) => kept,
        (None, Base::Mix(mix)) => mix.base,
    }
}

/// What safetensors files carry.
pub(crate) fn safetensors_metadata(provenance: &Provenance) -> IndexMap<String, String> {
    let mut metadata = IndexMap::from([("format".to_owned(), "pt".to_owned())]);
    metadata.extend(provenance.pairs().map(|(key, value)| (key.to_owned(), value.to_owned())));
    metadata
}

/// A report without tensors.
pub(crate) fn empty_report(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    out: &Path,
    provenance: Provenance,
    warnings: Vec<String>,
) -> Report {
    Report {
        input: checkpoint.path().into(),
        output: out.to_owned(),
        files: Vec::new(),
        recipe: recipe.clone(),
        provenance,
        allocation: None,
        calibration: None,
        totals: crate::Totals::default(),
        times: crate::Times::default(),
        warnings,
        tensors: Vec::new(),
    }
}

/// Checks the disk, given what each tensor takes.
fn check_space(out: &Path, bytes: impl Iterator<Item = u64>) -> Result<()> {
    has_space(out, bytes.fold(0, u64::saturating_add))
}
