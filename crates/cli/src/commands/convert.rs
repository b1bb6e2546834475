//! `bevel convert`.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bevel_base::DType;
use bevel_compress::{Base, Mix, Recipe, Target};
use bevel_model::AdapterFile;
use serde::Serialize;

use super::quantize::{Writing, finish, with_progress};
use crate::args::Global;
use crate::model;
use crate::ui::{interrupt, plain, print_json, print_text};

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

    /// Convert an adapter instead, which MODEL is then: one of this model, between a directory as PEFT has it and a
    /// GGUF file
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,

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
split at 5 GB unless --shard-size says otherwise.

With --base MODEL it is an adapter of that model which becomes a GGUF file, as llama.cpp reads it, or a directory, \
as PEFT does. `bevel merge` makes a model of both.";

/// As in the hub's own tools.
pub(super) const HF_SHARD_BYTES: u64 = 5_000_000_000;

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    if let Some(base) = &args.base {
        return convert_adapter(args, base, global);
    }
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

/// An adapter of the model `base` in the other format, or with values of another type.
fn convert_adapter(args: &Args, base: &str, global: &Global) -> Result<()> {
    let checkpoint = model::open(base, global)?;
    let config = checkpoint.config();
    let file = AdapterFile::open(args.model.as_ref(), config)?;
    let file = match args.dtype {
        FloatType::Keep => file,
        FloatType::F32 => file.rounded(DType::F32)?,
        FloatType::F16 => file.rounded(DType::F16)?,
        FloatType::Bf16 => file.rounded(DType::BF16)?,
    };
    let output = &args.output;
    ensure!(
        args.writing.options().force || !output.exists(),
        "`{}` exists; remove it, choose another name, or replace it with --force",
        output.display()
    );
    match Target::of(output) {
        Target::Gguf => file.write_gguf(output, config)?,
        Target::HuggingFace => file.write_peft(output, base, config)?,
    }
    let written = Written { output, matrices: 2 * file.matrices().len() };
    if global.json {
        return print_json(&written);
    }
    print_text(&format!("wrote {}\n", plain(&output.display().to_string())))
}

/// What `--json` prints of an adapter.
#[derive(Serialize)]
struct Written<'a> {
    output: &'a Path,
    matrices: usize,
}
