//! The options of `bevel finetune`.

use std::path::PathBuf;

use bevel_compress::Base;
use bevel_train::{OptimizerKind, Schedule, Start, Target};
use clap::ValueEnum;

const EXPLANATION: &str = "\
Trains an adapter (LoRA): small matrices beside the model's own, which stay as they are, in whatever format \
the file has them. DIR becomes an adapter as PEFT writes and reads them.

With --full the model's own weights are trained, with --train some of them, and DIR gets a model: model.gguf. That \
takes 16 bytes of memory for each number that is trained (12 with --optimizer lion, 10 with adamw8bit). --scratch begins \
with random weights; MODEL may then be a directory with a config.json and a tokenizer alone. --qat trains for a type of \
few bits, so that the model that is written in it is as good as the one that was trained.

DATA is files or directories of them, hub:owner/name[:split] for a data set of the hub, or - for lines of JSON on stdin. \
JSON, a line each or an array, has an object for each example:
  {\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, {\"role\": \"assistant\", \"content\": \"...\"}]}
  {\"prompt\": \"...\", \"completion\": \"...\"}
  {\"text\": \"...\"}
ShareGPT's `conversations` and Alpaca's `instruction`, `input` and `output` are known as well. Columns of CSV and Parquet \
have the same names. A file that ends in .txt or .md is one text. What an assistant says is learnt, and completions \
and texts; prompts are read only.

With --dpo a record is a prompt and two answers, texts or lists of messages, of which the first was preferred:
  {\"prompt\": \"...\", \"chosen\": \"...\", \"rejected\": \"...\"}";

/// The options that are about adapters.
const ADAPTER: [&str; 10] = [
    "rank",
    "alpha",
    "rslora",
    "dora",
    "targets",
    "modules_to_save",
    "from",
    "dropout",
    "init",
    "loftq",
];

/// Options of `bevel finetune`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    pub(super) model: String,

    /// What to learn: files, directories, or hub:owner/name[:split]
    #[arg(required = true)]
    pub(super) data: Vec<String>,

    /// The directory to write the adapter or the model to
    #[arg(short, long, value_name = "DIR")]
    pub(super) output: PathBuf,

    /// Train the whole model instead of an adapter, and write it to DIR/model.gguf
    #[arg(long, conflicts_with_all = ADAPTER, help_heading = "Models")]
    pub(super) full: bool,

    /// Train these tensors instead of an adapter, with commas between: embeddings, head, norms, or patterns of names as
    /// blk.2?.ffn_*
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = tensors, conflicts_with_all = ADAPTER, conflicts_with = "full", help_heading = "Models")]
    pub(super) train: Vec<String>,

    /// Train the whole model from random weights; MODEL says its shape and tokenizer
    #[arg(long, conflicts_with_all = ADAPTER, conflicts_with = "train", help_heading = "Models")]
    pub(super) scratch: bool,

    /// Train the whole model for a type of few bits, in which it is written: Q4_0, Q4_K_M, TQ2_0 (ternary, as BitNet b1.58),
    /// and others of `bevel quantize`
    #[arg(long, value_name = "TYPE", conflicts_with_all = ADAPTER, conflicts_with = "train", help_heading = "Models")]
    pub(super) qat: Option<Base>,

    /// Type of the model that is written [default: its own, or F16 where that is quantized or there is none]
    #[arg(long = "type", value_name = "TYPE", conflicts_with_all = ADAPTER, conflicts_with = "qat", help_heading = "Models")]
    pub(super) base: Option<Base>,

    /// Rank of the adapter's matrices
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Adapter")]
    pub(super) rank: u16,

    /// The adapter counts ALPHA / R times
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0, allow_negative_numbers = true, value_parser = positive, help_heading = "Adapter")]
    pub(super) alpha: f64,

    /// The adapter counts ALPHA / sqrt(R) times (rsLoRA)
    #[arg(long, help_heading = "Adapter")]
    pub(super) rslora: bool,

    /// Learn the lengths of the adapted weights' rows as well (DoRA)
    #[arg(long, help_heading = "Adapter")]
    pub(super) dora: bool,

    /// Train these tensors whole and keep them in the adapter, with commas between: embeddings, head, norms, or patterns
    /// of names
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = tensors, help_heading = "Adapter")]
    pub(super) modules_to_save: Vec<String>,

    /// The layers that have an adapter, with commas between: all-linear, attention (q, k, v, o), mlp (gate, up, down), some of
    /// q, k, v, o, gate, up and down, or patterns as blk.1?.attn_*
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "all-linear",
        value_parser = targets,
        help_heading = "Adapter"
    )]
    pub(super) targets: Vec<Targets>,

    /// Begin with an adapter that exists, of the same --rank, --alpha, --targets and so on
    #[arg(long, value_name = "ADAPTER", conflicts_with = "init", help_heading = "Adapter")]
    pub(super) from: Option<PathBuf>,

    /// Probability that an adapter does not see an input
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true, value_parser = part, help_heading = "Adapter")]
    pub(super) dropout: f64,

    /// What the adapter's matrices begin with
    #[arg(long, value_name = "NAME", default_value = "uniform", help_heading = "Adapter")]
    pub(super) init: StartName,

    /// Begin with what MODEL lost when it was quantized from this one (LoftQ)
    #[arg(long, value_name = "ORIGINAL", conflicts_with_all = ["init", "from"], help_heading = "Adapter")]
    pub(super) loftq: Option<String>,

    /// Times that every example is seen
    #[arg(long, value_name = "N", default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    pub(super) epochs: f64,

    /// Steps, whatever --epochs says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000), help_heading = "Training")]
    pub(super) steps: Option<u64>,

    /// Examples of a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Training")]
    pub(super) batch: u16,

    /// Learning rate at its highest [default: 2e-4 for an adapter, 2e-5 for a model, 1e-3 from scratch]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    pub(super) lr: Option<f64>,

    /// What updates the numbers that are trained
    #[arg(long, value_name = "NAME", default_value = "adamw", help_heading = "Training")]
    pub(super) optimizer: OptimizerName,

    /// Keep the optimizer's state in a file in DIR, which the system pages out when memory is short
    #[arg(long, help_heading = "Training")]
    pub(super) page_optimizer: bool,

    /// How the learning rate falls
    #[arg(long, value_name = "NAME", default_value = "cosine", help_heading = "Training")]
    pub(super) schedule: ScheduleName,

    /// Part of the steps in which the learning rate rises
    #[arg(long, value_name = "PART", default_value_t = 0.03, allow_negative_numbers = true, value_parser = part, help_heading = "Training")]
    pub(super) warmup: f64,

    /// Part of every weight that is lost in a step, times the learning rate; norms and biases lose nothing
    #[arg(long, value_name = "LAMBDA", default_value_t = 0.0, allow_negative_numbers = true, value_parser = not_negative, help_heading = "Training")]
    pub(super) weight_decay: f64,

    /// Largest norm of a gradient
    #[arg(long, value_name = "NORM", default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    pub(super) clip: f64,

    /// Part of the examples that is not learnt and tells how well the others were
    #[arg(long, value_name = "PART", default_value_t = 0.05, allow_negative_numbers = true, value_parser = part, help_heading = "Training")]
    pub(super) held_out: f64,

    /// Measure that every so many steps [default: a tenth of all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Training")]
    pub(super) evaluate_every: Option<u64>,

    /// End after so many of these measurements that found no lower loss
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Training")]
    pub(super) patience: Option<u32>,

    /// Write what had the lowest of these losses, and not the last
    #[arg(long, help_heading = "Training")]
    pub(super) keep_best: bool,

    /// Take examples in their order, and not in a random one
    #[arg(long, help_heading = "Training")]
    pub(super) in_order: bool,

    /// Learn which of two answers is preferred (DPO), from pairs: `prompt`, `chosen`, `rejected`
    #[arg(long, value_name = "BETA", num_args = 0..=1, default_missing_value = "0.1", allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    pub(super) dpo: Option<f64>,

    /// Move embeddings by noise of this size while training (NEFTune; 5 is usual)
    #[arg(long, value_name = "ALPHA", default_value_t = 0.0, allow_negative_numbers = true, value_parser = not_negative, help_heading = "Training")]
    pub(super) neftune: f64,

    /// Most tokens of an example; longer ones are cut off
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..), help_heading = "Training")]
    pub(super) ctx: u32,

    /// Learn prompts as well
    #[arg(long, help_heading = "Training")]
    pub(super) train_on_prompt: bool,

    /// Render conversations by this Jinja template instead of the model's own; `chatml` for the format of that name
    #[arg(long, value_name = "FILE", help_heading = "Training")]
    pub(super) chat_template: Option<String>,

    /// Multiply single-precision numbers, and never bf16
    #[arg(long, help_heading = "Training")]
    pub(super) exact: bool,

    /// Keep the inputs of every N layers only, and compute the rest twice: less memory, and a third more time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), num_args = 0..=1, default_missing_value = "1", help_heading = "Training")]
    pub(super) recompute: Option<u16>,

    /// Show what the run would do and what memory it would take, and train nothing
    #[arg(long)]
    pub(super) dry_run: bool,

    /// Write the figures of every step into DIR as well, for TensorBoard
    #[arg(long, value_name = "DIR")]
    pub(super) tensorboard: Option<PathBuf>,

    /// Write a checkpoint every so many steps [default: a tenth of all, or more where that takes long]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) checkpoint_every: Option<u64>,

    /// Go on with a run into this directory that was stopped, from its last checkpoint
    #[arg(long)]
    pub(super) resume: bool,

    /// Replace an adapter, a model or a checkpoint that exists
    #[arg(long)]
    pub(super) force: bool,
}

/// Patterns of the layers that a name stands for.
#[derive(Clone, Debug)]
pub(super) struct Targets(pub(super) Vec<String>);

fn targets(name: &str) -> Result<Targets, String> {
    let targets: &[Target] = match name {
        "all-linear" => &Target::ALL,
        "attention" => &Target::ALL[..4],
        "mlp" => &Target::ALL[4..],
        "q" => &[Target::Query],
        "k" => &[Target::Key],
        "v" => &[Target::Value],
        "o" => &[Target::Output],
        "gate" => &[Target::Gate],
        "up" => &[Target::Up],
        "down" => &[Target::Down],
        pattern if pattern.starts_with("blk.") => return Ok(Targets(vec![pattern.to_owned()])),
        _ => {
            return Err("expected all-linear, attention, mlp, q, k, v, o, gate, up, down, or a pattern as blk.*.attn_q".to_owned());
        }
    };
    Ok(Targets(targets.iter().map(|target| target.everywhere()).collect()))
}

/// The pattern that a name of tensors stands for.
fn tensors(name: &str) -> Result<String, String> {
    match name {
        "embeddings" => Ok("token_embd.weight".to_owned()),
        "head" => Ok("output.weight".to_owned()),
        "norms" => Ok("*norm.weight".to_owned()),
        pattern if pattern.contains(['.', '*']) => Ok(pattern.to_owned()),
        _ => {
            Err("expected embeddings, head, norms, or a pattern as blk.*.attn_v.weight".to_owned())
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum StartName {
    /// A uniform, B zero
    Uniform,
    /// A normal, B zero
    Gaussian,
    /// The principal singular vectors of each matrix (PiSSA)
    Pissa,
}

impl From<StartName> for Start {
    fn from(name: StartName) -> Self {
        match name {
            StartName::Uniform => Self::Uniform,
            StartName::Gaussian => Self::Gaussian,
            StartName::Pissa => Self::Pissa,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OptimizerName {
    /// 8 bytes of state for each number
    Adamw,
    /// AdamW with 8-bit moments: 2 bytes
    Adamw8bit,
    /// 4 bytes; wants a tenth of AdamW's learning rate
    Lion,
}

impl From<OptimizerName> for OptimizerKind {
    fn from(name: OptimizerName) -> Self {
        match name {
            OptimizerName::Adamw => Self::AdamW,
            OptimizerName::Adamw8bit => Self::AdamW8bit,
            OptimizerName::Lion => Self::Lion,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ScheduleName {
    Cosine,
    Linear,
    Constant,
}

impl From<ScheduleName> for Schedule {
    fn from(name: ScheduleName) -> Self {
        match name {
            ScheduleName::Cosine => Self::Cosine,
            ScheduleName::Linear => Self::Linear,
            ScheduleName::Constant => Self::Constant,
        }
    }
}

fn number(text: &str, fits: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|&value: &f64| value.is_finite() && fits(value));
    value.ok_or_else(|| format!("expected {expected}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0, "a number above 0")
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |value| value >= 0.0, "a number from 0 up")
}

fn part(text: &str) -> Result<f64, String> {
    number(text, |value| (0.0..1.0).contains(&value), "a number from 0 up, less than 1")
}
