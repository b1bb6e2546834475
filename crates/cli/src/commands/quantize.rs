//! `bevel quantize`.

mod measure;
mod reporting;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bevel_base::DType;
use bevel_compress::{
    Allocation, Base, Budget, FormatName, ImatrixFile, Limit, Method, OnProgress, Options,
    Override, Preview, Recipe, Report, Stage, tensor_type,
};
use bevel_eval::peak_memory;
use bevel_formats::AtomicFile;
use bevel_kernels::{Cpu, limits};
use serde::Serialize;

use crate::adapters::Adapters;
use crate::args::{Global, size};
use crate::calibration::{self, CalibrationArgs};
use crate::model;
use crate::report::run::{Rate, RunReport};
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::progress::{Progress, Unit};
use crate::ui::table::Table;
use crate::ui::units::bytes;
use crate::ui::{plain, print_json, print_text};
pub(super) use measure::{Original, Subject};
pub(super) use reporting::Reporting;

const EXPLANATION: &str = "\
TYPE is a mix as llama.cpp defines it: Q4_K_M is a good start, Q6_K and Q8_0 lose next to nothing, Q3_K_M \
and Q2_K are for the smallest machines. Or it is one type, of which the output head gets a finer one: \
F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0, Q4_1, IQ4_NL, IQ4_XS, MXFP4, TQ1_0, TQ2_0.

Or it is a type of codes in groups, which other programs read from a Hugging Face directory: W2 to W8 \
(integers; --format gptq, gptq_v2, awq, compressed-tensors or mlx), NF4 and FP4 (bitsandbytes), FP8, NVFP4 \
and MXFP4-HF (compressed-tensors).

The flags are a short way to write a recipe. --recipe reads one from a TOML file:

    type = \"Q4_K_M\"
    output_type = \"Q8_0\"
    keep = [\"blk.0.*\"]
    [[tensor]]
    pattern = \"blk.*.ffn_down.weight\"
    type = \"Q6_K\"

--method says how codes are chosen. `rtn`, the default, rounds each block as well as it can alone. The \
others watch the model at work on calibration data: `importance` lets errors count where inputs are \
large; `awq` scales channels and clips ranges; `gptq` corrects every rounding error in the \
weights that follow, and `gptaq` what the layers before got wrong. --calib names text (files, JSON Lines, \
Parquet, hub:owner/name) or `self`, text that the model writes itself. A calibrated run that is stopped \
goes on where it was when the same command is given again. --imatrix is `importance` with what `bevel \
imatrix` or llama-imatrix found before, and needs seconds; the types IQ2 and IQ3 need either.

In patterns `*` stands for any characters, `?` for one and `[0-3]` for one of those. The first pattern \
that matches counts, those of flags before those of the file. The output carries the recipe, the hash of \
its source and bevel's version: the same three give the same bytes.

With --adapter the adapter is merged into the model first, and what is measured is how far the result lies from \
the model with the adapter beside it. `bevel merge` is a short way to do that.";

/// Options of `bevel quantize`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// The type or mix, for example Q4_K_M; a recipe may say it
    #[arg(value_name = "TYPE", required_unless_present_any = ["recipe", "target_bpw", "target_size"])]
    base: Option<Base>,

    /// The GGUF file to write, or the directory where TYPE is one of codes in groups
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,

    /// Type of the tensors whose name matches, for example 'blk.*.ffn_down.weight=Q6_K'; repeatable
    #[arg(long = "tensor", value_name = "PATTERN=TYPE")]
    overrides: Vec<Override>,

    /// Type of the output head, or of the embedding where it is the head
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    output_type: Option<DType>,

    /// Type of the embedding
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    embedding_type: Option<DType>,

    /// Tensors that keep the type they have; repeatable
    #[arg(long, value_name = "PATTERN")]
    keep: Vec<String>,

    /// Give every tensor the type itself, the output head too
    #[arg(long)]
    pure: bool,

    /// Choose every tensor's type so that all take at most so many bits per weight, scales counted,
    /// and the model loses least; in place of TYPE
    #[arg(long, value_name = "BITS", allow_negative_numbers = true, conflicts_with_all = ["target_size", "base", "pure"])]
    target_bpw: Option<f64>,

    /// Choose every tensor's type so that the file takes at most so many bytes, for example 900MB, and
    /// the model loses least; in place of TYPE
    #[arg(long, value_name = "SIZE", value_parser = size, allow_negative_numbers = true, conflicts_with_all = ["base", "pure"])]
    target_size: Option<u64>,

    /// The types to choose from, separated by commas [default: Q2_K, Q3_K, IQ4_XS, Q4_K, Q5_K, Q6_K
    /// and Q8_0, or those that fit the rows instead]
    #[arg(long, value_name = "TYPES", value_delimiter = ',', value_parser = tensor_type)]
    types: Vec<DType>,

    /// How codes are chosen: rtn, importance, awq, gptq or gptaq
    #[arg(long, value_name = "METHOD")]
    method: Option<Method>,

    /// The format of a directory of codes: gptq, gptq_v2, awq, compressed-tensors, bitsandbytes,
    /// bitsandbytes-flat or mlx
    #[arg(long, value_name = "FORMAT")]
    format: Option<FormatName>,

    /// Columns that share a scale, where codes are in groups; 0 for whole rows [default: 128; 64 for
    /// NF4, FP4 and mlx]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    group_size: Option<usize>,

    /// Give every group of integer codes its own zero point
    #[arg(long, conflicts_with = "sym")]
    asym: bool,

    /// Give all groups of integer codes the same zero point: the default but for awq
    #[arg(long)]
    sym: bool,

    /// Scale input channels first, as AWQ does it, before any method
    #[arg(long)]
    fold: bool,

    /// Rotate the residual stream first (QuaRot), by the random matrix of a seed
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    rotate: Option<u64>,

    #[command(flatten)]
    adapters: Adapters,

    #[command(flatten)]
    calibration: CalibrationArgs,

    /// An importance matrix by `bevel imatrix` or llama-imatrix, in place of calibration data
    #[arg(long, value_name = "FILE", conflicts_with_all = ["calib", "calib_samples", "calib_tokens", "calib_field", "fold", "rotate", "target_bpw", "target_size"])]
    imatrix: Option<PathBuf>,

    /// Throw away what an unfinished run left, instead of going on with it
    #[arg(long)]
    restart: bool,

    /// Read a recipe, to which the flags add
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// Show what every tensor would become, and write nothing
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    reporting: reporting::Reporting,

    #[command(flatten)]
    writing: Writing,
}

/// Options of verbs that write a model.
#[derive(Debug, clap::Args)]
pub(crate) struct Writing {
    /// Replace an output that exists
    #[arg(long)]
    pub(super) force: bool,

    /// Fail where something would go otherwise than asked for
    #[arg(long)]
    strict: bool,

    /// Split the output into files of at most this size, for example 5GB
    #[arg(long, alias = "split-size", value_name = "SIZE", value_parser = size)]
    pub(crate) shard_size: Option<u64>,

    /// Write the report to this file, as JSON. `quantize` writes one in any case, and a page with it:
    /// OUTPUT.report.json and .html beside a file, report.json and .html in a directory
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let start = Instant::now();
    let recipe = recipe(args, global)?;
    let checkpoint = args.adapters.merged(model::open(&args.model, global)?)?;
    let Some(output) = args.output.as_ref().filter(|_| !args.dry_run) else {
        ensure!(
            recipe.budget.is_none(),
            "the types that a budget leads to are found by measuring, which takes a run; leave --dry-run out"
        );
        return show_plan(&Preview::new(&checkpoint, &recipe)?, args.writing.strict, global);
    };
    let cpu = model::cpu(global)?;
    let files = args.reporting.files(output, args.writing.report.as_deref());
    let compare = files.is_some();
    let options = Options { restart: args.restart, compare, ..args.writing.options() };
    // Before minutes of sampling.
    bevel_compress::check_output(&checkpoint, &recipe, output, &options)?;
    if let Some(files) = &files {
        files.may_write(checkpoint.path().as_ref(), output, args.writing.force)?;
    }
    let named = |name: &String| Subject::named(name, global.seed.unwrap_or(0));
    let named = args.reporting.eval.as_ref().map(named).transpose()?;
    let measures = files.is_some() && !args.reporting.no_eval && named.is_none();

    let handler = interrupt::handle();
    let (data, held_out) = match &recipe.calibration {
        Some(config) => {
            let count = if measures { measure::held_out(config.tokens) } else { 0 };
            let (data, held_out) =
                calibration::load_with_held_out(config, count, &checkpoint, &cpu, global)?;
            (Some(data), measures.then_some(Subject::HeldOut(held_out)))
        }
        None => (None, None),
    };
    let calibration_seconds = data.is_some().then(|| start.elapsed().as_secs_f64());
    let outcome = with_progress(global, "quantizing", |on_progress| {
        let data = data.as_ref();
        bevel_compress::quantize(&checkpoint, &recipe, data, output, &options, &cpu, on_progress)
    });
    let stopped = matches!(outcome, Err(bevel_compress::Error::Stopped));
    if stopped && data.is_some() {
        global.note("the same command goes on where this one stopped; --restart begins anew");
    }
    let report = completed(outcome, global)?;
    // The model is written: from here on Ctrl-C loses nothing but the measurement.
    drop(handler);
    let Some(files) = files else { return show(&report, &summary(&report), global) };

    let statistics = report.times.steps.iter().find(|(step, _)| *step == "statistics");
    let rate = |&(_, seconds): &(_, f64)| Rate {
        operations_per_second: report.times.statistics_operations / seconds.max(1e-9),
        peak_operations_per_second: limits::float_peak(&cpu),
    };
    let statistics = statistics.filter(|_| report.times.statistics_operations > 0.0).map(rate);
    let run =
        RunReport { statistics, calibration_seconds, ..RunReport::begun(report, start, &cpu) };
    let not_measured = if args.reporting.no_eval {
        "--no-eval was given"
    } else {
        "without calibration there is no text to measure on; --eval names one"
    };
    let subject = named.or(held_out).ok_or(not_measured);
    let source = Original { name: &args.model, checkpoint: &checkpoint, adapters: &args.adapters };
    conclude(run, &files, subject, &source, start, &cpu, global)
}

/// Writes the report of a run whose model is written, measures the model against its source, or says why not, and
/// shows what was found.
pub(super) fn conclude(
    mut run: RunReport,
    files: &reporting::Files,
    subject: Result<Subject, &str>,
    source: &Original<'_>,
    start: Instant,
    cpu: &Cpu,
    global: &Global,
) -> Result<()> {
    files.write(&run)?;
    // Before minutes of measuring, which may be ended.
    if !global.json {
        print_text(&summary(&run.report))?;
    }
    let output = run.report.output.clone();
    let model: &Path = if output.is_dir() { &output } else { &run.report.files[0].clone() };
    match subject {
        Err(reason) => run.not_measured = Some(reason.to_owned()),
        Ok(subject) => {
            let path: &Path = source.checkpoint.path().as_ref();
            run.not_measured = subject.refusal(path, model)?;
            if run.not_measured.is_none() {
                let shown = output.display().to_string();
                run.measured = Some(subject.measure(&shown, source, model, cpu, global)?);
            }
        }
    }
    run.seconds = start.elapsed().as_secs_f64();
    run.peak_memory_bytes = peak_memory();
    files.write(&run)?;
    let mut text = String::new();
    if let Some(measured) = &run.measured {
        text += &measured.to_string();
    }
    text += &format!("wrote {}\n", plain(&files.page.display().to_string()));
    show(&run, &text, global)
}

fn recipe(args: &Args, global: &Global) -> Result<Recipe> {
    let mut recipe = match &args.recipe {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read `{}`", path.display()))?
            .parse()
            .with_context(|| format!("`{}`", path.display()))?,
        None => Recipe::new(Base::Keep),
    };
    recipe.base = args.base.unwrap_or(recipe.base);
    recipe.pure |= args.pure;
    recipe.output_type = args.output_type.or(recipe.output_type);
    recipe.embedding_type = args.embedding_type.or(recipe.embedding_type);
    recipe.keep.extend(args.keep.iter().cloned());
    recipe.overrides.splice(0..0, args.overrides.iter().cloned());
    recipe.format = args.format.or(recipe.format);
    recipe.group_size = args.group_size.or(recipe.group_size);
    if args.sym || args.asym {
        recipe.symmetric = Some(args.sym);
    }
    recipe.rotate = args.rotate.or(recipe.rotate);
    recipe.fold |= args.fold;
    if let Some(file) = &args.imatrix {
        recipe.imatrix = Some(ImatrixFile { file: file.clone(), sha256: None });
        recipe.calibration = None;
        recipe.method = args.method.unwrap_or(Method::Importance);
    } else if let Some(method) = args.method {
        recipe.method = method;
    }
    let limit = match (args.target_bpw, args.target_size) {
        (Some(bits), _) => Some(Limit::BitsPerWeight(bits)),
        (None, Some(bytes)) => Some(Limit::Bytes(bytes)),
        (None, None) => None,
    };
    if let Some(limit) = limit {
        let types = recipe.budget.take().map_or(Vec::new(), |budget| budget.types);
        recipe.budget = Some(Budget { limit, types });
        if args.recipe.is_none() && args.method.is_none() {
            // Who lets every tensor be measured wants the best codes for it too.
            recipe.method = Method::Gptaq;
        }
    }
    match &mut recipe.budget {
        Some(budget) if !args.types.is_empty() => budget.types = args.types.clone(),
        None if !args.types.is_empty() => {
            bail!("--types are what --target-bpw or --target-size chooses from; give one of them")
        }
        _ => {}
    }
    if recipe.wants_calibration() {
        args.calibration.apply(recipe.calibration.get_or_insert_default(), global)?;
    } else {
        let reason = match &recipe.imatrix {
            Some(_) => "beside the recipe's importance matrix; take one of them",
            None => "on the method `rtn`; choose another with --method, for example gptq",
        };
        if let Some(flag) = args.calibration.given() {
            bail!("{flag} has no effect {reason}");
        }
        ensure!(!args.restart, "--restart has no effect {reason}");
        recipe.calibration = None;
    }
    // What can be typed as a flag and what a file can say is checked in one place.
    recipe.check()?;
    Ok(recipe)
}

impl Writing {
    pub(crate) fn options(&self) -> Options {
        let Self { force, strict, shard_size: shard_bytes, .. } = *self;
        Options { force, strict, shard_bytes, compare: false, restart: false }
    }

    /// Refuses a report that would replace the model, the output or, without `--force`, anything.
    pub(crate) fn may_report(&self, model: &Path, output: &Path) -> Result<()> {
        let Some(report) = &self.report else { return Ok(()) };
        let shown = report.display();
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        ensure!(
            ![model, output].map(real).contains(&real(report)),
            "`{shown}` cannot be a model and the report; choose another name for the report"
        );
        ensure!(
            self.force || !report.exists(),
            "`{shown}` exists; remove it, choose another name, or replace it with --force"
        );
        // Dropped at once: only a place that cannot be written is to be noticed before the work.
        AtomicFile::create(report)?;
        Ok(())
    }
}

/// Runs `work` with a bar for each of its stages; Ctrl-C stops it between two steps.
pub(crate) fn with_progress<T>(
    global: &Global,
    label: &str,
    work: impl FnOnce(&mut OnProgress<'_>) -> T,
) -> T {
    let mut bar: Option<(Stage, Progress)> = None;
    work(&mut |p| {
        let stale = bar.as_ref().is_none_or(|(stage, _)| *stage != p.stage);
        if stale {
            let (label, unit) = match p.stage {
                Stage::Hash => ("hashing", Unit::Bytes),
                Stage::Measure => ("measuring types", Unit::Items),
                Stage::Calibrate => ("calibrating", Unit::Items),
                _ => (label, Unit::Bytes),
            };
            bar = Some((p.stage, Progress::new(global, label, p.total, unit)));
        }
        if let Some((_, bar)) = &bar {
            bar.set(p.done);
            bar.message(p.name);
        }
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// Shows what a verb that writes a model did, and writes the report that was asked for.
pub(crate) fn finish(
    outcome: bevel_compress::Result<Report>,
    writing: &Writing,
    global: &Global,
) -> Result<()> {
    let report = completed(outcome, global)?;
    if let Some(path) = &writing.report {
        reporting::write(path, serde_json::to_string_pretty(&report)?.as_bytes())?;
    }
    show(&report, &summary(&report), global)
}

/// The report of a run that came to its end; its warnings are shown.
pub(super) fn completed(
    outcome: bevel_compress::Result<Report>,
    global: &Global,
) -> Result<Report> {
    let report = match outcome {
        Err(bevel_compress::Error::Stopped) => return Err(Interrupted.into()),
        outcome => outcome?,
    };
    warn(&report.warnings, global);
    Ok(report)
}

pub(super) fn show(report: &impl Serialize, text: &str, global: &Global) -> Result<()> {
    if global.json { print_json(report) } else { print_text(text) }
}

/// What became of a model, for people.
pub(super) fn summary(report: &Report) -> String {
    let t = &report.totals;
    let mut sizes = Table::new(&["<", "size", "bits/weight"]);
    for (label, size, bits) in [
        ("before", t.bytes_before, t.bits_per_weight_before),
        ("after", t.bytes_after, t.bits_per_weight_after),
    ] {
        sizes.row([label.to_owned(), bytes(size), format!("{bits:.2}")]);
    }
    let mut text = sizes.to_string();
    let worst = report.worst(5);
    if let Some((error, rounding)) = report.output_error() {
        text += &format!("\nerror of the layers' outputs  {:.3} %", error.sqrt() * 100.0);
        if let Some(rounding) = rounding {
            text += &format!(", by rounding to nearest {:.3} %", rounding.sqrt() * 100.0);
        }
        text += "\n";
    }
    if let Some(allocation) = &report.allocation {
        text += &mixture(allocation);
    }
    if !worst.is_empty() {
        let mut table = Table::new(&["<tensors that moved most", "<from", "<to", "error"]);
        for tensor in worst {
            table.row([
                tensor.name.clone(),
                tensor.from.to_string(),
                tensor.to.to_string(),
                format!("{:.3} %", tensor.relative_error * 100.0),
            ]);
        }
        text += &format!("\n{table}");
    }
    for file in &report.files {
        text += &format!("\nwrote {}\n", plain(&file.display().to_string()));
    }
    text
}

/// The types that a budget was spent on.
fn mixture(allocation: &Allocation) -> String {
    let mut table = Table::new(&["<type", "tensors", "predicted loss"]);
    let mut types: Vec<DType> = allocation.tensors.iter().map(|t| t.dtype).collect();
    types.sort_by(|a, b| a.bits_per_weight().total_cmp(&b.bits_per_weight()).then(a.cmp(b)));
    types.dedup();
    for dtype in types {
        let chosen = || allocation.tensors.iter().filter(|t| t.dtype == dtype);
        let kl: f64 =
            chosen().flat_map(|t| t.options.iter().find(|o| o.dtype == dtype)).map(|o| o.kl).sum();
        table.row([dtype.to_string(), chosen().count().to_string(), format!("{kl:.5}")]);
    }
    format!("\n{table}predicted loss in all (KL, nats per token)  {:.5}\n", allocation.predicted_kl)
}

/// Shows warnings; a long list ends in its length.
fn warn(warnings: &[String], global: &Global) {
    const SHOWN: usize = 5;
    let shown = if global.verbose { warnings.len() } else { SHOWN.min(warnings.len()) };
    for warning in &warnings[..shown] {
        global.warn(warning);
    }
    if shown < warnings.len() {
        global.warn(format!("{} more of these; -v shows all", warnings.len() - shown));
    }
}

fn show_plan(plan: &Preview, strict: bool, global: &Global) -> Result<()> {
    if strict && !plan.warnings.is_empty() {
        return Err(bevel_compress::Error::Strict(plan.warnings.clone()).into());
    }
    warn(&plan.warnings, global);
    if global.json {
        return print_json(plan);
    }
    let mut table = Table::new(&["<tensor", "<shape", "<from", "<to", "size"]);
    for tensor in &plan.tensors {
        table.row([
            tensor.name.clone(),
            tensor.shape.to_string(),
            tensor.from.to_string(),
            tensor.to.to_string(),
            bytes(tensor.bytes_after),
        ]);
    }
    let t = &plan.totals;
    print_text(&format!(
        "{table}\n{} → {}, {:.2} → {:.2} bits/weight\n",
        bytes(t.bytes_before),
        bytes(t.bytes_after),
        t.bits_per_weight_before,
        t.bits_per_weight_after
    ))
}
