//! A layer on the walk: steps 2 to 4, stage by stage.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

use bevel_kernels::Cpu;
use bevel_model::{Block, BlockState, ModelConfig, NormPlacement, Site, Stage};

use super::tokens::{self, weigh};
use super::{Activations, Limits, StageStats, Walk, gather_into, read_rows};
use crate::progress::Meter;
use crate::{Needs, Result, Stats, Times};

/// The layer that a walk has come to.
pub(crate) struct Layer<'w, 'a> {
    pub(super) walk: &'w mut Walk<'a>,
    pub(super) index: usize,
    /// With the weights replaced so far.
    pub(super) block: Block,
    /// With those of the uncompressed model.
    pub(super) full: Option<Block>,
    /// Values that folding changed, by tensor and part.
    pub(super) changed: BTreeMap<(String, Option<usize>), Vec<f32>>,
    /// The streams have passed the layer's attention.
    attended: bool,
    /// The inputs of the last stage that was reached, where it is the last of its half.
    kept: Option<Kept>,
}

/// A stage's inputs of every sequence.
struct Kept {
    stage: Stage,
    inputs: Activations,
    /// Those of the uncompressed model, where it walks beside.
    full: Option<Activations>,
}

/// A matrix: a tensor, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Linear {
    /// The tensor's GGUF name.
    pub(crate) name: String,
    /// Which one of the matrices stacked in the tensor: an expert, or some rows of the output head.
    pub(crate) part: Option<usize>,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) cols: usize,
}

impl<'w, 'a> Layer<'w, 'a> {
    /// Loads layer `index` of a walk that has come to it.
    pub(super) fn load(walk: &'w mut Walk<'a>, index: usize) -> Result<Self> {
        let load = || Block::load(walk.checkpoint, walk.cpu, index, walk.precision);
        let block = load()?;
        let full = walk.full.is_some().then(load).transpose()?;
        let changed = BTreeMap::new();
        Ok(Self { walk, index, block, full, changed, attended: false, kept: None })
    }

    /// The walk's clock.
    pub(crate) fn times(&mut self) -> &mut Times {
        &mut self.walk.times
    }

    /// A tensor's GGUF name from its name within the layer.
    pub(super) fn full_name(&self, name: &str) -> String {
        format!("blk.{}.{name}", self.index)
    }

    /// The linear layers of a stage, by tensor.
    pub(crate) fn linears(&self, stage: Stage, part: Option<usize>) -> Vec<Linear> {
        let prefix = self.full_name("");
        let tensors = self.walk.checkpoint.tensors().iter();
        let in_stage = tensors.filter(|(name, _)| {
            name.strip_prefix(&prefix).is_some_and(|rest| Stage::of(rest) == Some(stage))
        });
        let linear = |(name, entry): (&String, &bevel_model::Entry)| {
            let dims = entry.shape.dims();
            let [rows, cols] = [dims[dims.len() - 2], dims[dims.len() - 1]];
            Linear { name: name.clone(), part, rows, cols }
        };
        in_stage.map(linear).collect()
    }

    /// The weights of a linear layer before it is quantized, `[rows, cols]`.
    pub(crate) fn weight(&self, linear: &Linear) -> Result<Vec<f32>> {
        if let Some(values) = self.changed.get(&(linear.name.clone(), linear.part)) {
            return Ok(values.clone());
        }
        let first = linear.part.unwrap_or(0) * linear.rows;
        read_rows(self.walk.checkpoint, &linear.name, first, linear.rows)
    }

    /// (3) Goes on with other weights in a linear layer.
    pub(crate) fn replace(&mut self, linear: &Linear, values: &[f32]) -> Result<()> {
        let name = &linear.name[self.full_name("").len()..];
        // Inputs are what the stages before give, and those are others now.
        if self.kept.as_ref().is_some_and(|kept| Stage::of(name) != Some(kept.stage)) {
            self.kept = None;
        }
        Ok(self.block.set_weight(self.walk.cpu, name, linear.part, values)?)
    }

    /// The experts whose statistics of a stage fit in memory together, in order.
    pub(crate) fn expert_batches(
        &self,
        stage: Stage,
        needs: Needs,
        limits: &Limits,
    ) -> Vec<Option<Range<usize>>> {
        let config = self.walk.checkpoint.config();
        let experts = config.experts.filter(|_| stage == Stage::GateUp || stage == Stage::Down);
        let Some(experts) = experts else { return vec![None] };
        let cols = if stage == Stage::Down { config.ffn_dim } else { config.dim } as u64;
        let bytes = if needs.gram { 4 * cols * cols } else { 20 * cols };
        let count = usize::try_from(limits.statistics / bytes.max(1)).unwrap_or(1).max(1);
        let batches = (0..experts.count).step_by(count);
        batches.map(|first| Some(first..experts.count.min(first + count))).collect()
    }

    /// Statistics of all stages' inputs, but for experts', while nothing of the layer is quantized.
    pub(crate) fn survey(
        &mut self,
        needs: Needs,
        meter: &mut Meter<'_, '_>,
    ) -> Result<BTreeMap<Stage, Stats>> {
        let all = self.watch(needs, &|site| site.expert.is_none(), false, meter)?;
        Ok(all.into_iter().map(|(site, stats)| (site.stage, stats)).collect())
    }

    /// Takes the streams through the whole layer as it is; statistics of all inputs on the way.
    pub(crate) fn observe(
        mut self,
        needs: Needs,
        meter: &mut Meter<'_, '_>,
    ) -> Result<BTreeMap<Site, Stats>> {
        self.watch(needs, &|_| true, true, meter)
    }

    /// Runs the sequences through the whole layer and gathers statistics where `wanted`. The streams
    /// go on from there where they are to `advance`.
    fn watch(
        &mut self,
        needs: Needs,
        wanted: &dyn Fn(&Site) -> bool,
        advance: bool,
        meter: &mut Meter<'_, '_>,
    ) -> Result<BTreeMap<Site, Stats>> {
        let mut all = BTreeMap::new();
        let name = format!("blk.{}", self.index);
        let Walk { checkpoint, cpu, run, streams, times, .. } = &mut *self.walk;
        let config = checkpoint.config();
        let mut x = Vec::new();
        for index in 0..streams.len() {
            let mut gather = |site: Site, input: &[f32], n: usize| {
                if wanted(&site) {
                    let stats = || Stats::new(input.len() / n, needs);
                    let stats = all.entry(site).or_insert_with(stats);
                    gather_into(stats, times, cpu, input, n, None);
                }
                ControlFlow::Continue(())
            };
            streams.read(index, &mut x)?;
            let _ = self.block.attention(cpu, config, &mut x, run, &mut gather)?;
            let _ = self.block.feed_forward(cpu, config, &mut x, run, &mut gather)?;
            if advance {
                streams.write(index, &x)?;
            }
            meter.advance(&name, 1)?;
        }
        Ok(all)
    }

    /// (2) Runs the sequences up to a stage and gathers statistics of its inputs, of the experts in
    /// `experts` where it has any. Stages are to be asked for in their order.
    pub(crate) fn stats(
        &mut self,
        stage: Stage,
        needs: Needs,
        experts: Option<Range<usize>>,
        meter: &mut Meter<'_, '_>,
    ) -> Result<StageStats> {
        let mut all = StageStats::new();
        let name = format!("blk.{}", self.index);
        // Experts see other tokens in the uncompressed model.
        let cross = needs.cross && self.full.is_some() && experts.is_none();
        let needs = Needs { cross, ..needs };
        let config = self.walk.checkpoint.config();
        let to_stream = matches!(stage, Stage::AttentionOutput | Stage::Down)
            && config.family.norms == NormPlacement::Pre;
        // Outputs that join the stream as they are.
        let joins = needs.cross && to_stream && config.residual_scale == 1.0;
        let weighed = to_stream && experts.is_none();
        let attend = !self.attended && matches!(stage, Stage::GateUp | Stage::Down);
        let mut before = self.kept.take();
        let mut kept = self.keep(stage)?;
        let (mut inputs, mut full_inputs) = (Vec::new(), Vec::new());
        let (mut x, mut full_x) = (Vec::new(), Vec::new());
        for index in 0..self.walk.streams.len() {
            if attend {
                self.attend(index, before.as_mut())?;
            }
            if needs.cross {
                self.full_inputs(stage, index, &mut full_x, &mut full_inputs)?;
                if let Some(full) = kept.as_mut().and_then(|kept| kept.full.as_mut()) {
                    full.write(index, &full_inputs)?;
                }
            }
            let Walk { checkpoint, cpu, run, streams, times, .. } = &mut *self.walk;
            let config = checkpoint.config();
            streams.read(index, &mut x)?;
            let mut lost: Option<Vec<f32>> =
                joins.then(|| full_x.iter().zip(&x).map(|(full, x)| full - x).collect());
            let factors = weighed.then(|| tokens::factors(&x, config.dim));
            if let Some(factors) = &factors {
                weigh(lost.as_deref_mut().unwrap_or_default(), factors);
                weigh(&mut full_inputs, factors);
            }
            let mut gather = |site: Site, input: &[f32], n: usize| {
                if site.stage != stage {
                    return ControlFlow::Continue(());
                }
                let wanted = match (&experts, site.expert) {
                    (Some(experts), Some(expert)) => experts.contains(&expert),
                    _ => true,
                };
                if kept.is_some() {
                    inputs.clear();
                    inputs.extend_from_slice(input);
                }
                if wanted {
                    let mut input = Cow::Borrowed(input);
                    if let Some(factors) = &factors {
                        weigh(input.to_mut(), factors);
                    }
                    let stats = || Stats::new(input.len() / n, needs);
                    let stats = all.entry(site.expert).or_insert_with(stats);
                    let full_inputs = cross.then_some(&full_inputs[..]);
                    gather_into(stats, times, cpu, &input, n, full_inputs);
                    if let Some(lost) = &lost {
                        times.time("statistics", || stats.add_residual(cpu, &input, lost, n));
                    }
                }
                ControlFlow::Break(())
            };
            let _ = match stage {
                Stage::Qkv | Stage::AttentionOutput => {
                    self.block.attention(cpu, config, &mut x, run, &mut gather)?
                }
                _ => self.block.feed_forward(cpu, config, &mut x, run, &mut gather)?,
            };
            if let Some(kept) = &mut kept {
                kept.inputs.write(index, &inputs)?;
            }
            meter.advance(&name, 1)?;
        }
        self.attended |= attend;
        self.kept = kept;
        Ok(all)
    }

    /// Takes the streams of a sequence through the layer's attention.
    fn attend(&mut self, index: usize, kept: Option<&mut Kept>) -> Result<()> {
        let Walk { checkpoint, cpu, run, streams, full, .. } = &mut *self.walk;
        let config = checkpoint.config();
        let (inputs, full_inputs) = match kept {
            Some(kept) => (Some(&mut kept.inputs), kept.full.as_mut()),
            None => (None, None),
        };
        let mut x = Vec::new();
        streams.read(index, &mut x)?;
        attention(&self.block, cpu, config, run, inputs, index, &mut x)?;
        streams.write(index, &x)?;
        if let (Some(streams), Some(block)) = (full, &self.full) {
            streams.read(index, &mut x)?;
            attention(block, cpu, config, run, full_inputs, index, &mut x)?;
            streams.write(index, &x)?;
        }
        Ok(())
    }

    /// What a stage's inputs are in the uncompressed model, and the stream there: nothing where it
    /// does not walk beside.
    fn full_inputs(
        &mut self,
        stage: Stage,
        index: usize,
        x: &mut Vec<f32>,
        inputs: &mut Vec<f32>,
    ) -> Result<()> {
        let Walk { checkpoint, cpu, run, full, .. } = &mut *self.walk;
        let (Some(streams), Some(block)) = (full, &self.full) else { return Ok(()) };
        let mut copy = |site: Site, input: &[f32], _: usize| {
            if site.stage != stage {
                return ControlFlow::Continue(());
            }
            inputs.clear();
            inputs.extend_from_slice(input);
            ControlFlow::Break(())
        };
        streams.read(index, x)?;
        let _ = match stage {
            Stage::Qkv | Stage::AttentionOutput => {
                block.attention(cpu, checkpoint.config(), x, run, &mut copy)?
            }
            _ => block.feed_forward(cpu, checkpoint.config(), x, run, &mut copy)?,
        };
        Ok(())
    }

    /// Room for a stage's inputs, where it is the last of its half: what is computed up to there need
    /// not be computed again. A mixture's experts have inputs of their own.
    fn keep(&self, stage: Stage) -> Result<Option<Kept>> {
        let Walk { checkpoint, streams, full, spill, limit, .. } = &*self.walk;
        let config = checkpoint.config();
        let width = match stage {
            Stage::AttentionOutput => config.q_dim(),
            Stage::Down if config.experts.is_none() => config.ffn_dim,
            _ => return Ok(None),
        };
        let lengths = streams.lengths().iter().map(|len| len / config.dim * width);
        let lengths: Vec<usize> = lengths.collect();
        let limit = if full.is_some() { limit / 2 } else { *limit };
        let room = |kind: &str| {
            let path = spill.join(format!("{kind}-{stage:?}"));
            Activations::new(lengths.clone(), limit, &path)
        };
        let full = full.is_some().then(|| room("full-inputs")).transpose()?;
        Ok(Some(Kept { stage, inputs: room("inputs")?, full }))
    }

    /// What a sequence's stream is after the layer as it is now. It stays where it is.
    pub(crate) fn outcome(&mut self, sequence: usize, x: &mut Vec<f32>) -> Result<()> {
        self.walk.streams.read(sequence, x)?;
        let Walk { checkpoint, cpu, run, .. } = &mut *self.walk;
        let kept = self.kept.as_mut().map(|kept| (kept.stage, &mut kept.inputs));
        through(&self.block, cpu, checkpoint.config(), run, self.attended, kept, sequence, x)
    }

    /// Takes a stream that is none of the walk's through the layer as it is now.
    pub(crate) fn pass(&mut self, x: &mut Vec<f32>) -> Result<()> {
        let Walk { checkpoint, cpu, run, .. } = &mut *self.walk;
        through(&self.block, cpu, checkpoint.config(), run, false, None, 0, x)
    }

    /// (4) Takes the streams through what is left of the layer.
    pub(crate) fn leave(mut self, meter: &mut Meter<'_, '_>) -> Result<()> {
        let name = format!("blk.{}", self.index);
        let Walk { checkpoint, cpu, run, streams, full, .. } = self.walk;
        let (config, attended) = (checkpoint.config(), self.attended);
        let mut x = Vec::new();
        for index in 0..streams.len() {
            let kept = self.kept.as_mut().map(|kept| (kept.stage, &mut kept.inputs));
            streams.read(index, &mut x)?;
            through(&self.block, cpu, config, run, attended, kept, index, &mut x)?;
            streams.write(index, &x)?;
            if let (Some(streams), Some(block)) = (full.as_mut(), &self.full) {
                let kept = self.kept.as_mut();
                let kept = kept.and_then(|kept| Some((kept.stage, kept.full.as_mut()?)));
                streams.read(index, &mut x)?;
                through(block, cpu, config, run, attended, kept, index, &mut x)?;
                streams.write(index, &x)?;
            }
            meter.advance(&name, 1)?;
        }
        Ok(())
    }
}

/// x += attention(x) of a sequence, from the last projection's inputs on where they are kept.
fn attention(
    block: &Block,
    cpu: &Cpu,
    config: &ModelConfig,
    run: &mut BlockState,
    kept: Option<&mut Activations>,
    sequence: usize,
    x: &mut Vec<f32>,
) -> Result<()> {
    if let Some(kept) = kept {
        let mut input = Vec::new();
        kept.read(sequence, &mut input)?;
        return Ok(block.finish(cpu, config, Stage::AttentionOutput, &input, x, run)?);
    }
    let mut pass = |_: Site, _: &[f32], _: usize| ControlFlow::Continue(());
    let _ = block.attention(cpu, config, x, run, &mut pass)?;
    Ok(())
}

/// Takes a sequence's stream through a block, or what is left of it.
fn through(
    block: &Block,
    cpu: &Cpu,
    config: &ModelConfig,
    run: &mut BlockState,
    attended: bool,
    kept: Option<(Stage, &mut Activations)>,
    sequence: usize,
    x: &mut Vec<f32>,
) -> Result<()> {
    let (for_attention, for_mlp) = match kept {
        Some((Stage::Down, kept)) => (None, Some(kept)),
        kept => (kept.map(|(_, kept)| kept), None),
    };
    if !attended {
        attention(block, cpu, config, run, for_attention, sequence, x)?;
    }
    if let Some(kept) = for_mlp {
        let mut input = Vec::new();
        kept.read(sequence, &mut input)?;
        return Ok(block.finish(cpu, config, Stage::Down, &input, x, run)?);
    }
    let mut pass = |_: Site, _: &[f32], _: usize| ControlFlow::Continue(());
    let _ = block.feed_forward(cpu, config, x, run, &mut pass)?;
    Ok(())
}
