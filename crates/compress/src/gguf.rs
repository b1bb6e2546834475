//! A model, quantized or not, to a GGUF file, or to what else its recipe asks for.

use std::path::Path;
use std::time::Instant;

use bevel_base::{DType, pack};
use bevel_formats::TensorSpec;
use bevel_formats::gguf::{GgufWriter, Metadata, Value};
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use bevel_model::tokenizer::Tokenizer;

use crate::allocate::allocate;
use crate::calibrated::Run;
use crate::calibration::Calibration;
use crate::convert::refuse_file_name;
use crate::output::{has_space, is_replaceable, may_write, remove_stale};
use crate::plan::{Plan, PlannedTensor};
use crate::progress::{Meter, OnProgress, Stage};
use crate::provenance::source_files;
use crate::solve::{Form, SolveReport, Target};
use crate::transcode::{Tally, Transcoder, tally};
use crate::walk::{Claim, Fingerprint, Outcome, Unfinished, kept, remove_kept};
use crate::{
    Base, Error, Options, Override, Provenance, Recipe, Report, Result, Shown, Storage,
    TensorReport, Times, VERSION, directory,
};

/// ggml's version of its packed layouts, which readers compare.
const QUANTIZATION_VERSION: u32 = 2;

/// Writes a model with the types of a recipe, tensor by tensor: memory does not grow with the model.
/// Packed types are written as a GGUF file, codes in groups as a Hugging Face directory. The same
/// source, recipe and calibration data give the same bytes.
///
/// A recipe whose method asks for calibration data walks through the model first, layer by layer,
/// and keeps what it found in a directory beside the output until the output is complete: a run that
/// was stopped or killed goes on from there.
///
/// # Errors
/// [`Error::NoCalibration`] where the method asks for data that is not given, [`Error::OtherRun`],
/// those of [`check_output`], [`Error::NoSpace`], [`Error::NotFinite`], [`Error::Strict`],
/// [`Error::Stopped`], and those of reading and writing. Nothing is left behind but what an
/// unfinished walk found.
pub fn quantize(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    calibration: Option<&Calibration>,
    out: &Path,
    options: &Options,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let rotated = rotated(checkpoint, recipe)?;
    let checkpoint = rotated.as_ref().unwrap_or(checkpoint);
    check_output(checkpoint, recipe, out, options)?;
    if let Base::Grouped(code) = recipe.base {
        let grouping = recipe.grouping(code, main_dtype(checkpoint));
        return directory::quantize(
            checkpoint,
            recipe,
            &grouping,
            calibration,
            out,
            options,
            cpu,
            on_progress,
        );
    }
    let _claim = recipe.wants_calibration().then(|| Claim::take(out)).transpose()?;
    let mut times = Times::default();
    let hash = || Provenance::of(checkpoint, recipe, on_progress);
    let mut provenance = times.time("hash", hash)?;
    let (mut recipe, mut options, mut allocation) = (recipe.clone(), *options, None);
    if recipe.budget.is_some() {
        let data = calibration.ok_or(Error::NoCalibration)?;
        let fingerprint = Fingerprint::new(&provenance, data, cpu);
        let find = |dir: &Path| allocate(checkpoint, &recipe, calibration, dir, cpu, on_progress);
        let choose = || kept(out, "allocation.json", &fingerprint, options.restart, find);
        let (spent, chosen) = times.time("types", choose)?;
        // What was kept now is not to be thrown away.
        options.restart = false;
        provenance.recipe = chosen.to_string();
        (recipe, allocation) = (chosen, Some(spent));
    }
    let mut plan = Plan::new(checkpoint, &recipe)?;
    if let Some(importance) = &plan.importance {
        recipe = importance.recorded_in(&recipe);
        provenance.recipe = recipe.to_string();
    }
    let (recipe, options) = (&recipe, &options);
    let metadata = metadata(checkpoint, &mut plan, &provenance)?;
    options.accept(&plan.warnings)?;
    has_space(out, plan.totals.bytes_after)?;

    let target_of = |name: &str| {
        let planned = plan.tensors.iter().find(|t| t.name == name)?;
        let is_solved = planned.to.is_packed() && !planned.stays();
        is_solved.then_some(Target::Packed(planned.to))
    };
    let run = Run::of(recipe, checkpoint, cpu, calibration, &target_of, options)?;
    let shown = calibration.filter(|_| run.is_some()).map(Shown::from);
    let unfinished =
        run.map(|run| run.run(out, &provenance, options, &mut times, on_progress)).transpose()?;
    let start = Instant::now();
    let results = unfinished.as_ref().map(Unfinished::results).transpose()?;

    let mut writer = GgufWriter::create(out, &metadata, &specs(&plan), options.shard_bytes)?;
    let mut report = Report {
        input: checkpoint.path().into(),
        output: out.to_owned(),
        files: Vec::new(),
        recipe: recipe.clone(),
        provenance,
        allocation,
        calibration: shown,
        totals: plan.totals,
        times,
        warnings: plan.warnings,
        tensors: Vec::with_capacity(plan.tensors.len()),
    };
    let total = plan.tensors.iter().map(PlannedTensor::read_len).sum();
    let mut meter = Meter { stage: Stage::Write, done: 0, total, on_progress };
    let mut transcoder = Transcoder::new(cpu.pool());
    for planned in plan.tensors {
        let outcomes = results.as_ref().map(|r| r.all(&planned.name)).transpose()?;
        let outcomes = outcomes.unwrap_or_default();
        let bytes = checkpoint.read(&planned.name)?;
        let mut write = |data: &[u8]| Ok(writer.write(&planned.name, data)?);
        let tally = if !outcomes.is_empty() {
            let tally = write_outcomes(&planned, &bytes, &outcomes, &mut write)?;
            meter.advance(&planned.name, bytes.len())?;
            tally
        } else if planned.from.is_weight() {
            let importance = plan.importance.as_ref().map(|i| i.of(&planned)).transpose()?;
            let importance = importance.flatten().unwrap_or_default();
            let job = planned.job(&importance);
            let release = || checkpoint.release(&planned.name);
            transcoder.run(&job, &bytes, &mut meter, &release, &mut write)?
        } else {
            write(&bytes)?;
            meter.advance(&planned.name, bytes.len())?;
            Tally::default()
        };
        drop(bytes);
        checkpoint.release(&planned.name);
        report.add(planned, tally, &outcomes, options)?;
    }
    let warnings = report.solver_warnings();
    report.warnings.extend(warnings);
    options.accept(&report.warnings)?;
    report.files = writer.finish()?;
    remove_stale(out, &report.files, options)?;
    if unfinished.is_some() || report.allocation.is_some() {
        remove_kept(out)?;
    }
    report.times.add("write", start.elapsed().as_secs_f64());
    Ok(report)
}

/// Bytes of a file beside its tensors: the metadata that come of a model and a recipe, and what
/// aligns tensors.
pub(crate) fn overhead(checkpoint: &Checkpoint, plan: &Plan, recipe: &Recipe) -> Result<u64> {
    // A recipe that names every tensor, in as many letters as it may take.
    let each = |t: &PlannedTensor| Override { pattern: t.name.clone(), dtype: DType::IQ2_XXS };
    let overrides = plan.tensors.iter().map(each).chain(recipe.overrides.clone()).collect();
    let recipe = Recipe { overrides, ..recipe.clone() };
    let provenance = Provenance {
        recipe: recipe.to_string(),
        source_sha256: "0".repeat(64),
        version: VERSION.to_owned(),
    };
    let mut plan = plan.clone();
    let metadata = metadata(checkpoint, &mut plan, &provenance)?;
    let specs = specs(&plan);
    let size = GgufWriter::file_len(&metadata, &specs)?;
    let aligning = 32 * specs.len() as u64;
    Ok(size - plan.totals.bytes_after + aligning)
}

fn specs(plan: &Plan) -> Vec<TensorSpec> {
    plan.tensors.iter().map(|t| TensorSpec::new(&t.name, t.to, t.shape.clone())).collect()
}

/// How matrices were solved; those that were only scaled were not.
fn solve_reports(outcomes: &[Outcome]) -> Vec<SolveReport> {
    let solved = outcomes.iter().filter(|outcome| outcome.is_solved());
    solved.map(|outcome| outcome.report.clone()).collect()
}

/// The checkpoint with its residual stream rotated, where a recipe asks for that.
pub(crate) fn rotated(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Option<Checkpoint>> {
    let open = |seed| Ok(checkpoint.reopened()?.rotated(seed)?);
    recipe.rotate.map(open).transpose()
}

/// The type of the floating-point values that a checkpoint mostly consists of.
pub(crate) fn main_dtype(checkpoint: &Checkpoint) -> DType {
    let largest = checkpoint.tensors().iter().max_by_key(|(_, entry)| entry.shape.len());
    largest.map_or(DType::BF16, |(name, _)| checkpoint.stored_dtype(name))
}

/// Refuses what [`quantize`] would refuse before it starts, so that a caller need not gather
/// calibration data for nothing.
///
/// # Errors
/// [`Error::Target`], [`Error::Recipe`], [`Error::Exists`] and [`Error::OverwritesInput`].
pub fn check_output(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    out: &Path,
    options: &Options,
) -> Result<()> {
    let refuse = |reason: String| Err(Error::Target { path: out.to_owned(), reason });
    recipe.check()?;
    if recipe.budget.is_some() && !matches!(recipe.base, Base::Keep) {
        return Err(Error::Recipe(format!(
            "a budget chooses the types of a GGUF file itself; leave `{}` out",
            recipe.base
        )));
    }
    if recipe.budget.is_some() {
        crate::allocate::check(checkpoint, recipe)?;
    }
    if let Base::Grouped(code) = recipe.base {
        if is_gguf(out) {
            return refuse(format!(
                "{code} is stored in Hugging Face directories; name a directory, or choose a type of GGUF files such as Q4_K_M"
            ));
        }
        refuse_file_name(out)?;
        recipe.grouping(code, main_dtype(checkpoint)).check()?;
        is_replaceable(out, checkpoint.hf_dir())?;
    } else if !is_gguf(out) {
        let reason = match recipe.packed_type() {
            None if recipe.budget.is_none() => {
                "a GGUF file is written, whose name ends in `.gguf`; `bevel convert` writes F32, F16 and BF16 as a Hugging Face directory"
            }
            _ => "packed types are written to GGUF files, whose names end in `.gguf`",
        };
        return refuse(reason.to_owned());
    }
    may_write(out, &source_files(checkpoint), options)
}

/// Writes what became of a tensor's matrices, and compares it with what the tensor was, `before`.
fn write_outcomes(
    planned: &PlannedTensor,
    before: &[u8],
    outcomes: &[Outcome],
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Tally> {
    let wrap = |source| Error::Tensor { tensor: planned.name.clone(), source };
    let mut total = Tally::default();
    let mut rest = before;
    for Outcome { linear, form, .. } in outcomes {
        let Form::Packed { dtype, bytes } = form else {
            unreachable!("a GGUF file's targets are packed types");
        };
        let len = linear.rows * linear.cols;
        let row_bytes = planned.from.row_bytes(linear.cols).map_err(wrap)?;
        let (part, after) = rest.split_at(linear.rows * row_bytes);
        rest = after;
        let (mut values, mut restored) = (vec![0.0; len], vec![0.0; len]);
        pack::dequantize(planned.from, part, &mut values).map_err(wrap)?;
        pack::dequantize(*dtype, bytes, &mut restored).map_err(wrap)?;
        if *dtype == planned.to {
            write(bytes)?;
        } else {
            // A tensor that only changed because a neighbour's scales were folded into it.
            let mut packed =
                vec![0; linear.rows * planned.to.row_bytes(linear.cols).map_err(wrap)?];
            pack::quantize(planned.to, &restored, None, &mut packed).map_err(wrap)?;
            pack::dequantize(planned.to, &packed, &mut restored).map_err(wrap)?;
            write(&packed)?;
        }
        total.add(tally(planned.to, &values, &restored));
    }
    Ok(total)
}

/// True for names of GGUF files.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

impl Report {
    fn add(
        &mut self,
        planned: PlannedTensor,
        tally: Tally,
        outcomes: &[Outcome],
        options: &Options,
    ) -> Result<()> {
        let PlannedTensor { name, shape, stored, to, wanted, bytes_before, bytes_after, .. } =
            planned;
        self.push(
            TensorReport {
                name,
                shape,
                from: stored,
                to: Storage::Type(to),
                wanted,
                bytes_before,
                bytes_after,
                relative_error: tally.relative_error(),
                saturated: tally.saturated,
                solved: solve_reports(outcomes),
            },
            options,
        )
    }

    /// Adds a tensor whose place in the totals is counted already.
    pub(crate) fn push(&mut self, tensor: TensorReport, options: &Options) -> Result<()> {
        if tensor.saturated > 0 {
            self.totals.saturated += tensor.saturated;
            let TensorReport { name, to, saturated, .. } = &tensor;
            self.warnings.push(format!(
                "tensor `{name}`: {saturated} values are too large for {to} and became its largest; BF16 and F32 hold them"
            ));
            options.accept(&self.warnings)?;
        }
        self.tensors.push(tensor);
        Ok(())
    }
}

/// The metadata of a plan's file.
fn metadata(checkpoint: &Checkpoint, plan: &mut Plan, provenance: &Provenance) -> Result<Metadata> {
    let mut metadata = source_metadata(checkpoint, &mut plan.warnings)?;
    if let Some(file_type) = plan.file_type {
        metadata.insert("general.file_type".to_owned(), Value::U32(file_type));
    }
    if plan.tensors.iter().any(|t| t.to.is_packed()) {
        let version = Value::U32(QUANTIZATION_VERSION);
        metadata.insert("general.quantization_version".to_owned(), version);
    }
    for (key, value) in provenance.pairs() {
        metadata.insert(key.to_owned(), value.into());
    }
    if let Some(importance) = &plan.importance {
        importance.describe(&mut metadata);
    }
    Ok(metadata)
}

/// The source's metadata, or what a Hugging Face directory says, in GGUF's words.
fn source_metadata(checkpoint: &Checkpoint, warnings: &mut Vec<String>) -> Result<Metadata> {
    if let Some(metadata) = checkpoint.gguf_metadata() {
        return Ok(metadata.clone());
    }
    let mut metadata = Metadata::new();
    checkpoint.config().to_gguf(&mut metadata);
    let Some(dir) = checkpoint.hf_dir() else { return Ok(metadata) };
    if !dir.join("tokenizer.json").is_file() {
        warnings.push(format!(
            "`{}` has no `tokenizer.json`; the output has no tokenizer and can only be fed token ids",
            dir.display()
        ));
        return Ok(metadata);
    }
    let tokenizer = Tokenizer::from_hf(dir)?;
    warnings.extend(tokenizer.warnings().iter().cloned());
    tokenizer.to_gguf(&mut metadata, checkpoint.config().vocab_size)?;
    Ok(metadata)
}
