//! `bevel tour`: bevel's main job in one command, measured. A model is evaluated, quantized to several
//! sizes, and every size is evaluated and timed; a table and a report set them side by side.

mod choose;
mod measure;

use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use bevel_compress::{Options, Preview, Recipe, Stage, quantize};
use bevel_eval::{Machine, peak_memory};
use bevel_formats::AtomicFile;
use bevel_formats::hub::HubConfig;
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;

use crate::args::Global;
use crate::model;
use crate::report::{self, Report, Variant};
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::print_json;
use crate::ui::progress::{Progress, Unit};
use crate::ui::table::Table;
use crate::ui::units::{bytes, duration, rate};
use choose::Choice;
use measure::Effort;

/// Options of `bevel tour`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen` [default: smollm2, or tiny-austen where
    /// nothing can be fetched]
    model: Option<String>,

    /// Directory for the report and the smaller models
    #[arg(short, long, value_name = "DIR", default_value = "bevel-tour")]
    output: PathBuf,

    /// Measure on less text, with fewer repetitions
    #[arg(long)]
    quick: bool,

    /// Fetch nothing: use the model in the cache, or tiny-austen
    #[arg(long)]
    offline: bool,
}

/// The default model's alias.
const DEFAULT_MODEL: &str = "smollm2";

/// The report's name in the output directory.
const REPORT: &str = "report.html";

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let start = Instant::now();
    writable(&args.output)?;
    let (name, path) = args.resolve(global)?;
    let cpu = model::cpu(global)?;
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = model::tokenizer(&checkpoint, global)?;
    let choice = Choice::new(&checkpoint, effort.variants)?;
    if let Some(note) = &choice.note {
        global.note(note);
    }
    let prompt = measure::Prompt::new(&tokenizer)?;
    let machine = Machine::new(&cpu);

    let mut variants = Vec::new();
    variants.push(measure::variant(&name, checkpoint, &cpu, &prompt, &effort, global)?);
    for recipe in &choice.recipes {
        let (file, seconds, warnings) = args.quantize(&path, &name, recipe, &cpu, global)?;
        let checkpoint = Checkpoint::open(&file)?;
        let label = label(recipe);
        let measured = measure::variant(&label, checkpoint, &cpu, &prompt, &effort, global)?;
        variants.push(Variant { quantize_seconds: Some(seconds), warnings, ..measured });
    }

    let report = Report {
        model: name,
        note: choice.note,
        machine,
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        text: measure::TEXT_NAME,
        context: measure::CONTEXT,
        prompt: prompt.text.clone(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory(),
        variants,
    };
    let page = args.output.join(REPORT);
    let mut file = AtomicFile::create(&page)?;
    file.write_all(report::html(&report).as_bytes())
        .with_context(|| format!("cannot write `{}`", page.display()))?;
    file.finish()?;
    if global.json {
        return print_json(&report);
    }
    print(&report, &page)
}

impl Args {
    /// The model's name and path. Where the default cannot be had, the embedded model takes its
    /// place, and the user is told.
    fn resolve(&self, global: &Global) -> Result<(String, PathBuf)> {
        let mut config = HubConfig::from_env();
        config.offline |= self.offline;
        if let Some(name) = &self.model {
            let path = model::resolve_with(name, &config, global)?;
            let is_path = Path::new(name).exists();
            let shown = path.file_name().filter(|_| is_path).map(|n| n.to_string_lossy().into());
            return Ok((shown.unwrap_or_else(|| name.clone()), path));
        }
        match model::resolve_with(DEFAULT_MODEL, &config, global) {
            Ok(path) => Ok((DEFAULT_MODEL.to_owned(), path)),
            Err(error) => {
                let embedded = crate::embedded::NAME;
                global.warn(format!(
                    "{DEFAULT_MODEL} cannot be had ({error:#}); the tour goes on with {embedded}, the small model inside this program"
                ));
                Ok((embedded.to_owned(), model::resolve_with(embedded, &config, global)?))
            }
        }
    }

    /// Writes a smaller model; returns its file, the time it took and what went otherwise than asked
    /// for.
    fn quantize(
        &self,
        source: &Path,
        name: &str,
        recipe: &Recipe,
        cpu: &Cpu,
        global: &Global,
    ) -> Result<(PathBuf, f64, Vec<String>)> {
        let checkpoint = Checkpoint::open(source)?;
        let stem = Path::new(name).file_stem().unwrap_or_default().to_string_lossy();
        let file = self.output.join(format!("{stem}.{}.gguf", label(recipe).replace(' ', "-")));
        let total = checkpoint.tensor_bytes();
        let label = format!("quantizing to {}", label(recipe));
        let bar = Progress::new(global, &label, total, Unit::Bytes);
        let options = Options { force: true, ..Options::default() };
        let handler = interrupt::handle();
        let start = Instant::now();
        let outcome = quantize(&checkpoint, recipe, None, &file, &options, cpu, &mut |progress| {
            if progress.stage == Stage::Write {
                bar.set(progress.done);
            }
            if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        drop(handler);
        if interrupt::requested() {
            return Err(Interrupted.into());
        }
        let report = outcome?;
        Ok((file, start.elapsed().as_secs_f64(), report.warnings))
    }
}

/// What a recipe's model is called.
fn label(recipe: &Recipe) -> String {
    if recipe.pure { format!("{} pure", recipe.base) } else { recipe.base.to_string() }
}

/// Makes the output directory and tries that files can be written there, before minutes of work.
fn writable(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    AtomicFile::create(&dir.join(REPORT))?;
    Ok(())
}

fn print(report: &Report, page: &Path) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let machine = &report.machine;
    writeln!(out, "{}, {} threads, {}\n", machine.cpu, machine.threads, machine.isa)?;
    let mut table = Table::new(&[
        "<model",
        "size",
        "bits/weight",
        "perplexity",
        "±",
        "change",
        "prefill t/s",
        "decode t/s",
    ]);
    let base = report.variants[0].perplexity.perplexity;
    for variant in &report.variants {
        let perplexity = &variant.perplexity;
        let change = (perplexity.perplexity / base - 1.0) * 100.0;
        let speed = |series: &Option<bevel_eval::Series>| {
            series.as_ref().map_or_else(String::new, |s| rate(s.spread.median))
        };
        table.row([
            variant.name.clone(),
            bytes(variant.bytes),
            format!("{:.2}", variant.bits_per_weight),
            format!("{:.2}", perplexity.perplexity),
            format!("{:.2}", perplexity.perplexity_error),
            if variant.is_original() { String::new() } else { format!("{change:+.1} %") },
            speed(&variant.bench.prefill),
            speed(&variant.bench.decode),
        ]);
    }
    writeln!(out, "{table}")?;
    if let (Some(first), Some(last)) = (report.variants.first(), report.variants.last()) {
        writeln!(out, "Asked: {}\n", report.prompt)?;
        for variant in [first, last] {
            writeln!(out, "{}: {}\n", variant.name, variant.sample.trim())?;
        }
    }
    let spent = std::time::Duration::from_secs_f64(report.seconds);
    writeln!(out, "The report is {}, after {}.", page.display(), duration(spent))?;
    Ok(())
}

/// The plan of a recipe, for choosing without work.
fn planned_bytes(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<u64> {
    Ok(Preview::new(checkpoint, recipe)?.totals.bytes_after)
}
