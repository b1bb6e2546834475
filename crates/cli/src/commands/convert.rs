//! `bevel convert`.

use std::path::PathBuf;

use anyhow::Result;
use bevel_compress::{Base, Mix, Recipe, Target};

use super::quantize::{Writing, finish, with_progress};
use crate::args::Global;
use crate::model;
use crate::ui::interrupt;

/// Options of `bevel convert`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// What to write: a name that ends in `.gguf` makes a GGUF file, any other a Hugging Face
    /// directory
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,

    /// Type of the weights
    #[arg(long, value_name = "TYPE", default_value = "keep")]
    dtype: FloatType,

    #[command(flatten)]
    writing: Writing,
}

/// What weights can become without being quantized.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum FloatType {
    /// As they are
    Keep,
    F32,
    F16,
    Bf16,
}

const EXPLANATION: &str = "\
Converts a Hugging Face directory to a GGUF file and back, changes the type of the weights, joins the \
shards of a split file, or splits it (--shard-size). Tokenizer, chat template and configuration go along; \
GGUF keys that bevel does not know are kept from GGUF to GGUF.

In a Hugging Face directory quantized weights become F16, or the type that --dtype says, and files are \
split at 5 GB unless --shard-size says otherwise.";

/// As in the hub's own tools.
const HF_SHARD_BYTES: u64 = 5_000_000_000;

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let base = match args.dtype {
        FloatType::Keep => Some(Base::Keep),
        FloatType::F32 => Mix::named("F32").map(Base::Mix),
        FloatType::F16 => Mix::named("F16").map(Base::Mix),
        FloatType::Bf16 => Mix::named("BF16").map(Base::Mix),
    };
    let recipe = Recipe::new(base.unwrap_or(Base::Keep));
    let checkpoint = model::open(&args.model, global)?;
    args.writing.may_report(checkpoint.path().as_ref(), &args.output)?;
    let cpu = model::cpu(global)?;
    let mut options = args.writing.options();
    if Target::of(&args.output) == Target::HuggingFace {
        options.shard_bytes = options.shard_bytes.or(Some(HF_SHARD_BYTES));
    }
    let _handler = interrupt::handle();
    let outcome = with_progress(global, "converting", |on_progress| {
        bevel_compress::convert(&checkpoint, &recipe, &args.output, &options, &cpu, on_progress)
    });
    finish(outcome, &args.writing, global)
}
