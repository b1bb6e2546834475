//! Options that `run` and `chat` share: how tokens are chosen, and how long the answer gets.

use anyhow::{Result, bail};
use bevel_kernels::KvType;
use bevel_model::{GenerateOptions, ModelConfig, SamplerConfig};
use clap::{Args, ValueEnum};

use crate::args::Global;
use crate::generation::GenerationConfig;

/// Where nothing is said, neither by the user nor by the model's `generation_config.json`, the
/// defaults are llama.cpp's.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct Sampling {
    /// Temperature; 0 takes the likeliest token [default: the model's own, or 0.8]
    #[arg(long, value_name = "T", value_parser = non_negative, allow_negative_numbers = true)]
    pub(crate) temp: Option<f32>,

    /// Choose among the K likeliest tokens; 0 for all [default: the model's own, or 40]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub(crate) top_k: Option<usize>,

    /// Choose among the likeliest tokens that together have probability P; 1 for all [default: the
    /// model's own, or 0.95]
    #[arg(long, value_name = "P", value_parser = probability, allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,

    /// Leave out tokens less than P times as likely as the likeliest; 0 for none [default: the
    /// model's own, or 0.05]
    #[arg(long, value_name = "P", value_parser = probability, allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,

    /// Make tokens that came up lately less likely by this factor; 1 for off [default: the model's
    /// own, or 1]
    #[arg(long, value_name = "FACTOR", value_parser = positive, allow_negative_numbers = true)]
    pub(crate) repeat_penalty: Option<f32>,

    /// How many tokens count as lately
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 64)]
    pub(crate) repeat_last_n: usize,

    /// Longest answer, in tokens [default: what the context holds]
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) max_tokens: Option<usize>,

    /// End the answer where this text appears; may be given more than once
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) stop: Vec<String>,
}

/// Options of the arithmetic, shared by all verbs that run a model.
#[derive(Clone, Debug, Args)]
pub(crate) struct Products {
    /// Multiply with activations as they are, instead of rounded to 8 bits where weights are integers: a
    /// prompt takes about four times as long, a token of the answer over thirty times
    #[arg(long)]
    pub(crate) exact: bool,
}

/// Options of the key–value memory, shared by all verbs that run a model.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Context")]
pub(crate) struct Kv {
    /// Storage of keys and values
    #[arg(long, alias = "kv-type", value_name = "TYPE", default_value = "f16")]
    pub(crate) kv: KvName,
}

/// A [`KvType`] by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvName {
    /// Half precision, 16 bits
    F16,
    /// Single precision, 32 bits
    F32,
    /// The upper 16 bits of a single-precision number
    Bf16,
    /// 8-bit integers, 8.5 bits a value
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit integers, 4.5 bits a value, rotated so that outliers cost less
    #[value(name = "q4_0")]
    Q4_0,
    /// q8_0, rotated
    #[value(name = "q8_0-rotated")]
    Q8_0Rotated,
    /// q4_0 without rotation
    #[value(name = "q4_0-plain")]
    Q4_0Plain,
}

impl From<KvName> for KvType {
    fn from(name: KvName) -> Self {
        match name {
            KvName::F16 => KvType::F16,
            KvName::F32 => KvType::F32,
            KvName::Bf16 => KvType::BF16,
            KvName::Q8_0 => KvType::Q8_0 { rotated: false },
            KvName::Q4_0 => KvType::Q4_0 { rotated: true },
            KvName::Q8_0Rotated => KvType::Q8_0 { rotated: true },
            KvName::Q4_0Plain => KvType::Q4_0 { rotated: false },
        }
    }
}

impl Sampling {
    /// These options, with the gaps filled by the model's and then by the general defaults.
    pub(crate) fn options(
        &self,
        model: &GenerationConfig,
        seed: u64,
        ignore_eos: bool,
    ) -> GenerateOptions {
        let usual = model.sampler();
        let sampler = SamplerConfig {
            temperature: self.temp.unwrap_or(usual.temperature),
            top_k: self.top_k.unwrap_or(usual.top_k),
            top_p: self.top_p.unwrap_or(usual.top_p),
            min_p: self.min_p.unwrap_or(usual.min_p),
            repetition_penalty: self.repeat_penalty.unwrap_or(usual.repetition_penalty),
            repetition_window: self.repeat_last_n,
            seed,
            ..usual
        };
        GenerateOptions {
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            ignore_eos,
            sampler,
        }
    }
}

/// Longest context that is set aside unless the user or the prompt asks for more.
pub(crate) const USUAL_CONTEXT: usize = 8192;

/// The context to run with: what `--ctx` says, or as much as the model was trained on, up to
/// [`USUAL_CONTEXT`] or what `wanted` tokens need.
pub(crate) fn context(
    asked: Option<usize>,
    wanted: usize,
    config: &ModelConfig,
    global: &Global,
) -> Result<usize> {
    match asked {
        Some(0) => bail!("a context of 0 tokens holds nothing; give a larger --ctx"),
        Some(asked) => {
            if asked > config.context {
                global.warn(format!(
                    "the model was trained on {} tokens of context; beyond them (--ctx {asked}) it gets worse",
                    config.context
                ));
            }
            Ok(asked)
        }
        None => Ok(config.context.min(wanted.max(USUAL_CONTEXT))),
    }
}

fn number(text: &str, fits: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|&v: &f32| v.is_finite() && fits(v));
    value.ok_or_else(|| format!("expected {expected}"))
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |v| v >= 0.0, "a number from 0 up")
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, |v| v > 0.0, "a number above 0")
}

fn probability(text: &str) -> Result<f32, String> {
    number(text, |v| (0.0..=1.0).contains(&v), "a number from 0 to 1")
}
