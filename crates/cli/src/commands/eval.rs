//! `bevel eval`: perplexity on a text.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bevel_eval::{Perplexity, PerplexityConfig, Text, Windows};
use serde::Serialize;

use crate::args::Global;
use crate::model::{self, Loaded};
use crate::sampling::Kv;
use crate::text;
use crate::ui::print_json;
use crate::ui::progress::{Progress, Unit};
use crate::ui::units::rate;

const EXPLANATION: &str = "\
Perplexities are comparable only between equal conventions, windows and texts.

By default the text is cut as llama.cpp's perplexity tool does it: consecutive windows of --ctx tokens, \
each beginning with the model's begin-of-text token if it has one, the second half of each scored. \
With --stride N windows overlap, as in the Hugging Face documentation: each begins N tokens after the \
one before and scores the tokens that are new. Small strides give every token more context, and take \
longer.";

/// Options of `bevel eval`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// The text to predict, UTF-8; `-` is stdin
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Tokens of a window
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 512)]
    ctx: usize,

    /// Overlapping windows that begin N tokens apart
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with = "llama")]
    stride: Option<usize>,

    /// llama.cpp's convention, which is the default
    #[arg(long)]
    llama: bool,

    /// Use the first N tokens of the text only
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    tokens: Option<usize>,

    #[command(flatten)]
    kv: Kv,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    text: &'a Path,
    convention: &'static str,
    context: usize,
    stride: Option<usize>,
    threads: usize,
    isa: String,
    #[serde(flatten)]
    perplexity: Perplexity,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let content = text::read(&args.text)?;
    ensure!(!content.is_empty(), "`{}` is empty", args.text.display());
    let Loaded { model, tokenizer, cpu, .. } = model::load(&args.model, global)?;
    let mut text = Text::encode(&tokenizer, &content)?;
    if let Some(count) = args.tokens {
        text.truncate(count);
    }
    let windows = args.stride.map_or(Windows::HalfWindow, Windows::Strided);
    if args.ctx > model.config().context {
        global.warn(format!(
            "the model was trained on {} tokens of context; windows of {} are beyond them",
            model.config().context,
            args.ctx
        ));
    }
    let config = PerplexityConfig { context: args.ctx, windows, kv_type: args.kv.kv.into() };
    let bar = Progress::new(global, "evaluating", text.tokens.len() as u64, Unit::Items);
    let perplexity = config.run(&model, &cpu, &text, &mut |running| {
        bar.set_total(running.total as u64);
        bar.set(running.done as u64);
        if let Some(perplexity) = running.perplexity {
            bar.message(format!("perplexity {perplexity:.3}"));
        }
    })?;
    drop(bar);

    if global.json {
        return print_json(&Output {
            model: &args.model,
            text: &args.text,
            convention: if args.stride.is_some() { "strided" } else { "llama.cpp" },
            context: args.ctx,
            stride: args.stride,
            threads: cpu.pool().threads(),
            isa: cpu.isa().to_string(),
            perplexity,
        });
    }
    let convention = match args.stride {
        Some(stride) => format!("windows of {} tokens, stride {stride}", args.ctx),
        None => format!("windows of {} tokens, second half scored (llama.cpp)", args.ctx),
    };
    print(&perplexity, &convention)
}

fn print(p: &Perplexity, convention: &str) -> Result<()> {
    let [low, high] = p.confidence_95;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "perplexity      {:.4} ± {:.4}  (95 %: {low:.3} to {high:.3})",
        p.perplexity, p.perplexity_error
    )?;
    writeln!(out, "nats per token  {:.5} ± {:.5}", p.nats_per_token, p.standard_error)?;
    if let Some(bits) = p.bits_per_byte {
        writeln!(out, "bits per byte   {bits:.4}")?;
    }
    writeln!(
        out,
        "scored          {} tokens, {} bytes, in {} {convention}",
        p.scored_tokens, p.scored_bytes, p.windows
    )?;
    writeln!(out, "speed           {} tokens/s", rate(p.tokens_per_second))?;
    Ok(())
}
