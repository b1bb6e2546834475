//! From what the user calls a model to a model that runs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bevel_formats::hub::{self, HubConfig};
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Model, Weights};

use crate::adapters::Adapters;
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
    match hub::resolve(name, config, &mut Fetch::new(global)) {
        Err(hub::Error::NoSuchPath { path }) => bail!(no_such_path(path)),
        resolved => Ok(resolved?),
    }
}

/// Why a MODEL argument leads nowhere.
fn no_such_path(path: String) -> String {
    match std::fs::read_link(&path) {
        Ok(target) => {
            format!("`{path}` is a link to `{}`, which does not exist", target.display())
        }
        // The hub knows its own names; the embedded model is one more.
        Err(_) => format!("{}, `{}`", hub::Error::NoSuchPath { path }, embedded::NAME),
    }
}

/// Opens a MODEL argument: headers only.
pub(crate) fn open(name: &str, global: &Global) -> Result<Checkpoint> {
    Ok(Checkpoint::open(&resolve(name, global)?)?)
}

/// The processor with the threads asked for.
pub(crate) fn cpu(global: &Global) -> Result<Cpu> {
    Cpu::new(global.threads).map_err(anyhow::Error::msg)
}

/// The tokenizer that comes with a model; what it had to guess is told.
pub(crate) fn tokenizer(checkpoint: &Checkpoint, global: &Global) -> Result<Tokenizer> {
    let tokenizer = checkpoint.tokenizer()?;
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

/// Loads a MODEL argument, with adapters beside it. Where `exact`, activations are not rounded.
pub(crate) fn load(
    name: &str,
    exact: bool,
    adapters: &Adapters,
    global: &Global,
) -> Result<Loaded> {
    let path = resolve(name, global)?;
    let cpu = cpu(global)?;
    let start = Instant::now();
    let (model, tokenizer) = load_on(&cpu, &path, exact, adapters, global)?;
    Ok(Loaded { model, tokenizer, cpu, load_time: start.elapsed() })
}

/// Loads the model at a path, to run on `cpu` with adapters beside it.
pub(crate) fn load_on(
    cpu: &Cpu,
    path: &Path,
    exact: bool,
    adapters: &Adapters,
    global: &Global,
) -> Result<(Model, Tokenizer)> {
    let checkpoint = Checkpoint::open(path)?;
    // Before a large model is read.
    let adapters = adapters.open(&checkpoint)?;
    let checkpoint = adapters.replacing(checkpoint);
    // A large vocabulary takes as long as the weights of a small model.
    let (tokenizer, weights) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| tokenizer(&checkpoint, global));
        let bar = Progress::new(global, "loading", checkpoint.tensor_bytes(), Unit::Bytes);
        let read = if exact { Weights::load_exact } else { Weights::load };
        let weights = read(&checkpoint, cpu, &mut |bytes| bar.set(bytes));
        (tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), weights)
    });
    let (tokenizer, weights) = (tokenizer?, weights?);
    checkpoint.warnings().iter().chain(weights.warnings()).for_each(|warning| global.warn(warning));
    Ok((adapters.beside(Model::new(checkpoint, weights), cpu)?, tokenizer))
}
