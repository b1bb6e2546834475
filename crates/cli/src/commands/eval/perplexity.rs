use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use bevel_eval::{Perplexity, PerplexityConfig, Windows};
use serde::Serialize;

use super::{Args, warn_of_long_windows};
use crate::args::Global;
use crate::model::{self, Loaded};
use crate::ui::print_json;
use crate::ui::progress::{Progress, Unit};
use crate::ui::units::rate;

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    text: PathBuf,
    convention: &'static str,
    context: usize,
    stride: Option<usize>,
    threads: usize,
    isa: String,
    #[serde(flatten)]
    perplexity: Perplexity,
}

pub(super) fn run(args: &Args, global: &Global) -> Result<()> {
    let content = args.read()?;
    let Loaded { model, tokenizer, cpu, .. } =
        model::load(&args.model, args.products.exact, &args.adapters, global)?;
    let text = args.encode(&tokenizer, &content)?;
    let windows = args.stride.map_or(Windows::HalfWindow, Windows::Strided);
    let context = args.window();
    warn_of_long_windows(context, model.config().context, global);
    let config = PerplexityConfig { context, windows, kv_type: args.kv.kv.into() };
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
            text: args.source(),
            convention: if args.stride.is_some() { "strided" } else { "llama.cpp" },
            context,
            stride: args.stride,
            threads: cpu.pool().threads(),
            isa: cpu.isa().to_string(),
            perplexity,
        });
    }
    let convention = match args.stride {
        Some(stride) => format!("windows of {context} tokens, stride {stride}"),
        None => format!("windows of {context} tokens, second half scored (llama.cpp)"),
    };
    let mut out = std::io::stdout().lock();
    print(&mut out, &perplexity, &convention)
}

/// The figures of a perplexity for people.
pub(super) fn print(out: &mut impl Write, p: &Perplexity, convention: &str) -> Result<()> {
    let [low, high] = p.confidence_95;
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
