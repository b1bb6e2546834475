use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bevel_kernels::linalg::{Precision, Rows, Update};
use bevel_kernels::{Cpu, RopeTable, cross_entropy, log_sum_exp, scale, softcap, softcap_backward};
use bevel_model::{Checkpoint, ModelConfig};

use crate::layer::{Layer, Saved, Wanted, normed, normed_backward};
use crate::lora::{Adapter, Lora, Start};
use crate::room::{Input, Room, Step};
use crate::weight::{Loader, Matrix, Vector};
use crate::{Error, Parameter, Parameters, Result, Rounding, Trainable, noise, tiles};

/// Bytes of logits that are in memory together.
const LOGITS: usize = 128 << 20;

/// A model that can be trained.
#[derive(Debug)]
pub struct Network<'c> {
    checkpoint: &'c Checkpoint,
    precision: Precision,
    recompute: Recompute,
    embedding: Matrix<'c>,
    layers: Vec<Layer<'c>>,
    norm: Option<Vector>,
    /// `None` where it is the embedding.
    head: Option<Matrix<'c>>,
    rope: RopeTable,
    local_rope: Option<RopeTable>,
    roundings: BTreeMap<String, Arc<dyn Rounding>>,
    room: Room,
}

/// What the backward pass computes again, to save memory (gradient checkpointing, arXiv 1604.06174).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: every layer's activations are kept.
    #[default]
    Nothing,
    /// All but the input of every so many layers.
    Layers(usize),
}

/// How a network computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Tokens of the longest sequence.
    pub context: usize,
    /// What products multiply.
    pub precision: Precision,
    /// What is computed twice.
    pub recompute: Recompute,
}

/// Tokens of one or more sequences, and what is to be learnt of them.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The sequences' tokens, one sequence after the other.
    pub tokens: &'a [u32],
    /// Rows of each sequence. A token sees those of its own.
    pub sequences: &'a [Range<usize>],
    /// The token that should follow each.
    pub targets: &'a [u32],
    /// What each target's loss counts; 0 for none.
    pub weights: &'a [f32],
}

/// What a network holds after training.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Its adapters.
    pub adapters: Vec<Adapter>,
    /// The tensors that were trained themselves.
    pub tensors: Vec<(String, Arc<[f32]>)>,
}

/// Randomness of a step; the same seed gives the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// Start of the random numbers.
    pub seed: u64,
    /// Embeddings are moved by numbers that are uniform in ± α / √(tokens · width) (NEFTune, arXiv 2310.05914), with
    /// the tokens of a sequence; 0 for none.
    pub neftune: f32,
}

impl<'c> Network<'c> {
    /// A checkpoint's model. What is trained of it is added to `parameters`.
    ///
    /// # Errors
    /// Those of reading tensors; [`Error::NoOriginal`] and [`Error::OtherModel`] for LoftQ.
    pub fn new(
        cpu: &Cpu,
        checkpoint: &'c Checkpoint,
        trainable: &Trainable,
        network: &NetworkConfig,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let config = checkpoint.config();
        if trainable.lora.as_ref().is_some_and(|lora| lora.start == Start::LoftQ) {
            let original = trainable.original.as_ref().ok_or(Error::NoOriginal)?;
            let (own, other) = (config, original.config());
            let shape = |config: &ModelConfig| {
                config.required_tensors().map(|name| config.tensor_shape(&name)).collect::<Vec<_>>()
            };
            if own.family.gguf != other.family.gguf || shape(own) != shape(other) {
                return Err(Error::OtherModel {
                    path: checkpoint.path().to_owned(),
                    original: original.path().to_owned(),
                });
            }
        }
        let random = Lora::random(trainable.lora.as_ref().map_or(0, |lora| lora.seed));
        let mut loader = Loader { cpu, checkpoint, trainable, random, parameters };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(Layer::load(&mut loader, layer)?);
        }
        let head = match config.tied {
            true => None,
            false => Some(loader.matrix("output.weight", None)?),
        };
        let context = network.context;
        Ok(Self {
            precision: network.precision,
            recompute: network.recompute,
            embedding: loader.matrix("token_embd.weight", None)?,
            layers,
            norm: Some(loader.vector("output_norm.weight", None)?),
            head,
            rope: config.rope_table(&config.rope, context),
            local_rope: config.local_rope.as_ref().map(|rope| config.rope_table(rope, context)),
            roundings: trainable.roundings.clone(),
            room: Room::default(),
            checkpoint,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &'c ModelConfig {
        self.checkpoint.config()
    }

    pub(crate) fn layers(&self) -> &[Layer<'c>] {
        &self.layers
    }

    pub(crate) fn recompute(&self) -> Recompute {
        self.recompute
    }

    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of weights that are not trained.
    pub(crate) fn frozen_bytes(&self) -> usize {
        let ends = self.head.iter().chain([&self.embedding]);
        let ends: usize = ends.map(Matrix::frozen_bytes).sum();
        ends + self.layers.iter().map(Layer::frozen_bytes).sum::<usize>()
    }

    /// Values of the largest stretch of a matrix that is packed together.
    pub(crate) fn tile_values(&self) -> usize {
        let config = self.config();
        tiles::most_rows(config.vocab_size, config.dim) * config.dim
    }

    /// Rows whose logits are computed together.
    pub(crate) fn rows_of_logits(&self) -> usize {
        (LOGITS / (4 * self.config().vocab_size)).max(32)
    }

    /// The adapters as they are now.
    pub fn adapters(&self, parameters: &Parameters) -> Vec<Adapter> {
        let layers = self.layers.iter().enumerate();
        layers.flat_map(|(index, layer)| layer.adapters(index, parameters)).collect()
    }

    /// The model's tensors that are trained themselves, as they are to be written now.
    pub fn tensors(&self, parameters: &Parameters) -> Vec<(String, Arc<[f32]>)> {
        let trained = parameters.all().iter().enumerate();
        let trained = trained.filter(|(_, p)| self.checkpoint.tensors().contains_key(&p.name));
        let written = |(index, parameter): (usize, &Parameter)| {
            let mut values = parameters.get(index).to_vec();
            let rounding = self.roundings.get(&parameter.name);
            if let Some(rounding) = rounding.filter(|rounding| rounding.is_before_writing()) {
                let scale = rounding.scale(&values);
                let rows = values.chunks_exact_mut(parameter.shape.1);
                rows.for_each(|row| rounding.round(scale, row));
            }
            (parameter.name.clone(), values.into())
        };
        trained.map(written).collect()
    }

    /// What was trained, with less memory than training took.
    pub fn into_trained(mut self, mut parameters: Parameters) -> Trained {
        self.room = Room::default();
        parameters.gradients = Vec::new();
        let (adapters, tensors) = (self.adapters(&parameters), self.tensors(&parameters));
        Trained { adapters, tensors }
    }

    /// Σ weight · loss over the batch, in nats.
    ///
    /// # Errors
    /// [`Error::NotFinite`], a token that the model does not have, and memory.
    pub fn loss(&mut self, cpu: &Cpu, parameters: &Parameters, batch: &Batch<'_>) -> Result<f64> {
        let losses = self.losses(cpu, parameters, batch)?;
        Ok(weighted(&losses, batch.weights))
    }

    /// The loss of each target whose weight is not 0, in nats; 0 for the others.
    ///
    /// # Errors
    /// Those of [`Network::loss`].
    pub fn losses(
        &mut self,
        cpu: &Cpu,
        parameters: &Parameters,
        batch: &Batch<'_>,
    ) -> Result<Vec<f64>> {
        let passed = self.forward(cpu, parameters, batch, None, false)?;
        let losses = self.head_losses(cpu, parameters, &passed, batch)?;
        self.room.give([passed.x]);
        Ok(losses)
    }

    /// The same as [`Network::loss`]; its gradients are added to those of the parameters.
    ///
    /// # Errors
    /// Those of [`Network::loss`].
    pub fn loss_and_gradients(
        &mut self,
        cpu: &Cpu,
        parameters: &mut Parameters,
        batch: &Batch<'_>,
        noise: Option<Noise>,
    ) -> Result<f64> {
        let passed = self.forward(cpu, parameters, batch, noise, true)?;
        let (losses, d_x) = self.head_backward(cpu, parameters, &passed, batch)?;
        self.backward(cpu, parameters, batch, noise, passed, d_x)?;
        Ok(weighted(&losses, batch.weights))
    }

    /// The same for a loss whose weights depend on the losses of the targets: `weigh` gets these, and returns the
    /// gradient of the whole loss by each of them. Logits are computed twice. Targets of weight 0 are left out.
    ///
    /// # Errors
    /// Those of [`Network::loss`].
    pub fn gradients_of(
        &mut self,
        cpu: &Cpu,
        parameters: &mut Parameters,
        batch: &Batch<'_>,
        noise: Option<Noise>,
        weigh: &mut dyn FnMut(&[f64]) -> Vec<f32>,
    ) -> Result<()> {
        let passed = self.forward(cpu, parameters, batch, noise, true)?;
        let losses = self.head_losses(cpu, parameters, &passed, batch)?;
        let weights = weigh(&losses);
        let weighted = Batch { weights: &weights, ..*batch };
        let (_, d_x) = self.head_backward(cpu, parameters, &passed, &weighted)?;
        self.backward(cpu, parameters, batch, noise, passed, d_x)
    }

    fn step<'a>(
        &'a self,
        cpu: &'a Cpu,
        sequences: &'a [Range<usize>],
        n: usize,
        noise: Option<Noise>,
    ) -> Step<'a> {
        Step {
            cpu,
            precision: self.precision,
            config: self.checkpoint.config(),
            sequences,
            rope: &self.rope,
            local_rope: self.local_rope.as_ref(),
            n,
            noise: noise.map(|noise| noise.seed),
        }
    }

    /// Layers whose activations are kept together.
    fn segment(&self) -> usize {
        match self.recompute {
            Recompute::Nothing => self.layers.len(),
            Recompute::Layers(count) => count.max(1),
        }
    }

    /// Takes the tokens through the layers; where `keep`, what the backward pass needs is kept.
    fn forward(
        &mut self,
        cpu: &Cpu,
        parameters: &Parameters,
        batch: &Batch<'_>,
        noise: Option<Noise>,
        keep: bool,
    ) -> Result<Passed> {
        let config = self.checkpoint.config();
        let n = batch.tokens.len();
        let positions: Vec<u32> =
            batch.sequences.iter().flat_map(|rows| 0..rows.len() as u32).collect();
        assert_eq!([positions.len(), batch.targets.len(), batch.weights.len()], [n; 3]);
        self.rope.prepare(cpu, &positions);
        if let Some(rope) = &mut self.local_rope {
            rope.prepare(cpu, &positions);
        }
        let mut room = std::mem::take(&mut self.room);
        room.begin();
        let mut x = room.take(n * config.dim);
        let embedding = self.embedding.seen(parameters);
        for (&token, x) in batch.tokens.iter().zip(x.chunks_exact_mut(config.dim)) {
            let row = token as usize;
            if row >= config.vocab_size {
                let vocab = config.vocab_size;
                return Err(bevel_model::Error::Token { token, vocab }.into());
            }
            embedding.read(row, x);
        }
        if config.embedding_scale != 1.0 {
            scale(cpu, &mut x, config.embedding_scale);
        }
        if let Some(noise) = noise.filter(|noise| noise.neftune > 0.0) {
            for rows in batch.sequences {
                let values = &mut x[rows.start * config.dim..rows.end * config.dim];
                let size = noise.neftune / (values.len() as f32).sqrt();
                let seed = noise::mix(noise.seed, u64::MAX - rows.start as u64);
                noise::add_uniform(cpu, values, size, seed);
            }
        }
        let step = self.step(cpu, batch.sequences, n, noise);
        let segment = self.segment();
        let last_segment = (self.layers.len() - 1) / segment;
        let (mut starts, mut saved) = (Vec::new(), Vec::new());
        for (index, layer) in self.layers.iter().enumerate() {
            let in_last = index / segment == last_segment;
            if keep && index % segment == 0 && !in_last {
                starts.push(room.copy(&x));
            }
            let wanted = if keep && in_last { Wanted::Both } else { Wanted::Output };
            saved.extend(layer.forward(&step, parameters, &mut x, wanted, &mut room)?);
        }
        self.room = room;
        Ok(Passed { x, starts, saved })
    }

    /// Takes the gradient of the last layer's output back to the embedding.
    fn backward(
        &mut self,
        cpu: &Cpu,
        parameters: &mut Parameters,
        batch: &Batch<'_>,
        noise: Option<Noise>,
        passed: Passed,
        mut d_x: Vec<f32>,
    ) -> Result<()> {
        let Passed { x, mut starts, mut saved } = passed;
        let mut room = std::mem::take(&mut self.room);
        room.give([x]);
        let config = self.checkpoint.config();
        let n = batch.tokens.len();
        let step = self.step(cpu, batch.sequences, n, noise);
        let segment = self.segment();
        for (index, layer) in self.layers.iter().enumerate().rev() {
            if saved.is_empty() {
                let mut x = starts.pop().expect("every segment but the last has its input");
                let first = index + 1 - segment;
                for (i, layer) in self.layers[first..=index].iter().enumerate() {
                    let wanted = if i + 1 < segment { Wanted::Both } else { Wanted::Saved };
                    saved.extend(layer.forward(&step, parameters, &mut x, wanted, &mut room)?);
                }
                room.give([x]);
            }
            let saved = saved.pop().expect("the layers of a segment are kept");
            layer.backward(&step, parameters, &mut d_x, saved, &mut room);
        }
        if let Matrix::Trained { .. } = self.embedding {
            if config.embedding_scale != 1.0 {
                scale(cpu, &mut d_x, config.embedding_scale);
            }
            for (&token, d_x) in batch.tokens.iter().zip(d_x.chunks_exact(config.dim)) {
                self.embedding.row_backward(parameters, token as usize, d_x);
            }
        }
        room.give([d_x]);
        self.room = room;
        Ok(())
    }

    /// The rows that have something to learn, as many together as have room for their logits.
    fn head_rows(&self, weights: &[f32]) -> Vec<Vec<usize>> {
        let rows: Vec<usize> = (0..weights.len()).filter(|&row| weights[row] != 0.0).collect();
        rows.chunks(self.rows_of_logits()).map(<[usize]>::to_vec).collect()
    }

    /// The logits of some rows of the last layer's output: its rows, normalised and not, and the logits before and
    /// after a cap.
    fn logits(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &[f32],
        rows: &[usize],
        room: &mut Room,
    ) -> Logits {
        let (cpu, config) = (step.cpu, step.config);
        let (dim, n) = (config.dim, rows.len());
        let mut chosen = room.take(n * dim);
        for (&row, chosen) in rows.iter().zip(chosen.chunks_exact_mut(dim)) {
            chosen.copy_from_slice(&x[row * dim..][..dim]);
        }
        let hidden = normed(step, parameters, &self.norm, &chosen, room);
        let mut logits = room.take(n * config.vocab_size);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let packed = step.packed(&hidden, n, room);
        head.forward(step, parameters, &mut logits, &packed, &[], room);
        room.give_panels(packed);
        if config.logit_divisor != 1.0 {
            scale(cpu, &mut logits, 1.0 / config.logit_divisor);
        }
        if let Some(cap) = config.logit_softcap {
            softcap(cpu, &mut logits, cap);
        }
        Logits { chosen, hidden, logits }
    }

    /// The loss of each target whose weight is not 0.
    fn head_losses(
        &mut self,
        cpu: &Cpu,
        parameters: &Parameters,
        passed: &Passed,
        batch: &Batch<'_>,
    ) -> Result<Vec<f64>> {
        let mut room = std::mem::take(&mut self.room);
        let step = self.step(cpu, &[], 0, None);
        let mut losses = vec![0.0; batch.tokens.len()];
        for rows in self.head_rows(batch.weights) {
            let found = self.logits(&step, parameters, &passed.x, &rows, &mut room);
            let vocab = self.checkpoint.config().vocab_size;
            for (&row, logits) in rows.iter().zip(found.logits.chunks_exact(vocab)) {
                let target = logits[batch.targets[row] as usize];
                losses[row] = log_sum_exp(cpu, logits) - f64::from(target);
            }
            found.give(&mut room);
        }
        self.room = room;
        finite(losses)
    }

    /// The same, and the gradient of their weighted sum by the last layer's output.
    fn head_backward(
        &mut self,
        cpu: &Cpu,
        parameters: &mut Parameters,
        passed: &Passed,
        batch: &Batch<'_>,
    ) -> Result<(Vec<f64>, Vec<f32>)> {
        let mut room = std::mem::take(&mut self.room);
        let step = self.step(cpu, &[], 0, None);
        let config = self.checkpoint.config();
        let dim = config.dim;
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let mut d_x = room.zeros(passed.x.len());
        let mut losses = vec![0.0; batch.tokens.len()];
        for rows in self.head_rows(batch.weights) {
            let mut found = self.logits(&step, parameters, &passed.x, &rows, &mut room);
            let n = rows.len();
            let capped = config.logit_softcap.map(|cap| (cap, room.copy(&found.logits)));
            let targets: Vec<u32> = rows.iter().map(|&row| batch.targets[row]).collect();
            let weights: Vec<f32> = rows.iter().map(|&row| batch.weights[row]).collect();
            let d_logits = &mut found.logits;
            let of_rows = cross_entropy(cpu, d_logits, &targets, &weights);
            rows.iter().zip(of_rows).for_each(|(&row, loss)| losses[row] = loss);
            if let Some((cap, logits)) = capped {
                softcap_backward(cpu, d_logits, &logits, cap);
                room.give([logits]);
            }
            if config.logit_divisor != 1.0 {
                scale(cpu, d_logits, 1.0 / config.logit_divisor);
            }
            let mut d_hidden = room.take(n * dim);
            let (set, hidden) = (Update::Set, &found.hidden);
            let packed = step.packed(d_logits, n, &mut room);
            let d_logits = Input { values: d_logits, packed: &packed };
            head.backward(&step, parameters, set, &mut d_hidden, d_logits, hidden, &[], &mut room);
            room.give_panels(packed);
            let mut d_chosen = room.zeros(n * dim);
            let chosen = &found.chosen;
            normed_backward(&step, parameters, &self.norm, &mut d_chosen, &d_hidden, chosen);
            for (&row, d_chosen) in rows.iter().zip(d_chosen.chunks_exact(dim)) {
                d_x[row * dim..][..dim].copy_from_slice(d_chosen);
            }
            room.give([d_hidden, d_chosen]);
            found.give(&mut room);
        }
        self.room = room;
        Ok((finite(losses)?, d_x))
    }
}

/// What a forward pass leaves for the backward pass.
struct Passed {
    /// The last layer's output.
    x: Vec<f32>,
    /// The inputs of segments, but for the last.
    starts: Vec<Vec<f32>>,
    /// Of the layers of the last segment.
    saved: Vec<Saved>,
}

/// Logits of some rows, and what they come from.
struct Logits {
    chosen: Vec<f32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl Logits {
    fn give(self, room: &mut Room) {
        room.give([self.chosen, self.hidden, self.logits]);
    }
}

fn weighted(losses: &[f64], weights: &[f32]) -> f64 {
    losses.iter().zip(weights).map(|(loss, &weight)| loss * f64::from(weight)).sum()
}

fn finite(losses: Vec<f64>) -> Result<Vec<f64>> {
    match losses.iter().all(|loss| loss.is_finite()) {
        true => Ok(losses),
        false => Err(Error::NotFinite),
    }
}
