//! One decoder block alone: what a calibration walk needs, which sees a model layer by layer and
//! changes weights as it goes.

use std::ops::{ControlFlow, Range};

use bevel_kernels::Cpu;

use crate::adapter::LayerAdapters;
use crate::forward::{LayerPlace, spans};
use crate::linear::Linear;
use crate::weights::{Ffn, LayerWeights, Loader, Mlp, pack_f32};
use crate::{Checkpoint, Error, KvCache, ModelConfig, Result, Sequence, Stage, State, Tap};

/// A decoder block with weights of floating point: packed ones are unpacked, so that what is
/// measured is the model and not the rounding of its activations to int8.
#[derive(Debug)]
pub struct Block {
    weights: LayerWeights,
    /// Linear layers multiply in bf16.
    bf16: bool,
    place: LayerPlace,
}

/// How exactly a [`Block`]'s linear layers multiply. Everything else is in single precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// In single precision.
    Single,
    /// With weights and inputs rounded to bf16, where
    /// [`Isa::has_bf16_products`](bevel_kernels::Isa::has_bf16_products); elsewhere as `Single`, which is
    /// the faster there.
    Fast,
}

/// The buffers that blocks of a model run in: one sequence at a time, from its beginning.
#[derive(Debug)]
pub struct BlockState {
    cache: KvCache,
    sequence: Sequence,
    state: State,
}

impl BlockState {
    /// Buffers for sequences of up to `tokens` tokens.
    ///
    /// # Errors
    /// Those of [`KvCache::new`].
    pub fn new(config: &ModelConfig, tokens: usize) -> Result<Self> {
        Ok(Self {
            cache: KvCache::for_one_layer(config, tokens)?,
            sequence: Sequence::new(),
            state: State::new(config, tokens),
        })
    }
}

impl Block {
    /// Reads block `layer` of a model.
    ///
    /// # Errors
    /// Those of reading and packing a tensor.
    pub fn load(
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        layer: usize,
        precision: Precision,
    ) -> Result<Self> {
        let bf16 = precision == Precision::Fast && cpu.isa().has_bf16_products();
        let loader = if bf16 { Loader::bf16 } else { Loader::exact };
        let windowed = checkpoint.config().windowed[layer];
        let weights = loader(checkpoint, cpu, &mut |_| {}).layer(layer)?;
        Ok(Self { weights, bf16, place: LayerPlace { cached: 0, windowed } })
    }

    /// x += attention(x) for the residual stream `x`, `[n, dim]`, of one sequence. Where `tap` breaks
    /// off, `x` is as it was.
    ///
    /// # Errors
    /// [`Error::ContextFull`] where the sequence is longer than the buffers.
    pub fn attention(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        x: &mut Vec<f32>,
        run: &mut BlockState,
        tap: &mut Tap<'_>,
    ) -> Result<ControlFlow<()>> {
        run.begin(cpu, config, x)?;
        let parts = [run.sequence.part(run.sequence.len())];
        let (spans, cache, none) =
            (spans(&parts, Vec::new()), run.cache.pool(), LayerAdapters::NONE);
        let done = self.weights.attention(
            cpu,
            config,
            self.place,
            &spans,
            cache,
            &mut run.state,
            none,
            tap,
        );
        std::mem::swap(&mut run.state.x, x);
        Ok(done)
    }

    /// x += mlp(x), as [`Block::attention`].
    ///
    /// # Errors
    /// Those of [`Block::attention`].
    pub fn feed_forward(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        x: &mut Vec<f32>,
        run: &mut BlockState,
        tap: &mut Tap<'_>,
    ) -> Result<ControlFlow<()>> {
        run.begin(cpu, config, x)?;
        let state = &mut run.state;
        let done = self.weights.feed_forward(cpu, config, state, LayerAdapters::NONE, tap);
        std::mem::swap(&mut run.state.x, x);
        Ok(done)
    }

    /// The rest of [`Block::attention`] or [`Block::feed_forward`], which was broken off at the input of
    /// its last projection, `[n, in]`: x += projection(input). Neither depends on the other weights.
    ///
    /// # Errors
    /// Those of [`Block::attention`].
    ///
    /// # Panics
    /// Where `stage` is not the last of a half of the block, in a mixture's MLP, and where a length
    /// differs.
    pub fn finish(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        stage: Stage,
        input: &[f32],
        x: &mut Vec<f32>,
        run: &mut BlockState,
    ) -> Result<()> {
        run.begin(cpu, config, x)?;
        match stage {
            Stage::AttentionOutput => {
                let (state, none) = (&mut run.state, LayerAdapters::NONE);
                self.weights.finish_attention(cpu, config, input, state, none);
            }
            Stage::Down => self.weights.finish_feed_forward(cpu, config, input, &mut run.state),
            _ => panic!("{stage:?} is not the last stage of a half"),
        }
        std::mem::swap(&mut run.state.x, x);
        Ok(())
    }

    /// Replaces a vector of the block, a norm or a bias, by its GGUF name without `blk.N.`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where the block has none of this name.
    ///
    /// # Panics
    /// Where it has another length.
    pub fn set_vector(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let w = &mut self.weights;
        let norm = match name {
            "attn_norm.weight" => w.attn_norm.as_mut(),
            "ffn_norm.weight" => w.ffn_norm.as_mut(),
            "attn_q_norm.weight" => w.q_norm.as_mut(),
            "attn_k_norm.weight" => w.k_norm.as_mut(),
            "post_attention_norm.weight" => w.post_attn_norm.as_mut(),
            "post_ffw_norm.weight" => w.post_ffn_norm.as_mut(),
            _ => {
                let stem = name.strip_suffix(".bias").ok_or_else(|| missing(name))?;
                for (linear, rows) in self.linears(stem, None).ok_or_else(|| missing(name))? {
                    let bias = linear.bias.as_mut().ok_or_else(|| missing(name))?;
                    bias.copy_from_slice(&values[rows]);
                }
                return Ok(());
            }
        };
        norm.ok_or_else(|| missing(name))?.copy_from_slice(values);
        Ok(())
    }

    /// Replaces the weights of a linear layer, `[out, in]`, by its GGUF name without `blk.N.`. One of
    /// a stack of experts is meant where `expert` says so.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where the block has no such layer.
    ///
    /// # Panics
    /// Where the dimensions are others.
    pub fn set_weight(
        &mut self,
        cpu: &Cpu,
        name: &str,
        expert: Option<usize>,
        values: &[f32],
    ) -> Result<()> {
        let stem = name.strip_suffix(".weight").ok_or_else(|| missing(name))?;
        let bf16 = self.bf16;
        for (linear, rows) in self.linears(stem, expert).ok_or_else(|| missing(name))? {
            let (count, cols) = (linear.weight.rows(), linear.weight.cols());
            let values = &values[rows.start * cols..rows.end * cols];
            linear.weight = pack_f32(cpu, count, cols, values, bf16);
        }
        Ok(())
    }

    /// The linear layers that a tensor holds, each with its rows there.
    fn linears(
        &mut self,
        stem: &str,
        expert: Option<usize>,
    ) -> Option<Vec<(&mut Linear, Range<usize>)>> {
        let w = &mut self.weights;
        let parts: Vec<&mut Linear> = match stem {
            "attn_q" => vec![&mut w.q],
            "attn_k" => vec![&mut w.k],
            "attn_v" => vec![&mut w.v],
            "attn_qkv" => vec![&mut w.q, &mut w.k, &mut w.v],
            "attn_output" => vec![&mut w.o],
            _ => {
                let mlp: &mut Mlp = match (&mut w.ffn, expert) {
                    (Ffn::Dense(mlp), None) => mlp,
                    (Ffn::Experts { experts, .. }, Some(expert)) => experts.get_mut(expert)?,
                    _ => return None,
                };
                match stem {
                    "ffn_up" if w.fused => vec![&mut mlp.gate, &mut mlp.up],
                    "ffn_gate" | "ffn_gate_exps" => vec![&mut mlp.gate],
                    "ffn_up" | "ffn_up_exps" => vec![&mut mlp.up],
                    "ffn_down" | "ffn_down_exps" => vec![&mut mlp.down],
                    _ => return None,
                }
            }
        };
        let mut start = 0;
        let with_rows = parts.into_iter().map(|linear| {
            let rows = start..start + linear.weight.rows();
            start = rows.end;
            (linear, rows)
        });
        Some(with_rows.collect())
    }
}

impl BlockState {
    /// Takes `x` in, as a sequence's beginning.
    fn begin(&mut self, cpu: &Cpu, config: &ModelConfig, x: &mut Vec<f32>) -> Result<()> {
        let n = x.len() / config.dim;
        self.cache.truncate(&mut self.sequence, 0);
        self.cache.extend(&mut self.sequence, n)?;
        let parts = [self.sequence.part(n)];
        self.state.place(cpu, config, n, &parts);
        std::mem::swap(&mut self.state.x, x);
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::MissingTensor { path: "a block".to_owned(), tensor: name.to_owned() }
}
