//! What a run lost and won, for its report: divergence from the model it was made from, and speed.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use bevel_compress::{Calibration, CalibrationConfig, Source};
use bevel_eval::{BenchConfig, DivergenceConfig, Series, Text, available_memory};
use bevel_kernels::{Cpu, KvType};
use bevel_model::{Checkpoint, Model};

use crate::adapters::Adapters;
use crate::args::Global;
use crate::commands::eval::Compared;
use crate::report::run::Measured;
use crate::text;
use crate::ui::progress::{Progress, Unit};
use crate::ui::units::bytes;

/// Tokens that are measured on where nothing is said.
const TOKENS: usize = 4096;
/// Tokens that are measured on of a text that was named.
const TEXT_TOKENS: usize = 16384;
/// Tokens of a window of a text.
const CONTEXT: usize = 512;
/// Memory of a measurement beside the models: predictions of both for a part of a window.
const PREDICTIONS: u64 = 2 << 26;

/// What a run made its model from.
pub(crate) struct Original<'a> {
    /// What the user calls it.
    pub(crate) name: &'a str,
    pub(crate) checkpoint: &'a Checkpoint,
    /// What was merged into it: beside the model they are what the merged one is measured against.
    pub(crate) adapters: &'a Adapters,
}

/// What to measure on.
pub(crate) enum Subject {
    /// Sequences of the calibration's sources that calibration did not use.
    HeldOut(Calibration),
    /// A file that was named.
    File { path: PathBuf, content: String },
    /// What the model writes, started from a seed.
    Sampled(u64),
}

/// Sequences of `tokens` tokens to hold out.
pub(super) fn held_out(tokens: usize) -> usize {
    (TOKENS / tokens.max(1)).clamp(2, 64)
}

impl Subject {
    /// What `--eval` names: a text, or `self`.
    pub(crate) fn named(name: &str, seed: u64) -> Result<Self> {
        if name == "self" {
            return Ok(Self::Sampled(seed));
        }
        let path = PathBuf::from(name);
        let content = text::read(&path)?;
        Ok(Self::File { path, content })
    }

    /// True where it was not asked for, so that it must do no harm.
    fn is_default(&self) -> bool {
        matches!(self, Self::HeldOut(_))
    }

    /// Why it cannot be measured on, where nobody asked for it.
    pub(super) fn refusal(&self, source: &Path, out: &Path) -> Result<Option<String>> {
        if let Self::HeldOut(data) = self
            && data.sequences.is_empty()
        {
            return Ok(Some(
                "the calibration data hold no text that calibration did not use; --eval names another".to_owned(),
            ));
        }
        if !self.is_default() {
            return Ok(None);
        }
        let memory = |path: &Path| -> Result<u64> {
            let found = bevel_compress::inspect(path)?;
            Ok(found.memory(Some(CONTEXT), KvType::F16).map_or(found.file_bytes, |m| m.total))
        };
        let needed = memory(source)? + memory(out)? + PREDICTIONS;
        let wanted = format!("both models in memory take {}", bytes(needed));
        Ok(match available_memory() {
            Some(free) if needed <= free => None,
            Some(free) => Some(format!(
                "{wanted}, and {} are free; --eval measures nevertheless, and `bevel eval --against --base-logits` one model after the other",
                bytes(free)
            )),
            None => {
                Some(format!("{wanted}, and how much is free is not known here; --eval measures"))
            }
        })
    }

    /// The text, and what it is.
    fn text(&self, base: &Model, cpu: &Cpu, bar: &Progress) -> Result<(Text, usize, String)> {
        let tokenizer = base.checkpoint().tokenizer()?;
        let of = |data: &Calibration| {
            let context = data.sequences.first().map_or(0, Vec::len);
            (Text::of_tokens(&tokenizer, data.sequences.concat()), context)
        };
        let (text, context, what) = match self {
            Self::HeldOut(data) => {
                let (text, context) = of(data);
                (text, context, data.description.clone())
            }
            Self::File { path, content } => {
                let mut text = Text::encode(&tokenizer, content)?;
                text.truncate(TEXT_TOKENS);
                (text, CONTEXT.min(base.config().context), path.display().to_string())
            }
            Self::Sampled(seed) => {
                let tokens = CONTEXT.min(base.config().context);
                let (samples, seed) = (held_out(tokens), *seed);
                let config = CalibrationConfig {
                    source: Source::Sampled,
                    samples,
                    tokens,
                    seed,
                    field: None,
                };
                let data = config.sample(base, cpu, &tokenizer, &mut |done, total| {
                    bar.set_total(total as u64);
                    bar.set(done as u64);
                    std::ops::ControlFlow::Continue(())
                })?;
                let (text, context) = of(&data);
                (text, context, format!("text that the model wrote, seed {seed}"))
            }
        };
        Ok((text, context, what))
    }

    /// Measures the model at `out`, which the user calls `name`, against its source.
    pub(super) fn measure(
        &self,
        name: &str,
        source: &Original<'_>,
        out: &Path,
        cpu: &Cpu,
        global: &Global,
    ) -> Result<Measured> {
        let start = Instant::now();
        let bar = Progress::new(global, "measuring", 0, Unit::Items);
        let load =
            |checkpoint| Ok::<Model, anyhow::Error>(Model::load(checkpoint, cpu, &mut |_| ())?);
        let path: &Path = source.checkpoint.path().as_ref();
        let own = Checkpoint::open(path)?;
        let adapters = source.adapters.open(&own)?;
        let base = adapters.beside(load(adapters.replacing(own))?, cpu)?;
        let (text, context, what) = self.text(&base, cpu, &bar)?;
        let model = load(Checkpoint::open(out)?)?;
        let config = DivergenceConfig { context, kv_type: KvType::F16, base_kv_type: KvType::F16 };
        let divergence = config
            .compare(&base, &model, cpu, &text, &mut |running| {
                bar.set_total(running.total as u64);
                bar.set(running.done as u64);
            })
            .with_context(|| format!("measuring on {what}"))?;
        let bench = BenchConfig {
            prompt: 256.min(base.config().context),
            decode: 32.min(base.config().context),
            sequences: 1,
            repetitions: 3,
            depth: 0,
            context: None,
            kv_type: KvType::F16,
        };
        let (speed, base_speed) =
            (bench.run(&model, cpu, &mut |_| ())?, bench.run(&base, cpu, &mut |_| ())?);
        let decode = |series: &Option<Series>| series.as_ref().map_or(0.0, |s| s.spread.median);
        let names = [name, source.name];
        let compared =
            Compared::new(names, out, Some(path), what.into(), context, cpu, divergence)?;
        Ok(Measured {
            compared,
            decode_tokens_per_second: decode(&speed.decode),
            speed,
            base_speed,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}
