//! What training will take of memory, known before it begins: bytes of everything that grows with the model, with what is
//! trained, or with the tokens that are computed together.

use bevel_kernels::linalg::Precision;
use bevel_kernels::{BLOCK_TOKENS, Cpu};

use crate::room::capacity;
use crate::{Network, Optimizer, OptimizerConfig, Parameters, Recompute};

/// A process that does nothing yet: its own code, threads, and buffers of the system; measured.
const PROCESS: usize = 44 << 20;

/// A tokenizer's texts, tables and merges, for each token; measured.
const TOKENIZER: usize = 160;

/// Bytes that training takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Frozen weights, as their files have them.
    pub weights: usize,
    /// What is trained, and its gradient.
    pub trained: usize,
    /// The optimizer's state, where it lies in memory.
    pub optimizer: usize,
    /// Parameters of the lowest held-out loss, where they are kept.
    pub best: usize,
    /// What the forward pass keeps for the backward pass.
    pub activations: usize,
    /// Logits, and what else a step needs for a while.
    pub working: usize,
    /// The process itself, the tokenizer and the data.
    pub process: usize,
}

/// What training takes memory by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryUse {
    /// Tokens that are computed together.
    pub tokens: usize,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Its state lies in a file.
    pub paged: bool,
    /// The parameters of the lowest held-out loss are kept.
    pub keep_best: bool,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> usize {
        let Self { weights, trained, optimizer, best, activations, working, process } = *self;
        weights + trained + optimizer + best + activations + working + process
    }
}

impl Network<'_> {
    /// What training takes. Packed weights and activations are counted as the buffers have them, so that the process's peak
    /// is within a tenth of the total.
    pub fn memory(&self, cpu: &Cpu, parameters: &Parameters, by: &MemoryUse) -> Memory {
        let (config, n) = (self.config(), by.tokens);
        let trained = parameters.values.len();
        let layers = self.layers();
        let buffer = |width: usize| 4 * capacity(n * width);
        let (dim, ffn) = (config.dim, config.ffn_dim);
        let (q, kv) = (config.q_dim(), config.kv_dim());

        let kept: Vec<usize> = layers.iter().map(|layer| layer.kept_bytes(config, n)).collect();
        let activations = match self.recompute() {
            Recompute::Nothing => kept.iter().sum(),
            Recompute::Layers(every) => {
                let every = every.max(1);
                let starts = (layers.len() - 1) / every;
                let most = kept.chunks(every).map(|kept| kept.iter().sum::<usize>()).max();
                starts * buffer(dim) + most.unwrap_or(0)
            }
        };

        let is_bf16 = self.precision() == Precision::Bf16 && cpu.isa().has_bf16_products();
        let packed = |values: usize| if is_bf16 { 2 * values } else { 4 * values };
        let rows = self.rows_of_logits().min(n);
        let logits = rows * config.vocab_size;
        // A layer's backward pass: gradients of the MLP's three streams, and its input; of the residual stream; of queries,
        // keys and values, and of what attention put out.
        let streams = 4 * buffer(ffn) + 6 * buffer(dim) + 3 * buffer(q) + 2 * buffer(kv);
        let keys_and_values = 2 * 4 * n.next_multiple_of(BLOCK_TOKENS) * kv;
        let attention = 4 * 3 * n * q;
        // Inputs of products, packed: the panels that lie idle between them have each been the largest once.
        let widest = ffn.max(q).max(dim);
        let panels = 3 * packed(n * widest) + packed(logits) + packed(self.tile_values());
        let head = 4 * capacity(logits) + 4 * 4 * capacity(rows * dim);
        Memory {
            weights: self.frozen_bytes(),
            trained: 2 * 4 * trained,
            optimizer: match by.paged {
                true => 0,
                false => Optimizer::bytes(&by.optimizer, trained),
            },
            best: if by.keep_best { 4 * trained } else { 0 },
            activations,
            working: streams + keys_and_values + attention + panels + head,
            process: PROCESS + TOKENIZER * config.vocab_size,
        }
    }
}
