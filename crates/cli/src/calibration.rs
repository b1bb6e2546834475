//! What a model is shown while it is watched: the options that say so, and the tokens.

use std::ops::ControlFlow;

use anyhow::{Result, bail};
use bevel_compress::{Calibration, CalibrationConfig, Source};
use bevel_formats::hub::{self, HubConfig};
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;

use crate::args::Global;
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::progress::{Fetch, Progress, Unit};

/// Options of verbs that watch a model at work.
#[derive(Debug, clap::Args)]
pub(crate) struct CalibrationArgs {
    /// What the model is shown: files or directories, hub:owner/name[:split], or `self`; repeatable
    #[arg(long, value_name = "SOURCE")]
    calib: Vec<String>,

    /// Calibration sequences [default: 128]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    calib_samples: Option<usize>,

    /// Tokens of each calibration sequence [default: 512]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    calib_tokens: Option<usize>,

    /// The field of a record that holds its text or messages
    #[arg(long, value_name = "NAME")]
    calib_field: Option<String>,
}

impl CalibrationArgs {
    /// A flag that was given, if any was.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let given = [
            ("--calib", !self.calib.is_empty()),
            ("--calib-samples", self.calib_samples.is_some()),
            ("--calib-tokens", self.calib_tokens.is_some()),
            ("--calib-field", self.calib_field.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }

    /// Changes what the options say.
    pub(crate) fn apply(&self, config: &mut CalibrationConfig, global: &Global) -> Result<()> {
        if !self.calib.is_empty() {
            config.source = sources(&self.calib)?;
        }
        config.samples = self.calib_samples.unwrap_or(config.samples);
        config.tokens = self.calib_tokens.unwrap_or(config.tokens);
        config.seed = global.seed.unwrap_or(config.seed);
        config.field = self.calib_field.clone().or(config.field.take());
        Ok(())
    }
}

/// One source, or several files.
fn sources(names: &[String]) -> Result<Source> {
    if let [name] = names {
        return Ok(name.parse()?);
    }
    let mut files = Vec::new();
    for name in names {
        match name.parse()? {
            Source::Files(paths) => files.extend(paths),
            other => bail!("`{other}` cannot be joined with other calibration data; give it alone"),
        }
    }
    Ok(Source::Files(files))
}

/// The data that is asked for: read, fetched, or written by the model itself.
pub(crate) fn load(
    config: &CalibrationConfig,
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    global: &Global,
) -> Result<Calibration> {
    Ok(load_with_held_out(config, 0, checkpoint, cpu, global)?.0)
}

/// As [`load`], with up to `held_out` sequences to measure on.
pub(crate) fn load_with_held_out(
    config: &CalibrationConfig,
    held_out: usize,
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    global: &Global,
) -> Result<(Calibration, Calibration)> {
    let mut fetch = |repo: &hub::RepoId| {
        hub::fetch_data_set(&HubConfig::from_env(), repo, hub::ENOUGH, &mut Fetch::new(global))
    };
    let bar = Progress::new(global, "sampling text", 0, Unit::Items);
    let mut on_tokens = |done: usize, total: usize| {
        bar.set_total(total as u64);
        bar.set(done as u64);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome = config.load_with_held_out(checkpoint, cpu, held_out, &mut fetch, &mut on_tokens);
    drop(bar);
    let found = match outcome {
        Err(bevel_compress::Error::Stopped) => return Err(Interrupted.into()),
        outcome => outcome?,
    };
    found.0.warnings.iter().for_each(|warning| global.warn(warning));
    Ok(found)
}
