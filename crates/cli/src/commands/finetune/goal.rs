//! What a run trains, and what it writes: an adapter, or a model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use bevel_base::DType;
use bevel_compress::{Base, Options, Override, Preview, Recipe, Storage};
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use bevel_train::{
    AsStored, LoraConfig, Network, Parameters, Rounding, Ternary, Trainable, write_adapter,
};

use super::Args;
use crate::args::Global;
use crate::commands::quantize::{completed, with_progress};
use crate::model;

/// What is made of a model.
pub(super) enum Goal {
    /// Matrices beside it.
    Adapter(LoraConfig),
    /// Another model: that with other weights in its tensors that match these patterns.
    Model { patterns: Vec<String>, recipe: Box<Recipe>, trained_for_it: bool },
}

impl Goal {
    pub(super) fn of(args: &Args, checkpoint: &Checkpoint, global: &Global) -> Self {
        let is_whole = args.full || args.scratch || args.qat.is_some();
        let patterns = if is_whole { vec!["*".to_owned()] } else { args.train.clone() };
        if patterns.is_empty() {
            return Self::Adapter(args.lora_config(global));
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
            Self::Adapter(_) => "adapter",
            Self::Model { .. } => "model",
        }
    }

    /// The part of a trained model that is looked at.
    pub(super) fn output(&self, directory: &Path) -> PathBuf {
        match self {
            Self::Adapter(_) => directory.to_owned(),
            Self::Model { .. } => directory.join("model.gguf"),
        }
    }

    /// What is trained.
    ///
    /// # Errors
    /// Where there is no such tensor, and where a model cannot be trained for a type.
    pub(super) fn trainable(&self, checkpoint: &Checkpoint) -> Result<Trainable> {
        let (patterns, recipe, trained_for_it) = match self {
            Self::Adapter(lora) => return Ok(Trainable::lora(lora.clone())),
            Self::Model { patterns, recipe, trained_for_it } => (patterns, recipe, *trained_for_it),
        };
        for pattern in patterns {
            let is_there =
                checkpoint.tensors().keys().any(|name| bevel_base::matches(pattern, name));
            let tied = checkpoint.config().tied && pattern == "output.weight";
            ensure!(!tied, "the head of this model is its embedding; say `--train embeddings`");
            ensure!(
                is_there,
                "no tensor of this model is called `{pattern}`; `bevel inspect --tensors` lists their names"
            );
        }
        recipe.check()?;
        let roundings =
            if trained_for_it { roundings(checkpoint, recipe)? } else { BTreeMap::new() };
        Ok(Trainable { lora: None, tensors: patterns.clone(), roundings })
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
        match (self, trained) {
            (Self::Adapter(lora), Trained::Adapters(adapters)) => {
                Ok(write_adapter(directory, base, checkpoint.config(), lora, &adapters)?)
            }
            (Self::Model { recipe, .. }, Trained::Tensors(tensors)) => {
                let checkpoint = checkpoint.replaced(tensors);
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
            _ => unreachable!("what was trained is what was to be"),
        }
    }

    /// Names and values for the report.
    pub(super) fn settings(&self, trained: usize) -> Vec<(&'static str, String)> {
        match self {
            Self::Adapter(lora) => {
                let scale = if lora.rank_stabilized { "√r" } else { "r" };
                vec![
                    (
                        "adapter",
                        format!(
                            "rank {}, α = {}, α/{scale}; {trained} numbers",
                            lora.rank, lora.alpha
                        ),
                    ),
                    ("layers", lora.targets.join(", ")),
                    ("dropout", lora.dropout.to_string()),
                ]
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

/// What a network holds after training.
pub(super) enum Trained {
    Adapters(Vec<bevel_train::Adapter>),
    Tensors(Vec<(String, Arc<[f32]>)>),
}

impl Trained {
    pub(super) fn of(goal: &Goal, network: &Network<'_>, parameters: &Parameters) -> Self {
        match goal {
            Goal::Adapter(_) => Self::Adapters(network.adapters(parameters)),
            Goal::Model { .. } => Self::Tensors(network.tensors(parameters)),
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
    let overrides = trained.map(|(name, entry)| {
        let dtype = match checkpoint.file_dtype(name) {
            dtype @ (DType::F32 | DType::F16 | DType::BF16) if !is_blank && !entry.is_coded() => {
                dtype
            }
            _ => DType::F16,
        };
        Override { pattern: name.clone(), dtype }
    });
    Recipe { overrides: overrides.collect(), ..Recipe::new(Base::Keep) }
}

/// What the matrices of a model become in the types of a recipe.
fn roundings(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
) -> Result<BTreeMap<String, Arc<dyn Rounding>>> {
    if let Base::Grouped(code) = recipe.base {
        bail!(
            "a model cannot be trained for {code}, whose codes are in groups; choose a type of GGUF files, such as Q4_0"
        );
    }
    let mut roundings: BTreeMap<String, Arc<dyn Rounding>> = BTreeMap::new();
    for tensor in Preview::new(checkpoint, recipe)?.tensors {
        match tensor.to {
            Storage::Type(DType::TQ1_0 | DType::TQ2_0) => {
                roundings.insert(tensor.name, Arc::new(Ternary));
            }
            Storage::Type(dtype) if dtype.is_packed() => {
                roundings.insert(tensor.name, Arc::new(AsStored(dtype)));
            }
            _ => {}
        }
    }
    if roundings.is_empty() {
        bail!("{} is no type of few bits; choose one such as Q4_0", recipe.base);
    }
    Ok(roundings)
}
