//! What a run trains, and what it writes: an adapter, or a model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bevel_base::DType;
use bevel_compress::solve::RowRounding;
use bevel_compress::{Base, Options, Override, Preview, Recipe, Storage};
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, Entry, is_saved_whole};
use bevel_train::{AsStored, LoraConfig, Rounding, Ternary, Trainable, Trained, write_adapter};

use super::Args;
use crate::args::Global;
use crate::commands::quantize::{completed, with_progress};
use crate::model;

/// What is made of a model.
pub(super) enum Goal {
    /// Matrices beside it, and tensors in the place of those that match these patterns.
    Adapter(LoraConfig, Vec<String>),
    /// Another model: that with other weights in its tensors that match these patterns.
    Model { patterns: Vec<String>, recipe: Box<Recipe>, trained_for_it: bool },
}

impl Goal {
    pub(super) fn of(args: &Args, checkpoint: &Checkpoint, global: &Global) -> Self {
        let is_whole = args.full || args.scratch || args.qat.is_some();
        let patterns = if is_whole { vec!["*".to_owned()] } else { args.train.clone() };
        if patterns.is_empty() {
            return Self::Adapter(args.lora_config(global), args.modules_to_save.clone());
        }
        let recipe = match args.qat.or(args.base) {
            Some(base) => Recipe::new(base),
            None => own_types(checkpoint, &patterns),
        };
        Self::Model { patterns, recipe: Box::new(recipe), trained_for_it: args.qat.is_some() }
    }

    /// What it is called.
    pub(super) fn noun(&self) -> &'static str {
        match self {
            Self::Adapter(..) => "adapter",
            Self::Model { .. } => "model",
        }
    }

    /// The part of a trained model that is looked at.
    pub(super) fn output(&self, directory: &Path) -> PathBuf {
        match self {
            Self::Adapter(..) => directory.to_owned(),
            Self::Model { recipe, .. } => match recipe.base {
                Base::Grouped(_) => directory.join("model"),
                Base::Keep | Base::Mix(_) => directory.join("model.gguf"),
            },
        }
    }

    /// What is trained.
    ///
    /// # Errors
    /// Where there is no such tensor, and where a model cannot be trained for a type.
    pub(super) fn trainable(&self, checkpoint: &Checkpoint, cpu: &Cpu) -> Result<Trainable> {
        let (Self::Adapter(_, patterns) | Self::Model { patterns, .. }) = self;
        for pattern in patterns {
            let is_there =
                checkpoint.tensors().keys().any(|name| bevel_base::matches(pattern, name));
            let tied = checkpoint.config().tied && pattern == "output.weight";
            ensure!(!tied, "the head of this model is its embedding; say `embeddings`");
            // Before hours of training.
            let no_place = checkpoint
                .tensors()
                .keys()
                .find(|name| bevel_base::matches(pattern, name) && !is_saved_whole(name));
            if let (Self::Adapter(..), Some(name)) = (self, no_place) {
                bail!(
                    "adapters have no place for `{name}`, a bias or experts; train it with --train, which writes a model"
                );
            }
            ensure!(
                is_there,
                "no tensor of this model is called `{pattern}`; `bevel inspect --tensors` lists their names"
            );
        }
        let (recipe, trained_for_it) = match self {
            Self::Adapter(lora, _) => {
                return Ok(Trainable {
                    lora: Some(lora.clone()),
                    tensors: patterns.clone(),
                    ..Trainable::default()
                });
            }
            Self::Model { recipe, trained_for_it, .. } => (recipe, *trained_for_it),
        };
        recipe.check()?;
        let roundings =
            if trained_for_it { roundings(checkpoint, recipe, cpu)? } else { BTreeMap::new() };
        Ok(Trainable { tensors: patterns.clone(), roundings, ..Trainable::default() })
    }

    /// Writes what was trained into a directory. `base` is what the model is called.
    pub(super) fn write(
        &self,
        directory: &Path,
        base: &str,
        checkpoint: Checkpoint,
        trained: Trained,
        cpu: &Cpu,
        global: &Global,
    ) -> Result<()> {
        match self {
            Self::Adapter(lora, _) => {
                let Trained { adapters, tensors } = trained;
                Ok(write_adapter(directory, base, checkpoint.config(), lora, &adapters, &tensors)?)
            }
            Self::Model { recipe, .. } => {
                let checkpoint = checkpoint.replaced(trained.tensors);
                let (output, options) =
                    (self.output(directory), Options { force: true, ..Options::default() });
                let outcome = with_progress(global, "writing", |on_progress| {
                    bevel_compress::convert(
                        &checkpoint,
                        recipe,
                        &output,
                        &options,
                        cpu,
                        on_progress,
                    )
                });
                completed(outcome, global)?;
                Ok(())
            }
        }
    }

    /// Names and values for the report.
    pub(super) fn settings(&self, trained: usize) -> Vec<(&'static str, String)> {
        match self {
            Self::Adapter(lora, patterns) => {
                let scale = if lora.rank_stabilized { "√r" } else { "r" };
                let lengths = if lora.dora { ", lengths of rows (DoRA)" } else { "" };
                let adapter = format!(
                    "rank {}, α = {}, α/{scale}{lengths}; {trained} numbers",
                    lora.rank, lora.alpha
                );
                let mut settings = vec![
                    ("adapter", adapter),
                    ("layers", lora.targets.join(", ")),
                    ("dropout", lora.dropout.to_string()),
                ];
                if !patterns.is_empty() {
                    settings.push(("trained whole", patterns.join(", ")));
                }
                settings
            }
            Self::Model { patterns, recipe, trained_for_it } => {
                let all = patterns.iter().any(|pattern| pattern == "*");
                let what = if all { "the whole model".to_owned() } else { patterns.join(", ") };
                let mut settings = vec![("trained", format!("{what}: {trained} numbers"))];
                if *trained_for_it {
                    settings.push(("trained for", recipe.base.to_string()));
                }
                settings
            }
        }
    }
}

/// The model that training begins with.
///
/// # Errors
/// Those of opening it.
pub(super) fn beginning(args: &Args, global: &Global) -> Result<Checkpoint> {
    if !args.scratch {
        return model::open(&args.model, global);
    }
    let path = model::resolve(&args.model, global)?;
    let is_weights = |path: &Path| {
        path.extension().is_some_and(|extension| extension == "safetensors" || extension == "bin")
    };
    let files = || std::fs::read_dir(&path).into_iter().flatten().flatten();
    let is_blank = path.is_dir() && !files().any(|file| is_weights(&file.path()));
    let checkpoint = if is_blank { Checkpoint::blank(&path)? } else { Checkpoint::open(&path)? };
    Ok(checkpoint.with_random_weights(global.seed.unwrap_or(0)))
}

/// Types stay what they are, but for trained matrices that are packed, which become halves.
fn own_types(checkpoint: &Checkpoint, patterns: &[String]) -> Recipe {
    let is_blank = checkpoint.weight_files().is_empty();
    let trained = checkpoint.tensors().iter().filter(|(name, entry)| {
        let is_matrix = entry.shape.dims().len() > 1;
        is_matrix && patterns.iter().any(|pattern| bevel_base::matches(pattern, name))
    });
    let own_type = |(name, entry): (&String, &Entry)| match checkpoint.file_dtype(name) {
        dtype @ (DType::F32 | DType::F16 | DType::BF16) if !is_blank && !entry.is_coded() => dtype,
        _ => DType::F16,
    };
    let types: Vec<(&String, DType)> = trained.map(|of| (of.0, own_type(of))).collect();
    let of = |pattern: &String, dtype| Override { pattern: pattern.clone(), dtype };
    let overrides = match types.as_slice() {
        // A recipe that can be read.
        [(_, first), rest @ ..] if rest.iter().all(|(_, dtype)| dtype == first) => {
            let matches_some = |pattern: &&String| {
                types.iter().any(|(name, _)| bevel_base::matches(pattern, name))
            };
            patterns.iter().filter(matches_some).map(|pattern| of(pattern, *first)).collect()
        }
        types => types.iter().map(|&(name, dtype)| of(name, dtype)).collect(),
    };
    Recipe { overrides, ..Recipe::new(Base::Keep) }
}

/// What the matrices of a model become in the types of a recipe.
fn roundings(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    cpu: &Cpu,
) -> Result<BTreeMap<String, Arc<dyn Rounding>>> {
    let mut roundings: BTreeMap<String, Arc<dyn Rounding>> = BTreeMap::new();
    for tensor in Preview::new(checkpoint, recipe)?.tensors {
        let rounding: Arc<dyn Rounding> = match tensor.to {
            Storage::Type(DType::TQ1_0 | DType::TQ2_0) => Arc::new(Ternary),
            Storage::Type(dtype) if dtype.is_packed() => Arc::new(AsStored(dtype)),
            Storage::Type(_) => continue,
            Storage::Codes(code) => {
                let rows = recipe.row_rounding(cpu, tensor.shape.row_len())?;
                Arc::new(InGroups(rows.with_context(|| {
                    format!("a model cannot be trained for {code}; choose W2, W3, W4, W8, or a type of GGUF files")
                })?))
            }
        };
        roundings.insert(tensor.name, rounding);
    }
    ensure!(
        !roundings.is_empty(),
        "{} is no type of few bits; choose one such as Q4_0",
        recipe.base
    );
    Ok(roundings)
}

/// Codes in groups of a row's columns.
#[derive(Debug)]
struct InGroups(RowRounding);

impl Rounding for InGroups {
    fn round(&self, _: f32, row: &mut [f32]) {
        if self.0.round(row).is_err() {
            row.fill(f32::NAN);
        }
    }
}
