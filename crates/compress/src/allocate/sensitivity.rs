//! How much it costs to store a tensor in a type: the divergence of the whole model's predictions
//! where this tensor alone is quantized.
//!
//! 1. One walk through the unquantized model, on all calibration data, gathers statistics of each
//!    layer's inputs.
//! 2. Each matrix is solved for each type: the error of its output `e(t, f) = tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`.
//! 3. With a tensor in one type, its reference `r`, some sequences go on through the rest of the
//!    layer and, beside the unquantized ones, through all layers that follow. A type on whose grid the
//!    weights already lie tells nothing and is no reference. The rows of the
//!    embedding are where such streams may begin, the output head where they all end.
//! 4. At the end of the model `KL(t, r)` is the mean divergence of the predictions after such a stream
//!    from those after the unquantized one.
//! 5. A divergence is quadratic in a small change of the logits, as `e` is in that of the weights:
//!    `KL(t, f) = KL(t, r) · e(t, f) / e(t, r)`.
//!
//! Memory holds one layer, its statistics and, in a file where they are many, a stream for each
//! tensor and sequence.

use std::ops::Range;
use std::path::Path;

use bevel_base::{DType, pack};
use bevel_kernels::{Cpu, kl_divergence, scale};
use bevel_model::{Checkpoint, Head, HeadState, ModelConfig, Stage as BlockStage};
use half::f16;
use indexmap::IndexMap;

use super::choices::{Candidate, Candidates};
use crate::calibrated::Solver;
use crate::progress::{Meter, OnProgress, Stage};
use crate::solve::Target;
use crate::walk::{
    Activations, EMBEDDING, Layer, Limits, Linear, StageStats, Walk, embedding_rows, read_rows,
};
use crate::{Error, Needs, Result};

/// Tokens of the sequences that go on through the model with one tensor changed.
const PROBE_TOKENS: usize = 2048;
/// Rows of the output head whose errors are measured in every type; the reference is solved whole.
const HEAD_ROWS: usize = 4096;
/// Tokens whose logits are compared at a time.
const HEAD_TOKENS: usize = 32;
const NEEDS: Needs = Needs { gram: true, cross: false };

/// The divergence in nats of every type of every tensor, in the candidates' order.
pub(super) fn measure(
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    sequences: &[Vec<u32>],
    candidates: &Candidates,
    solver: &Solver<'_>,
    dir: &Path,
    on_progress: &mut OnProgress<'_>,
) -> Result<IndexMap<String, Vec<f64>>> {
    let limits = Limits::default();
    let layers = checkpoint.config().layers;
    let mut probes = Probes::new(checkpoint.config(), sequences, candidates, &limits, dir)?;
    let total = (sequences.len() * (2 * layers + 1) + probes.passes(candidates, layers)) as u64;
    let mut meter = Meter { stage: Stage::Measure, done: 0, total, on_progress };
    let mut walk = Walk::begin(checkpoint, cpu, sequences, false, &limits, dir)?;
    if let Some(candidate) = candidates.get(EMBEDDING) {
        // (3)
        let errors = probes.embed(checkpoint, cpu, sequences, candidate)?;
        probes.effects.push(Effect { name: EMBEDDING.to_owned(), errors });
    }
    for index in 0..layers {
        let mut layer = walk.enter(index)?;
        let earlier = probes.effects.len();
        // (1)
        let mut dense = layer.survey(NEEDS, &mut meter)?;
        for stage in BlockStage::ALL {
            let batches = layer.expert_batches(stage, NEEDS, &limits);
            let mut solved = IndexMap::new();
            for experts in batches {
                let stats = match (&experts, dense.remove(&stage)) {
                    (None, Some(stats)) => StageStats::from([(None, stats)]),
                    _ => layer.stats(stage, NEEDS, experts.clone(), &mut meter)?,
                };
                solve_stage(&layer, stage, experts, &stats, candidates, solver, &mut solved)?;
            }
            for (name, changed) in solved {
                changed.replace(&mut layer, &changed.reference)?;
                let mut x = Vec::new();
                for sequence in 0..probes.sequences {
                    layer.outcome(sequence, &mut x)?;
                    probes.write(probes.effects.len(), sequence, &x)?;
                    meter.advance(&name, 1)?;
                }
                changed.replace(&mut layer, &changed.original)?;
                probes.effects.push(Effect { name, errors: changed.errors });
            }
        }
        for effect in 0..earlier {
            let mut x = Vec::new();
            for sequence in 0..probes.sequences {
                probes.read(effect, sequence, &mut x)?;
                layer.pass(&mut x)?;
                probes.write(effect, sequence, &x)?;
                meter.advance(&probes.effects[effect].name, 1)?;
            }
        }
        layer.leave(&mut meter)?;
    }
    let head = ChangedHead::solve(&mut walk, checkpoint, candidates, solver, &mut meter)?;
    let mut divergences =
        probes.divergences(&mut walk, checkpoint, cpu, head.as_ref(), &mut meter)?;
    let mut costs: IndexMap<String, Vec<f64>> = IndexMap::new();
    let effects = probes.effects.iter().map(|e| (&e.name, &e.errors));
    let of_head = head.as_ref().map(|head| (&head.name, &head.errors));
    for (name, errors) in effects.chain(of_head) {
        // (5)
        let divergence = divergences.remove(0);
        let factor = if errors.reference > 0.0 { divergence / errors.reference } else { 0.0 };
        let sums = costs.entry(name.clone()).or_insert_with(|| vec![0.0; errors.all.len()]);
        sums.iter_mut().zip(&errors.all).for_each(|(sum, error)| *sum += factor * error);
    }
    Ok(costs)
}

/// What changing a tensor does at one place of the model: an embedding that is the output head too
/// has two.
struct Effect {
    name: String,
    errors: Errors,
}

/// The errors of a tensor.
#[derive(Default)]
struct Errors {
    /// `e(t, f)` of each type.
    all: Vec<f64>,
    /// `e(t, r)`; zero where no type loses anything.
    reference: f64,
}

/// A tensor's matrices in their reference type, and as they were.
#[derive(Default)]
struct Changed {
    linears: Vec<Linear>,
    original: Vec<Vec<f32>>,
    reference: Vec<Vec<f32>>,
    errors: Errors,
}

impl Changed {
    fn replace(&self, layer: &mut Layer<'_, '_>, values: &[Vec<f32>]) -> Result<()> {
        self.linears.iter().zip(values).try_for_each(|(linear, w)| layer.replace(linear, w))
    }
}

/// (2) Solves the matrices of a stage for each of their types.
fn solve_stage(
    layer: &Layer<'_, '_>,
    stage: BlockStage,
    experts: Option<Range<usize>>,
    stats: &StageStats,
    candidates: &Candidates,
    solver: &Solver<'_>,
    solved: &mut IndexMap<String, Changed>,
) -> Result<()> {
    let parts = experts.map_or(vec![None], |range| range.map(Some).collect());
    for part in parts {
        for linear in layer.linears(stage, part) {
            let Some(candidate) = candidates.get(&linear.name) else { continue };
            let weight = layer.weight(&linear)?;
            let changed = solved.entry(linear.name.clone()).or_default();
            let mut errors = vec![0.0; candidate.types.len()];
            let mut reference = None;
            for &i in &candidate.order {
                let target = Target::Packed(candidate.types[i]);
                let found = solver.solve(&linear, &weight, stats.get(&part), &target)?;
                errors[i] = found.report.error;
                if reference.is_none() && candidate.reference(&errors) == Some(i) {
                    changed.errors.reference += errors[i];
                    reference = Some(found.weights);
                }
            }
            changed.errors.all.resize(errors.len(), 0.0);
            changed.errors.all.iter_mut().zip(errors).for_each(|(sum, error)| *sum += error);
            changed.reference.push(reference.unwrap_or_else(|| weight.clone()));
            changed.original.push(weight);
            changed.linears.push(linear);
        }
    }
    Ok(())
}

/// Sequences on their way through the model, once for each place that was changed.
struct Probes {
    /// Of effect `e` and sequence `s` at `e · sequences + s`.
    streams: Activations,
    /// The first ones of the calibration data.
    sequences: usize,
    effects: Vec<Effect>,
}

impl Probes {
    fn new(
        config: &ModelConfig,
        sequences: &[Vec<u32>],
        candidates: &Candidates,
        limits: &Limits,
        dir: &Path,
    ) -> Result<Self> {
        let mut tokens = 0;
        let within = |s: &&Vec<u32>| {
            let begins = tokens < PROBE_TOKENS;
            tokens += s.len();
            begins
        };
        let probed: Vec<usize> =
            sequences.iter().take_while(within).map(|s| s.len() * config.dim).collect();
        let lengths = probed.repeat(candidates.len());
        let streams = Activations::new(lengths, limits.streams, &dir.join("probes"))?;
        Ok(Self { streams, sequences: probed.len(), effects: Vec::new() })
    }

    /// Passes of a sequence through a layer or the head.
    fn passes(&self, candidates: &Candidates, layers: usize) -> usize {
        let of = |name: &String| match bevel_model::Place::of(name) {
            bevel_model::Place::Layer(layer, _) => layers - layer + 1,
            bevel_model::Place::Global(_) if name == EMBEDDING => layers + 1,
            bevel_model::Place::Global(_) => 1,
        };
        self.sequences * (candidates.keys().map(of).sum::<usize>() + 1)
    }

    fn read(&mut self, effect: usize, sequence: usize, x: &mut Vec<f32>) -> Result<()> {
        self.streams.read(effect * self.sequences + sequence, x)
    }

    fn write(&mut self, effect: usize, sequence: usize, x: &[f32]) -> Result<()> {
        self.streams.write(effect * self.sequences + sequence, x)
    }

    /// Begins the streams of a changed embedding; the errors of the rows that occur, as a part of them.
    fn embed(
        &mut self,
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        sequences: &[Vec<u32>],
        candidate: &Candidate,
    ) -> Result<Errors> {
        let config = checkpoint.config();
        let wrap = |source| Error::Tensor { tensor: EMBEDDING.to_owned(), source };
        let rounded = |rows: &[f32], dtype: DType| -> Result<Vec<f32>> {
            let row_bytes = dtype.row_bytes(config.dim).map_err(wrap)?;
            let mut packed = vec![0; rows.len() / config.dim * row_bytes];
            pack::quantize(dtype, rows, None, &mut packed).map_err(wrap)?;
            let mut x = vec![0.0; rows.len()];
            pack::dequantize(dtype, &packed, &mut x).map_err(wrap)?;
            Ok(x)
        };
        let sequences = &sequences[..self.sequences];
        let mut all = vec![0.0; candidate.types.len()];
        let mut signal = 0.0;
        embedding_rows(checkpoint, sequences, |_, rows| {
            signal += squares(rows.iter().copied());
            for (error, &dtype) in all.iter_mut().zip(&candidate.types) {
                *error += squares(rows.iter().zip(&rounded(&rows, dtype)?).map(|(a, b)| a - b));
            }
            Ok(())
        })?;
        all.iter_mut().for_each(|error| *error /= signal.max(f64::MIN_POSITIVE));
        let reference = candidate.reference(&all);
        embedding_rows(checkpoint, sequences, |sequence, rows| {
            let mut x = match reference {
                Some(reference) => rounded(&rows, candidate.types[reference])?,
                None => rows,
            };
            if config.embedding_scale != 1.0 {
                scale(cpu, &mut x, config.embedding_scale);
            }
            self.write(self.effects.len(), sequence, &x)
        })?;
        Ok(Errors { reference: reference.map_or(0.0, |i| all[i]), all })
    }

    /// (4) The mean divergence of each effect, and of a changed head after them.
    fn divergences(
        &mut self,
        walk: &mut Walk<'_>,
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        changed: Option<&ChangedHead>,
        meter: &mut Meter<'_, '_>,
    ) -> Result<Vec<f64>> {
        let config = checkpoint.config();
        let head = Head::load(checkpoint, cpu)?;
        let changed = changed.map(|changed| changed.head(checkpoint, cpu)).transpose()?;
        let (mut base, mut other) = (HeadState::default(), HeadState::default());
        let mut sums = vec![0.0; self.effects.len() + usize::from(changed.is_some())];
        let (mut count, mut x, mut perturbed) = (0, Vec::new(), Vec::new());
        let chunk = HEAD_TOKENS * config.dim;
        for sequence in 0..self.sequences {
            walk.stream(sequence, &mut x)?;
            for (number, x) in x.chunks(chunk).enumerate() {
                let base = head.logits(cpu, config, x, &mut base);
                let add = |sum: &mut f64, logits: &[f32]| {
                    let rows = base.chunks_exact(config.vocab_size);
                    let rows = rows.zip(logits.chunks_exact(config.vocab_size));
                    *sum += rows.map(|(p, q)| kl_divergence(cpu, p, q).kl).sum::<f64>();
                };
                for effect in 0..self.effects.len() {
                    self.read(effect, sequence, &mut perturbed)?;
                    let x = &perturbed[number * chunk..][..x.len()];
                    add(&mut sums[effect], head.logits(cpu, config, x, &mut other));
                }
                if let (Some(changed), Some(sum)) = (&changed, sums.last_mut()) {
                    add(sum, changed.logits(cpu, config, x, &mut other));
                }
                count += x.len() / config.dim;
            }
            for effect in &self.effects {
                meter.advance(&effect.name, 1)?;
            }
        }
        Ok(sums.into_iter().map(|sum| sum / count.max(1) as f64).collect())
    }
}

/// The output head in its reference type.
struct ChangedHead {
    name: String,
    errors: Errors,
    /// `[vocab, dim]` as F16: next to what is measured, its rounding is nothing.
    bytes: Vec<u8>,
}

impl ChangedHead {
    /// (2) Solves the head: some rows for each type, all of it for the reference. `None` where it
    /// keeps its type.
    fn solve(
        walk: &mut Walk<'_>,
        checkpoint: &Checkpoint,
        candidates: &Candidates,
        solver: &Solver<'_>,
        meter: &mut Meter<'_, '_>,
    ) -> Result<Option<Self>> {
        let stats = walk.head_stats(NEEDS, meter)?;
        let parts = walk.head();
        let name = parts[0].1.name.clone();
        let Some(candidate) = candidates.get(&name) else { return Ok(None) };
        let (rows, cols) = (checkpoint.config().vocab_size, checkpoint.config().dim);
        let stride = rows.div_ceil(HEAD_ROWS);
        let mut sample = Vec::new();
        for (first, linear) in &parts {
            let weight = read_rows(checkpoint, &name, *first, linear.rows)?;
            let rows = weight.chunks_exact(cols).skip(first.next_multiple_of(stride) - first);
            rows.step_by(stride).for_each(|row| sample.extend_from_slice(row));
        }
        let rows = sample.len() / cols;
        let linear = Linear { name: name.clone(), part: None, rows, cols };
        let error = |&dtype: &DType| {
            let target = Target::Packed(dtype);
            Ok(solver.solve(&linear, &sample, Some(&stats), &target)?.report.error)
        };
        let all = candidate.types.iter().map(error).collect::<Result<Vec<_>>>()?;
        let reference = candidate.reference(&all);
        let errors = Errors { reference: reference.map_or(0.0, |i| all[i]), all };
        let target = Target::Packed(candidate.types[reference.unwrap_or(candidate.order[0])]);
        let mut bytes = Vec::new();
        for (first, linear) in &parts {
            let weight = read_rows(checkpoint, &name, *first, linear.rows)?;
            let solved = solver.solve(linear, &weight, Some(&stats), &target)?;
            bytes.extend(solved.weights.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()));
            meter.advance(&name, 0)?;
        }
        Ok(Some(Self { name, errors, bytes }))
    }

    fn head(&self, checkpoint: &Checkpoint, cpu: &Cpu) -> Result<Head> {
        let mut head = Head::load(checkpoint, cpu)?;
        head.set_weight(cpu, DType::F16, &self.bytes)?;
        Ok(head)
    }
}

fn squares(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v) * f64::from(v)).sum()
}
