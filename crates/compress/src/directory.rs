//! A model to a Hugging Face directory whose linear layers are codes in groups: GPTQ, AWQ,
//! compressed-tensors, bitsandbytes, MLX.

use std::path::Path;
use std::time::Instant;

use bevel_base::DType;
use bevel_formats::TensorSpec;
use bevel_formats::quantized::{GroupedFormat, ModuleSpec};
use bevel_formats::safetensors::SafetensorsWriter;
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, HfTensor, Place, Stage as BlockStage, Transform, source_row};

use crate::calibrated::Run;
use crate::calibration::Calibration;
use crate::convert::from_gguf as plain;
use crate::convert::{empty_report, safetensors_metadata};
use crate::grouping::Grouping;
use crate::output::{AtomicDirectory, has_space};
use crate::plan::{idle_patterns, is_quantizable};
use crate::progress::{Meter, OnProgress, Stage};
use crate::solve::{self, Form, Rtn, Solved, solve};
use crate::transcode::{Tally, Transcoder, tally};
use crate::walk::{Claim, Linear, Outcome, Results, Unfinished, read_rows, remove_kept};
use crate::{
    Error, Needs, Options, Preview, PreviewedTensor, Provenance, Recipe, Report, Result, Shown,
    Stats, Storage, TensorReport, Times, Totals,
};

/// A tensor whose matrices become modules of codes.
struct Coded {
    /// Its GGUF name.
    name: String,
    hf: HfTensor,
    spec: ModuleSpec,
}

/// Writes a model as a Hugging Face directory whose linear layers are stored as `grouping` says.
/// What is no linear layer of a block, and what the recipe keeps, stays a plain tensor. Whether `out`
/// may be written was [checked](crate::check_output).
///
/// # Errors
/// Those of [`quantize`](crate::quantize).
pub(crate) fn quantize(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    grouping: &Grouping,
    calibration: Option<&Calibration>,
    out: &Path,
    options: &Options,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let Layout { coded, pieces, source, specs, warnings } =
        Layout::of(checkpoint, recipe, grouping)?;
    options.accept(&warnings)?;
    has_space(out, specs.iter().map(plain::byte_len).fold(0, u64::saturating_add))?;

    let _claim = recipe.wants_calibration().then(|| Claim::take(out)).transpose()?;
    let mut times = Times::default();
    let hash = || Provenance::of(checkpoint, recipe, on_progress);
    let provenance = times.time("hash", hash)?;
    let target_of = |name: &str| coded.iter().any(|c| c.name == name).then(|| grouping.target());
    let run = Run::of(recipe, checkpoint, cpu, calibration, &target_of, options)?;
    let shown = calibration.filter(|_| run.is_some()).map(Shown::from);
    let unfinished =
        run.map(|run| run.run(out, &provenance, options, &mut times, on_progress)).transpose()?;
    let start = Instant::now();
    let results = unfinished.as_ref().map(Unfinished::results).transpose()?;

    let directory = AtomicDirectory::create(out)?;
    let mut metadata = safetensors_metadata(&provenance);
    metadata.extend(grouping.format.metadata());
    let mut writer = SafetensorsWriter::create(
        &directory.workspace().join("model.safetensors"),
        &metadata,
        &specs,
        options.shard_bytes,
    )?;
    let mut report = empty_report(checkpoint, recipe, out, provenance, warnings);
    (report.calibration, report.times) = (shown, times);
    let read = pieces.iter().map(|p| p.entry.byte_len() as u64).sum::<u64>();
    let coded_bytes: u64 =
        coded.iter().map(|c| checkpoint.tensors()[&c.name].byte_len() as u64).sum();
    let mut meter = Meter { stage: Stage::Write, done: 0, total: read + coded_bytes, on_progress };
    let mut transcoder = Transcoder::new(cpu.pool());
    for piece in &pieces {
        // Norms and biases that scales were folded into.
        let outcomes = results.as_ref().map(|r| r.all(piece.name)).transpose()?;
        let values = |outcome: Outcome| match outcome.form {
            Form::Packed { bytes, .. } => bytes,
            Form::Grouped { .. } => unreachable!("a module of codes is no plain tensor"),
        };
        let changed: Vec<u8> = outcomes.into_iter().flatten().flat_map(values).collect();
        plain::write_piece(
            checkpoint,
            piece,
            (!changed.is_empty()).then_some(changed),
            &mut writer,
            &mut transcoder,
            &mut meter,
            &mut report,
            options,
        )?;
    }
    for module in &coded {
        let tensor = Writing { checkpoint, cpu, grouping, results: results.as_ref() }
            .write(module, &mut |name, data| Ok(writer.write(name, data)?))?;
        meter.advance(&module.name, checkpoint.tensors()[&module.name].byte_len())?;
        let t = &tensor;
        report.totals.add(t.shape.len() as u64, t.bytes_before, t.bytes_after);
        report.push(tensor, options)?;
    }
    let files = writer.finish()?;
    report.files =
        files.iter().map(|file| out.join(file.file_name().unwrap_or_default())).collect();
    let solver_warnings = report.solver_warnings();
    report.warnings.extend(solver_warnings);
    options.accept(&report.warnings)?;

    let entries = grouping.format.config(&listed(checkpoint, grouping, &coded))?;
    let plain: Vec<TensorSpec> = pieces.iter().flat_map(|p| p.specs.clone()).collect();
    source.write(checkpoint, &plain, entries, directory.workspace())?;
    directory.finish()?;
    if unfinished.is_some() {
        remove_kept(out)?;
    }
    report.times.add("write", start.elapsed().as_secs_f64());
    Ok(report)
}

/// What a directory is going to consist of.
pub(crate) struct Layout<'a> {
    coded: Vec<Coded>,
    /// All other tensors.
    pieces: Vec<plain::Piece<'a>>,
    source: plain::Source<'a>,
    /// The tensors as they are stored, in this order.
    specs: Vec<TensorSpec>,
    warnings: Vec<String>,
}

impl<'a> Layout<'a> {
    pub(crate) fn of(
        checkpoint: &'a Checkpoint,
        recipe: &Recipe,
        grouping: &Grouping,
    ) -> Result<Self> {
        if let Some(dtype) = recipe.packed_type() {
            return Err(Error::Recipe(format!(
                "a directory of {} cannot hold {dtype} too; its other tensors are F32, F16 or BF16",
                grouping.code
            )));
        }
        let names = checkpoint.tensors().iter();
        let names = names.filter(|(name, entry)| is_quantizable(name, &entry.shape));
        let mut warnings = idle_patterns(recipe, names.map(|(name, _)| name.as_str()));
        let coded = modules(checkpoint, recipe, grouping, &mut warnings)?;
        let mut pieces = plain::pieces(checkpoint, recipe, &mut warnings);
        pieces.retain(|piece| coded.iter().all(|c| c.name != piece.name));
        one_type(&mut pieces, recipe, checkpoint.config().tied);
        let mut types = pieces.iter().flat_map(|p| &p.specs).map(|spec| spec.dtype);
        let first = types.next();
        if matches!(grouping.format, GroupedFormat::BitsAndBytes { .. })
            && types.any(|dtype| Some(dtype) != first)
        {
            warnings.push(
                "the recipe asks for plain tensors of several types; transformers with bitsandbytes does not run such a model".to_owned(),
            );
        }
        let source = plain::Source::of(checkpoint, &mut warnings)?;
        let mut specs: Vec<TensorSpec> = pieces.iter().flat_map(|p| p.specs.clone()).collect();
        for module in &coded {
            specs.extend(module.specs(grouping)?);
        }
        Ok(Self { coded, pieces, source, specs, warnings })
    }

    /// The same for a reader.
    pub(crate) fn preview(self, checkpoint: &Checkpoint, grouping: &Grouping) -> Result<Preview> {
        let mut tensors = Vec::new();
        for piece in &self.pieces {
            let count = piece.specs.len() as u64;
            tensors.extend(piece.specs.iter().map(|spec| PreviewedTensor {
                name: spec.name.clone(),
                shape: spec.shape.clone(),
                from: checkpoint.stored_dtype(piece.name),
                to: Storage::Type(spec.dtype),
                wanted: None,
                bytes_before: checkpoint.stored_len(piece.name) / count,
                bytes_after: plain::byte_len(spec),
            }));
        }
        for module in &self.coded {
            let entry = checkpoint.entry(&module.name)?;
            let stored = module.specs(grouping)?;
            tensors.push(PreviewedTensor {
                name: module.name.clone(),
                shape: entry.shape.clone(),
                from: checkpoint.stored_dtype(&module.name),
                to: Storage::Codes(grouping.code),
                wanted: None,
                bytes_before: checkpoint.stored_len(&module.name),
                bytes_after: stored.iter().map(plain::byte_len).sum(),
            });
        }
        let mut totals = Totals::default();
        for t in &tensors {
            totals.add(t.shape.len() as u64, t.bytes_before, t.bytes_after);
        }
        Ok(Preview { tensors, totals, warnings: self.warnings })
    }
}

impl Coded {
    /// The tensors it is stored as.
    fn specs(&self, grouping: &Grouping) -> Result<Vec<TensorSpec>> {
        let mut specs = Vec::new();
        for name in &self.hf.names {
            specs.extend(grouping.format.specs(module_of(name), &self.spec)?);
        }
        Ok(specs)
    }
}

/// Gives all plain tensors the type of most of them, but for those whose type the recipe names:
/// readers compute in one type, and transformers with bitsandbytes refuses to multiply what it finds
/// in several.
fn one_type(pieces: &mut [plain::Piece<'_>], recipe: &Recipe, tied: bool) {
    let main = plain::main_type(pieces.iter().flat_map(|p| &p.specs));
    for piece in pieces.iter_mut().filter(|p| recipe.type_of(p.name, tied).is_none()) {
        piece.specs.iter_mut().for_each(|spec| spec.dtype = main);
    }
}

/// The tensors that become codes. Those that the format cannot hold stay plain, with a warning.
fn modules(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    grouping: &Grouping,
    warnings: &mut Vec<String>,
) -> Result<Vec<Coded>> {
    let mut coded = Vec::new();
    let mut refused: Vec<String> = Vec::new();
    let mut caveat = None;
    for (name, entry) in checkpoint.tensors() {
        let Place::Layer(_, rest) = Place::of(name) else { continue };
        if BlockStage::of(rest).is_none() || recipe.decides(name, false) {
            continue;
        }
        let Some(hf) = checkpoint.config().hf_tensor(name, "model.") else { continue };
        let dims = entry.shape.dims();
        let spec = grouping.spec(dims[dims.len() - 2], dims[dims.len() - 1]);
        match grouping.format.accepts(module_of(&hf.names[0]), &spec) {
            Ok(()) => {
                caveat = caveat.or(grouping.format.caveat(&spec));
                coded.push(Coded { name: name.clone(), hf, spec });
            }
            Err(error) => refused.push(error.to_string()),
        }
    }
    if let Some(first) = refused.first() {
        if coded.is_empty() {
            return Err(Error::Recipe(first.clone()));
        }
        warnings.push(format!("{} tensors stay in half precision: {first}", refused.len()));
    }
    warnings.extend(caveat.map(str::to_owned));
    Ok(coded)
}

/// Every linear module, and how it is stored: what the configuration lists.
fn listed(
    checkpoint: &Checkpoint,
    grouping: &Grouping,
    coded: &[Coded],
) -> Vec<(String, Option<ModuleSpec>)> {
    let config = checkpoint.config();
    let mut all = Vec::new();
    for name in checkpoint.tensors().keys() {
        let is_linear = match Place::of(name) {
            Place::Layer(_, rest) => BlockStage::of(rest).is_some(),
            Place::Global(name) => {
                name == "output.weight"
                    || grouping.format == GroupedFormat::Mlx && name == "token_embd.weight"
            }
        };
        let Some(hf) = config.hf_tensor(name, "model.").filter(|_| is_linear) else { continue };
        let spec = coded.iter().find(|c| c.name == *name).map(|c| c.spec);
        all.extend(hf.names.iter().map(|name| (module_of(name).to_owned(), spec)));
    }
    // A tied head is a module too, and the readers' lists of exceptions name it.
    if config.tied && grouping.format != GroupedFormat::Mlx {
        all.push(("lm_head".to_owned(), None));
    }
    all
}

/// What writing a module needs.
struct Writing<'a> {
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    grouping: &'a Grouping,
    results: Option<&'a Results>,
}

impl Writing<'_> {
    fn write(
        &self,
        module: &Coded,
        write: &mut dyn FnMut(&str, &[u8]) -> Result<()>,
    ) -> Result<TensorReport> {
        let entry = self.checkpoint.entry(&module.name)?;
        let ModuleSpec { rows, cols, .. } = module.spec;
        let mut total = Tally::default();
        let mut solved = Vec::new();
        let mut bytes_after = 0;
        for (index, hf_name) in module.hf.names.iter().enumerate() {
            let part = (module.hf.names.len() > 1 || entry.shape.dims().len() > 2).then_some(index);
            let linear = Linear { name: module.name.clone(), part, rows, cols };
            let values = read_rows(self.checkpoint, &module.name, index * rows, rows)?;
            let outcome = self.outcome(&linear, &values)?;
            let Form::Grouped { matrix, .. } = outcome.form else {
                unreachable!("a directory's targets are grouped");
            };
            total.add(tally(DType::F32, &values, &matrix.dequantize()));
            if self.results.is_some() {
                solved.push(outcome.report);
            }
            let head_dim = self.checkpoint.config().head_dim;
            let matrix = match module.hf.transform {
                Transform::InterleaveRows { .. } => {
                    matrix.permute_rows(|r| source_row(r, head_dim, false))
                }
                Transform::None | Transform::PlusOne => matrix,
            };
            let name = module_of(hf_name);
            let matrix = self.grouping.format.fit(name, &module.spec, matrix)?;
            for (name, data) in self.grouping.format.encode(name, &module.spec, &matrix)? {
                write(&name, &data)?;
                bytes_after += data.len() as u64;
            }
        }
        self.checkpoint.release(&module.name);
        Ok(TensorReport {
            name: module.name.clone(),
            shape: entry.shape.clone(),
            from: self.checkpoint.stored_dtype(&module.name),
            to: Storage::Codes(self.grouping.code),
            wanted: None,
            bytes_before: self.checkpoint.stored_len(&module.name),
            bytes_after,
            relative_error: total.relative_error(),
            saturated: 0,
            solved,
        })
    }

    /// What the walk found for a matrix, or its values rounded to nearest.
    fn outcome(&self, linear: &Linear, values: &[f32]) -> Result<Outcome> {
        let Linear { name, part, rows, cols } = linear;
        if let Some(outcome) = self.results.map(|r| r.get(name, *part)).transpose()?.flatten() {
            return Ok(outcome);
        }
        let (rows, cols) = (*rows, *cols);
        if let Some((index, value)) = crate::transcode::first_not_finite(values) {
            return Err(Error::NotFinite { tensor: name.clone(), index, value });
        }
        let wrap = |source| Error::Tensor { tensor: name.clone(), source };
        let rounded = self.grouping.round(values, rows, cols).map_err(wrap)?;
        let (form, report) = match rounded {
            Some(matrix) => (Form::Grouped { matrix, global_scale: None }, Default::default()),
            None => {
                let nothing = Stats::new(cols, Needs::default());
                let method = solve::Method::Rtn(Rtn { weighted: false });
                let target = self.grouping.target();
                let Solved { form, report, .. } =
                    solve(self.cpu, values, rows, cols, &nothing, &target, &method)
                        .map_err(|source| Error::Solve { tensor: name.clone(), source })?;
                (form, report)
            }
        };
        Ok(Outcome { linear: linear.clone(), form, report })
    }
}

/// The module of a `weight`.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}
