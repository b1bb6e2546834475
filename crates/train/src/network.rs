use std::ops::Range;

use bevel_kernels::{Cpu, RopeTable, cross_entropy, scale, softcap, softcap_backward};
use bevel_model::Checkpoint;

use crate::layer::{Layer, Room, Step, normed, normed_backward};
use crate::lora::{Lora, LoraConfig};
use crate::{Error, Frozen, Parameters, Result};

/// Rows whose logits are in memory together.
const ROWS: usize = 128;

/// A model with adapters that can be trained.
#[derive(Debug)]
pub struct Network<'c> {
    checkpoint: &'c Checkpoint,
    embedding: Frozen<'c>,
    layers: Vec<Layer<'c>>,
    norm: Option<Vec<f32>>,
    /// `None` where it is the embedding.
    head: Option<Frozen<'c>>,
    rope: RopeTable,
    local_rope: Option<RopeTable>,
    room: Room,
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

impl<'c> Network<'c> {
    /// A checkpoint's model with adapters, which are added to `parameters`, for sequences of up to `context` tokens.
    ///
    /// # Errors
    /// Those of reading tensors; [`Error::Experts`].
    pub fn new(
        checkpoint: &'c Checkpoint,
        lora: &LoraConfig,
        context: usize,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let config = checkpoint.config();
        if config.experts.is_some() {
            return Err(Error::Experts { path: checkpoint.path().to_owned() });
        }
        let mut random = Lora::random(lora);
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(Layer::load(checkpoint, layer, lora, &mut random, parameters)?);
        }
        let head = match config.tied {
            true => None,
            false => Some(Frozen::load(checkpoint, "output.weight", None)?),
        };
        Ok(Self {
            embedding: Frozen::load(checkpoint, "token_embd.weight", None)?,
            layers,
            norm: Some(checkpoint.read_f32("output_norm.weight")?),
            head,
            rope: config.rope_table(&config.rope, context),
            local_rope: config.local_rope.as_ref().map(|rope| config.rope_table(rope, context)),
            room: Room::default(),
            checkpoint,
        })
    }

    /// Σ weight · loss over the batch, in nats.
    ///
    /// # Errors
    /// [`Error::NotFinite`], a token that the model does not have, and memory.
    pub fn loss(&mut self, cpu: &Cpu, parameters: &Parameters, batch: &Batch<'_>) -> Result<f64> {
        let (loss, ..) = self.forward(cpu, parameters, batch, false)?;
        Ok(loss)
    }

    /// The same; its gradients are added to those of the parameters.
    ///
    /// # Errors
    /// Those of [`Network::loss`].
    pub fn loss_and_gradients(
        &mut self,
        cpu: &Cpu,
        parameters: &mut Parameters,
        batch: &Batch<'_>,
    ) -> Result<f64> {
        let (loss, inputs, mut d_x) = self.forward(cpu, parameters, batch, true)?;
        let step = Step {
            cpu,
            config: self.checkpoint.config(),
            sequences: batch.sequences,
            rope: &self.rope,
            local_rope: self.local_rope.as_ref(),
            n: batch.tokens.len(),
        };
        for (layer, x) in self.layers.iter().zip(&inputs).rev() {
            layer.backward(&step, parameters, &mut d_x, x, &mut self.room)?;
        }
        Ok(loss)
    }

    /// The loss; and where `keep`, the input of every layer and the gradient of the last one's output.
    fn forward(
        &mut self,
        cpu: &Cpu,
        parameters: &Parameters,
        batch: &Batch<'_>,
        keep: bool,
    ) -> Result<(f64, Vec<Vec<f32>>, Vec<f32>)> {
        let config = self.checkpoint.config();
        let n = batch.tokens.len();
        let positions: Vec<u32> =
            batch.sequences.iter().flat_map(|rows| 0..rows.len() as u32).collect();
        assert_eq!([positions.len(), batch.targets.len(), batch.weights.len()], [n; 3]);
        self.rope.prepare(cpu, &positions);
        if let Some(rope) = &mut self.local_rope {
            rope.prepare(cpu, &positions);
        }
        let mut x = vec![0.0; n * config.dim];
        for (&token, x) in batch.tokens.iter().zip(x.chunks_exact_mut(config.dim)) {
            let row = token as usize;
            if row >= config.vocab_size {
                let vocab = config.vocab_size;
                return Err(bevel_model::Error::Token { token, vocab }.into());
            }
            self.embedding.row(row, x);
        }
        if config.embedding_scale != 1.0 {
            scale(cpu, &mut x, config.embedding_scale);
        }
        let (rope, local_rope) = (&self.rope, self.local_rope.as_ref());
        let step = Step { cpu, config, sequences: batch.sequences, rope, local_rope, n };
        let mut inputs = Vec::new();
        for layer in &self.layers {
            if keep {
                inputs.push(x.clone());
            }
            layer.forward(&step, parameters, &mut x, &mut self.room)?;
        }
        let (loss, d_x) = self.head_loss(cpu, &x, batch, keep)?;
        Ok((loss, inputs, d_x))
    }

    /// The loss of the last layer's output, and where `wanted` its gradient. Logits are in memory for some rows
    /// at a time.
    fn head_loss(
        &mut self,
        cpu: &Cpu,
        x: &[f32],
        batch: &Batch<'_>,
        wanted: bool,
    ) -> Result<(f64, Vec<f32>)> {
        let config = self.checkpoint.config();
        let (dim, vocab) = (config.dim, config.vocab_size);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let mut d_x = vec![0.0; if wanted { x.len() } else { 0 }];
        let mut loss = 0.0;
        for first in (0..batch.tokens.len()).step_by(ROWS) {
            let rows = first..batch.tokens.len().min(first + ROWS);
            let weights = &batch.weights[rows.clone()];
            if weights.iter().all(|&weight| weight == 0.0) {
                continue;
            }
            let n = rows.len();
            let step = Step { cpu, config, sequences: &[], rope: &self.rope, local_rope: None, n };
            let x = &x[rows.start * dim..rows.end * dim];
            let hidden = normed(&step, &self.norm, x);
            let mut logits = vec![0.0; n * vocab];
            head.forward(cpu, &mut logits, &hidden, n, &mut self.room.tile);
            if config.logit_divisor != 1.0 {
                scale(cpu, &mut logits, 1.0 / config.logit_divisor);
            }
            let capped = config.logit_softcap.map(|cap| {
                softcap(cpu, &mut logits, cap);
                (cap, logits.clone())
            });
            let losses = cross_entropy(cpu, &mut logits, &batch.targets[rows.clone()], weights);
            loss += losses.iter().zip(weights).map(|(l, &w)| l * f64::from(w)).sum::<f64>();
            if !wanted {
                continue;
            }
            if let Some((cap, logits_before)) = capped {
                softcap_backward(cpu, &mut logits, &logits_before, cap);
            }
            if config.logit_divisor != 1.0 {
                scale(cpu, &mut logits, 1.0 / config.logit_divisor);
            }
            let mut d_hidden = vec![0.0; n * dim];
            head.backward(cpu, &mut d_hidden, &logits, n, &mut self.room.tile);
            let d_x = &mut d_x[rows.start * dim..rows.end * dim];
            normed_backward(&step, &self.norm, d_x, &d_hidden, x);
        }
        if !loss.is_finite() {
            return Err(Error::NotFinite);
        }
        Ok((loss, d_x))
    }
}
