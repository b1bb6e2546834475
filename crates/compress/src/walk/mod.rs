//! The calibration walk: a model is met layer by layer, in the order of computation, on the inputs
//! that its already compressed part gives.
//!
//! 1. Every calibration sequence is embedded: the residual stream `x`.
//! 2. A layer is loaded. For each of its four stages (queries, keys, values → attention output →
//!    gate, up → down) the sequences are run up to there, and statistics of the stage's inputs are
//!    gathered: with the layer's earlier stages and all earlier layers compressed already.
//! 3. The caller replaces the stage's weights by what will be stored.
//! 4. After the last stage the sequences pass through the whole compressed layer: the next one's `x`.
//!    What the attention's and the MLP's last projections are given was seen in step 2 and is kept
//!    until then, so that every matrix is multiplied with every sequence once.
//!
//! Where outputs join the residual stream, a token whose stream is far larger than others' counts for less
//! (`tokens.rs`).
//!
//! GPTAQ (arXiv 2504.02692) also asks what the inputs would have been: then the uncompressed model
//! walks beside, layer by layer, on streams of its own.
//!
//! Memory holds one layer, the statistics of one stage, and the streams, which go to a file beyond a
//! limit. In a mixture the statistics of a stage are gathered for some experts at a time.

mod activations;
mod fold;
mod layer;
mod tokens;
mod unfinished;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bevel_base::pack;
use bevel_kernels::{Cpu, rms_norm, scale};
use bevel_model::{BlockState, Checkpoint, Precision};

pub(crate) use activations::Activations;
pub(crate) use layer::{Layer, Linear};
pub(crate) use unfinished::{Claim, Fingerprint, Outcome, Results, Unfinished, kept, remove_kept};

use crate::progress::Meter;
use crate::{Error, Needs, Result, Stats, Times};

/// A model on its walk.
pub(crate) struct Walk<'a> {
    checkpoint: &'a Checkpoint,
    cpu: &'a Cpu,
    run: BlockState,
    streams: Activations,
    /// The streams of the uncompressed model.
    full: Option<Activations>,
    /// Where inputs that are kept lie if they take more than `limit` bytes.
    spill: PathBuf,
    limit: u64,
    precision: Precision,
    /// What took how long.
    pub(crate) times: Times,
}

/// How much memory a walk may take beside the layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of residual streams; more go to a file.
    pub(crate) streams: u64,
    /// Bytes of a stage's inputs that are kept; more go to a file.
    pub(crate) inputs: u64,
    /// Bytes of statistics of a mixture's experts that are gathered at a time; one expert's always fit.
    pub(crate) statistics: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { streams: 2 << 30, inputs: 512 << 20, statistics: 1 << 30 }
    }
}

/// Statistics of a stage: of one expert each, or of all.
pub(crate) type StageStats = BTreeMap<Option<usize>, Stats>;

impl<'a> Walk<'a> {
    /// Begins a walk over token sequences. `with_full` lets the uncompressed model walk beside.
    /// Streams that are too large for memory lie in `dir`.
    pub(crate) fn begin(
        checkpoint: &'a Checkpoint,
        cpu: &'a Cpu,
        sequences: &[Vec<u32>],
        with_full: bool,
        limits: &Limits,
        dir: &Path,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let lengths: Vec<usize> = sequences.iter().map(|s| s.len() * config.dim).collect();
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let streams =
            |name: &str, limit: u64| Activations::new(lengths.clone(), limit, &dir.join(name));
        let limit = if with_full { limits.streams / 2 } else { limits.streams };
        let mut walk = Self {
            checkpoint,
            cpu,
            run: BlockState::new(config, longest)?,
            streams: streams("streams", limit)?,
            full: with_full.then(|| streams("full-streams", limit)).transpose()?,
            spill: dir.to_owned(),
            limit: limits.inputs,
            precision: Precision::Single,
            times: Times::default(),
        };
        walk.embed(sequences)?;
        Ok(walk)
    }

    /// Lets layers multiply in bf16 where that is faster: what is lost is less than what solvers lose even in
    /// eight bits. What a type costs by itself would drown in it.
    pub(crate) fn fast(self) -> Self {
        Self { precision: Precision::Fast, ..self }
    }

    /// Goes on from streams that [`Walk::save`] kept.
    pub(crate) fn resume(&mut self, streams: &Path, full: &Path) -> Result<()> {
        self.streams.load(streams)?;
        self.full.as_mut().map_or(Ok(()), |streams| streams.load(full))
    }

    /// Keeps the streams in files.
    pub(crate) fn save(&mut self, streams: &Path, full: &Path) -> Result<()> {
        self.streams.save(streams)?;
        self.full.as_mut().map_or(Ok(()), |streams| streams.save(full))
    }

    /// (1) The rows of the embedding.
    fn embed(&mut self, sequences: &[Vec<u32>]) -> Result<()> {
        let config = self.checkpoint.config();
        embedding_rows(self.checkpoint, sequences, |index, mut x| {
            if config.embedding_scale != 1.0 {
                scale(self.cpu, &mut x, config.embedding_scale);
            }
            self.streams.write(index, &x)?;
            self.full.as_mut().map_or(Ok(()), |full| full.write(index, &x))
        })
    }

    /// The stream of a sequence, as far as the walk has come.
    pub(crate) fn stream(&mut self, sequence: usize, x: &mut Vec<f32>) -> Result<()> {
        self.streams.read(sequence, x)
    }

    /// (2) Loads layer `index`, which is to be the next one.
    pub(crate) fn enter(&mut self, index: usize) -> Result<Layer<'_, 'a>> {
        Layer::load(self, index)
    }

    /// The output head, some rows at a time: it may be larger than a layer. The first row of each
    /// part, and the part.
    pub(crate) fn head(&self) -> Vec<(usize, Linear)> {
        let config = self.checkpoint.config();
        let name = if config.tied { EMBEDDING } else { "output.weight" };
        let [vocab, dim] = [config.vocab_size, config.dim];
        let slab = (HEAD_VALUES / dim).clamp(1, vocab);
        let firsts = (0..vocab).step_by(slab).enumerate();
        let linear = |part, first| Linear {
            name: name.to_owned(),
            part: Some(part),
            rows: slab.min(vocab - first),
            cols: dim,
        };
        firsts.map(|(part, first)| (first, linear(part, first))).collect()
    }

    /// Statistics of the output head's inputs, after the last layer.
    pub(crate) fn head_stats(&mut self, needs: Needs, meter: &mut Meter<'_, '_>) -> Result<Stats> {
        let config = self.checkpoint.config();
        let norm = self.checkpoint.read_f32("output_norm.weight")?;
        let needs = Needs { cross: needs.cross && self.full.is_some(), ..needs };
        let mut stats = Stats::new(config.dim, needs);
        let (mut x, mut h) = (Vec::new(), Vec::new());
        let (mut full_x, mut full_h) = (Vec::new(), Vec::new());
        for index in 0..self.streams.len() {
            let normalised = |from: &mut Activations, x: &mut Vec<f32>, h: &mut Vec<f32>| {
                from.read(index, x)?;
                h.resize(x.len(), 0.0);
                let n = x.len() / config.dim;
                rms_norm(self.cpu, h, x, &norm, config.norm_eps, n, config.dim);
                Ok::<_, Error>(n)
            };
            let n = normalised(&mut self.streams, &mut x, &mut h)?;
            if let (Some(full), true) = (&mut self.full, needs.cross) {
                normalised(full, &mut full_x, &mut full_h)?;
            }
            let full_h = needs.cross.then_some(&full_h[..]);
            gather_into(&mut stats, &mut self.times, self.cpu, &h, n, full_h);
            meter.advance("output", 1)?;
        }
        Ok(stats)
    }
}

/// Adds inputs to statistics, on the clock.
fn gather_into(
    stats: &mut Stats,
    times: &mut Times,
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    x_full: Option<&[f32]>,
) {
    times.statistics_operations += stats.needs().operations(n, stats.cols());
    times.time("statistics", || stats.add(cpu, x, n, x_full));
}

/// Values of the output head that are solved at once.
const HEAD_VALUES: usize = 1 << 24;
pub(crate) const EMBEDDING: &str = "token_embd.weight";

/// Passes the embedding's rows of each sequence, `[tokens, dim]`, on to `use_rows`.
pub(crate) fn embedding_rows(
    checkpoint: &Checkpoint,
    sequences: &[Vec<u32>],
    mut use_rows: impl FnMut(usize, Vec<f32>) -> Result<()>,
) -> Result<()> {
    let config = checkpoint.config();
    let dtype = checkpoint.entry(EMBEDDING)?.dtype;
    let bytes = checkpoint.read(EMBEDDING)?;
    let row_bytes = bytes.len() / config.vocab_size;
    for (index, tokens) in sequences.iter().enumerate() {
        let mut x = vec![0.0; tokens.len() * config.dim];
        for (&token, out) in tokens.iter().zip(x.chunks_exact_mut(config.dim)) {
            let row = token as usize;
            let row = bytes
                .get(row * row_bytes..(row + 1) * row_bytes)
                .ok_or(bevel_model::Error::Token { token, vocab: config.vocab_size })?;
            pack::dequantize(dtype, row, out)
                .map_err(|source| Error::Tensor { tensor: EMBEDDING.to_owned(), source })?;
        }
        use_rows(index, x)?;
    }
    drop(bytes);
    checkpoint.release(EMBEDDING);
    Ok(())
}

/// Some rows of a tensor as f32, `[rows, row length]`.
pub(crate) fn read_rows(
    checkpoint: &Checkpoint,
    name: &str,
    first: usize,
    rows: usize,
) -> Result<Vec<f32>> {
    let entry = checkpoint.entry(name)?;
    let bytes = checkpoint.read(name)?;
    let row_bytes = bytes.len() / entry.shape.rows();
    let mut values = vec![0.0; rows * entry.shape.row_len()];
    pack::dequantize(entry.dtype, &bytes[first * row_bytes..][..rows * row_bytes], &mut values)
        .map_err(|source| Error::Tensor { tensor: name.to_owned(), source })?;
    drop(bytes);
    checkpoint.release(name);
    Ok(values)
}
