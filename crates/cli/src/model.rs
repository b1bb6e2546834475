//! From what the user calls a model to a model that runs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bevel_formats::hub::{self, HubConfig};
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Model};

use crate::args::Global;
use crate::embedded;
use crate::ui::progress::{Fetch, Progress, Unit};

/// The path of a MODEL argument: a path that exists, the embedded model, an alias or a hub name,
/// which is fetched if need be.
pub(crate) fn resolve(name: &str, global: &Global) -> Result<PathBuf> {
    resolve_with(name, &HubConfig::from_env(), global)
}

/// As [`resolve`], with other settings than the environment's.
pub(crate) fn resolve_with(name: &str, config: &HubConfig, global: &Global) -> Result<PathBuf> {
    if name == embedded::NAME && !PathBuf::from(name).exists() {
        return embedded::unpack(&config.bevel_cache);
    }
    Ok(hub::resolve(name, config, &mut Fetch::new(global))?)
}

/// Opens a MODEL argument: headers only.
pub(crate) fn open(name: &str, global: &Global) -> Result<Checkpoint> {
    Ok(Checkpoint::open(&resolve(name, global)?)?)
}

/// The processor with the threads asked for.
pub(crate) fn cpu(global: &Global) -> Result<Cpu> {
    Cpu::new(global.threads).map_err(anyhow::Error::msg)
}

/// The tokenizer that comes with a model.
pub(crate) fn tokenizer(checkpoint: &Checkpoint, global: &Global) -> Result<Tokenizer> {
    let tokenizer = match (checkpoint.hf_dir(), checkpoint.gguf_metadata()) {
        (Some(dir), _) => Tokenizer::from_hf(dir),
        (None, Some(metadata)) => Tokenizer::from_gguf(metadata),
        (None, None) => anyhow::bail!("`{}` has no tokenizer", checkpoint.path()),
    };
    let tokenizer =
        tokenizer.with_context(|| format!("`{}`: no usable tokenizer", checkpoint.path()))?;
    for warning in tokenizer.warnings() {
        global.warn(warning);
    }
    Ok(tokenizer)
}

/// A model in memory with all that is needed to run it.
pub(crate) struct Loaded {
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) cpu: Cpu,
    /// Time from opening the files to a model that runs.
    pub(crate) load_time: Duration,
}

/// Loads a MODEL argument.
pub(crate) fn load(name: &str, global: &Global) -> Result<Loaded> {
    let path = resolve(name, global)?;
    let cpu = cpu(global)?;
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = tokenizer(&checkpoint, global)?;
    let bar = Progress::new(global, "loading", checkpoint.tensor_bytes(), Unit::Bytes);
    let model = Model::load(checkpoint, &cpu, &mut |bytes| bar.set(bytes))?;
    Ok(Loaded { model, tokenizer, cpu, load_time: start.elapsed() })
}
