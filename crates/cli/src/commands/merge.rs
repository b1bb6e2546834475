//! `bevel merge`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use bevel_base::DType;
use bevel_compress::{Base, Mix, Recipe, Target};
use bevel_model::Checkpoint;

use super::convert::HF_SHARD_BYTES;
use super::quantize::{
    Original, Reporting, Subject, Writing, completed, conclude, show, summary, with_progress,
};
use crate::adapters::{Adapters, Named};
use crate::args::Global;
use crate::model;
use crate::report::run::RunReport;
use crate::ui::interrupt;

const EXPLANATION: &str = "\
Every weight that the adapter changes becomes W + s B A, computed in single precision, and is then stored in TYPE: \
F32, F16 or BF16, in a GGUF file or a Hugging Face directory, or any type that `bevel quantize` makes. What the \
rounding loses is measured: the KL divergence of the merged model from the model with the adapter beside it, on a \
text, or on what that model writes itself.

`bevel quantize MODEL TYPE --adapter ADAPTER` does the same with recipes, several adapters and calibrated methods.";

/// Options of `bevel merge`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// The adapter, a directory as PEFT has it or a GGUF file, and how strongly it counts
    #[arg(value_name = "ADAPTER[=SCALE]")]
    adapter: Named,

    /// The type of the merged model [default: the model's own, or F16 where that is quantized]
    #[arg(value_name = "TYPE")]
    base: Option<Base>,

    /// What to write: a name that ends in `.gguf` makes a GGUF file, any other a Hugging Face directory
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,

    #[command(flatten)]
    reporting: Reporting,

    #[command(flatten)]
    writing: Writing,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let start = Instant::now();
    let adapters = Adapters { named: vec![args.adapter.clone()] };
    let checkpoint = adapters.merged(model::open(&args.model, global)?)?;
    let recipe = Recipe::new(args.base.unwrap_or_else(|| own_type(&checkpoint)));
    recipe.check()?;
    let files = args.reporting.files(&args.output, args.writing.report.as_deref());
    if let Some(files) = &files {
        files.may_write(checkpoint.path().as_ref(), &args.output, args.writing.force)?;
    }
    let seed = global.seed.unwrap_or(0);
    let text = args.reporting.eval.as_deref().unwrap_or("self");
    let subject = match args.reporting.no_eval {
        true => Err("--no-eval was given"),
        false => Ok(Subject::named(text, seed)?),
    };
    let mut options = args.writing.options();
    if Target::of(&args.output) == Target::HuggingFace {
        options.shard_bytes = options.shard_bytes.or(Some(HF_SHARD_BYTES));
    }
    let cpu = model::cpu(global)?;
    let handler = interrupt::handle();
    let outcome = with_progress(global, "merging", |on_progress| {
        bevel_compress::convert(&checkpoint, &recipe, &args.output, &options, &cpu, on_progress)
    });
    let report = completed(outcome, global)?;
    // The model is written: from here on Ctrl-C loses nothing but the measurement.
    drop(handler);
    let Some(files) = files else { return show(&report, &summary(&report), global) };
    let source = Original { name: &args.model, checkpoint: &checkpoint, adapters: &adapters };
    let run = RunReport::begun(report, start, &cpu);
    conclude(run, &files, subject, &source, start, &cpu, global)
}

/// The type that weights have without the adapter, or F16 where they are packed or codes.
fn own_type(checkpoint: &Checkpoint) -> Base {
    let first = checkpoint.adapters().iter().flat_map(|(file, _)| file.matrices().keys()).next();
    let own = match first.map(|name| (checkpoint.stored_dtype(name), &checkpoint.tensors()[name])) {
        Some((dtype @ (DType::F32 | DType::BF16), entry)) if !entry.is_coded() => dtype,
        _ => DType::F16,
    };
    Mix::named(own.name()).map_or(Base::Keep, Base::Mix)
}
