//! The forward pass of every family: embedding → blocks of attention and MLP on a residual stream →
//! norm → logits, over a batch of sequences whose keys and values lie in a paged cache.

use std::ops::ControlFlow;

use bevel_kernels::{
    AttentionScratch, AttentionSpec, Cpu, KvPool, RopeTable, SequenceSpan, Slot, add_scaled,
    attention, depth_in_tree, rms_norm, rms_norm_in_place, rope, scale,
};

use crate::adapter::{LayerAdapters, ScaledAdapter, StageAdapters};
use crate::cache::slot;
use crate::family::QkNorm;
use crate::head::HeadState;
use crate::linear::{LinearState, project};
use crate::mlp::MlpState;
use crate::tap::{Site, Stage, Tap, untapped};
use crate::weights::{Ffn, LayerWeights};
use crate::{Checkpoint, Error, ModelConfig, Result, Weights};

/// A model that is ready to run: configuration and weights. What changes from step to step lies in
/// [`State`] and in a [`KvPool`].
#[derive(Debug)]
pub struct Model {
    checkpoint: Checkpoint,
    weights: Weights,
    adapters: Vec<ScaledAdapter>,
}

/// Tokens to run through the model in one step: some of one or more sequences.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids, the sequences' parts one after another.
    pub tokens: &'a [u32],
    /// The sequences' parts. Their token counts add up to `tokens.len()`.
    pub parts: &'a [Part<'a>],
    /// Rows of `tokens` after which logits are wanted.
    pub outputs: &'a [usize],
}

/// The newest tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Tokens of this step.
    pub tokens: usize,
    /// Tokens of the sequence, these counted.
    pub context: usize,
    /// The sequence's block table, with room for these tokens: block `i` holds tokens `16i … 16i + 15`.
    pub blocks: &'a [u32],
    /// The tree that the tokens form, of [`bevel_kernels::attention_tree`]; empty where each follows the one
    /// before. Logits of a node are those of the path that leads to it, bit for bit.
    pub tree: &'a [u64],
    /// The sequence's adapters, beside those that the model has for all. They are the model's own, or of one with
    /// the same dimensions.
    pub adapters: &'a [ScaledAdapter],
}

/// The buffers of a forward pass. They grow to the largest batch seen and are then reused.
#[derive(Debug)]
pub struct State {
    /// The residual stream, `[n, dim]`.
    pub(crate) x: Vec<f32>,
    /// A branch of it: `[n, dim]`.
    h: Vec<f32>,
    /// `[n, heads, head_dim]`
    q: Vec<f32>,
    /// `[n, kv_heads, head_dim]`
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[n, heads, head_dim]`
    attended: Vec<f32>,
    head: HeadState,
    slots: Vec<Slot>,
    positions: Vec<u32>,
    /// Empty between steps: room for a step's spans.
    spans: Vec<SequenceSpan<'static>>,
    mlp: MlpState,
    rope: RopeTable,
    local_rope: Option<RopeTable>,
    linear: LinearState,
    attention: AttentionScratch,
}

impl State {
    /// Buffers for a model, for runs over at most `context` tokens: LongRoPE chooses its frequencies
    /// by it.
    pub fn new(config: &ModelConfig, context: usize) -> Self {
        Self {
            x: Vec::new(),
            h: Vec::new(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            attended: Vec::new(),
            head: HeadState::default(),
            slots: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            mlp: MlpState::default(),
            rope: config.rope_table(&config.rope, context),
            local_rope: config.local_rope.as_ref().map(|rope| config.rope_table(rope, context)),
            linear: LinearState::default(),
            attention: AttentionScratch::default(),
        }
    }

    /// Logits of the last step, `[outputs, vocab]`.
    pub fn logits(&self) -> &[f32] {
        self.head.last()
    }

    /// Gathers rows of the residual stream at the front of `h`.
    fn gather(&mut self, rows: &[usize], dim: usize) {
        for (i, &row) in rows.iter().enumerate() {
            self.h[i * dim..][..dim].copy_from_slice(&self.x[row * dim..][..dim]);
        }
    }

    /// Sizes the buffers and lays out where the batch's tokens go.
    fn prepare(&mut self, cpu: &Cpu, config: &ModelConfig, batch: &Batch<'_>) {
        self.place(cpu, config, batch.tokens.len(), batch.parts);
    }

    /// Sizes the buffers of a block for `n` tokens and lays out where they go.
    pub(crate) fn place(&mut self, cpu: &Cpu, config: &ModelConfig, n: usize, parts: &[Part<'_>]) {
        self.x.resize(n * config.dim, 0.0);
        self.h.resize(n * config.dim, 0.0);
        self.q.resize(n * config.q_dim(), 0.0);
        self.k.resize(n * config.kv_dim(), 0.0);
        self.v.resize(n * config.kv_dim(), 0.0);
        self.attended.resize(n * config.q_dim(), 0.0);
        self.positions.clear();
        self.slots.clear();
        for part in parts {
            let base = part.context - part.tokens;
            for token in 0..part.tokens {
                let position = base + depth_in_tree(part.tree, token);
                self.positions.push(u32::try_from(position).expect("positions fit in u32"));
                self.slots.push(slot(part.blocks, base + token));
            }
        }
        assert_eq!(self.positions.len(), n, "the parts of a batch add up to its tokens");
        self.rope.prepare(cpu, &self.positions);
        if let Some(rope) = &mut self.local_rope {
            rope.prepare(cpu, &self.positions);
        }
    }
}

impl Model {
    /// Loads a checkpoint's weights. `progress` is told the bytes read so far.
    ///
    /// # Errors
    /// Those of [`Weights::load`].
    pub fn load(checkpoint: Checkpoint, cpu: &Cpu, progress: &mut dyn FnMut(u64)) -> Result<Self> {
        let weights = Weights::load(&checkpoint, cpu, progress)?;
        Ok(Self::new(checkpoint, weights))
    }

    /// Joins a checkpoint and the weights loaded from it.
    pub fn new(checkpoint: Checkpoint, weights: Weights) -> Self {
        Self { checkpoint, weights, adapters: Vec::new() }
    }

    /// With adapters that all sequences have from now on.
    pub fn with_adapters(self, adapters: Vec<ScaledAdapter>) -> Self {
        Self { adapters, ..self }
    }

    /// With [`Weights::with_exact_products`].
    pub fn with_exact_products(self) -> Self {
        Self { weights: self.weights.with_exact_products(), ..self }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// The files the model came from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Runs a batch, adding its keys and values to `pool`, and returns the logits of the rows asked
    /// for, `[outputs, vocab]`.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::NotFinite`] where a logit is
    /// infinite or no number.
    pub fn forward<'s>(
        &self,
        cpu: &Cpu,
        batch: &Batch<'_>,
        pool: &mut KvPool,
        state: &'s mut State,
    ) -> Result<&'s [f32]> {
        let config = self.config();
        state.prepare(cpu, config, batch);
        self.weights.embed(&self.checkpoint, batch.tokens, &mut state.x)?;
        if config.embedding_scale != 1.0 {
            scale(cpu, &mut state.x, config.embedding_scale);
        }
        let spans = spans(batch.parts, std::mem::take(&mut state.spans));
        let is_adapted = batch.parts.iter().any(|part| !part.adapters.is_empty());
        let adapted = if is_adapted { batch.parts } else { &[] };
        for (i, layer) in self.weights.layers.iter().enumerate() {
            let place = LayerPlace { cached: i, windowed: config.windowed[i] };
            let adapters = LayerAdapters { common: &self.adapters, parts: adapted, layer: i };
            // Nothing listens, so nothing breaks off.
            let _ =
                layer.attention(cpu, config, place, &spans, pool, state, adapters, &mut untapped);
            let _ = layer.feed_forward(cpu, config, state, adapters, &mut untapped);
        }
        state.spans = emptied(spans);
        self.head(cpu, batch, state)?;
        Ok(state.head.last())
    }

    /// What the model made of some rows of the last batch, after the output norm, `[rows, dim]`: what logits are
    /// computed from, and what embeddings are pooled from.
    ///
    /// # Panics
    /// Where the last batch had no such row.
    pub fn hidden<'s>(&self, cpu: &Cpu, rows: &[usize], state: &'s mut State) -> &'s [f32] {
        let config = self.config();
        state.gather(rows, config.dim);
        let State { h, head, .. } = state;
        self.weights.head.normed(cpu, config, &h[..rows.len() * config.dim], head)
    }

    /// Logits of some rows of the last batch, `[rows, vocab]`, beside those that [`Model::forward`] computed.
    ///
    /// # Panics
    /// Where the last batch had no such row.
    pub fn logits<'h>(
        &self,
        cpu: &Cpu,
        rows: &[usize],
        state: &mut State,
        head: &'h mut HeadState,
    ) -> &'h [f32] {
        let config = self.config();
        state.gather(rows, config.dim);
        self.weights.head.logits(cpu, config, &state.h[..rows.len() * config.dim], head)
    }

    /// Logits of the wanted rows.
    fn head(&self, cpu: &Cpu, batch: &Batch<'_>, state: &mut State) -> Result<()> {
        let config = self.config();
        let (dim, rows) = (config.dim, batch.outputs.len());
        state.gather(batch.outputs, dim);
        let head = &self.weights.head;
        let logits = head.logits(cpu, config, &state.h[..rows * dim], &mut state.head);
        for (logits, &row) in logits.chunks_exact(config.vocab_size).zip(batch.outputs) {
            // A sum is finite only where all its terms are; a chance overflow is looked at closely.
            if !logits.iter().sum::<f32>().is_finite() && logits.iter().any(|l| !l.is_finite()) {
                return Err(Error::NotFinite { position: state.positions[row] as usize });
            }
        }
        Ok(())
    }
}

/// What depends on which layer of a model it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerPlace {
    /// The cache's layer that keys and values go to.
    pub(crate) cached: usize,
    /// Attention sees a window only.
    pub(crate) windowed: bool,
}

impl LayerWeights {
    /// x += o(attention(rope(q(norm x)), rope(k(norm x)), v(norm x)))
    pub(crate) fn attention(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        place: LayerPlace,
        spans: &[SequenceSpan<'_>],
        pool: &mut KvPool,
        state: &mut State,
        adapters: LayerAdapters<'_>,
        tap: &mut Tap<'_>,
    ) -> ControlFlow<()> {
        let n = state.slots.len();
        branch_norm(cpu, config, &self.attn_norm, &state.x, &mut state.h);
        tap(Site { stage: Stage::Qkv, expert: None }, &state.h, n)?;
        let [q, k, v] = [&mut state.q, &mut state.k, &mut state.v];
        let products = [(&self.q, q), (&self.k, k), (&self.v, v)];
        project(cpu, &state.h, n, products, adapters.at(Stage::Qkv), &mut state.linear);
        for (x, weight, heads) in [
            (&mut state.q, &self.q_norm, config.heads),
            (&mut state.k, &self.k_norm, config.kv_heads),
        ] {
            let Some(weight) = weight else { continue };
            match config.family.qk_norm {
                QkNorm::Full => {
                    rms_norm_in_place(cpu, x, weight, config.norm_eps, n, heads * config.head_dim);
                }
                _ => rms_norm_in_place(cpu, x, weight, config.norm_eps, n * heads, config.head_dim),
            }
        }
        let table = match &state.local_rope {
            Some(local) if place.windowed => local,
            _ => &state.rope,
        };
        rope(cpu, &mut state.q, config.heads, config.head_dim, table);
        rope(cpu, &mut state.k, config.kv_heads, config.head_dim, table);
        pool.write(cpu, place.cached, &state.k, &state.v, &state.slots);

        let spec = AttentionSpec {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            window: config.window.filter(|_| place.windowed),
        };
        attention(
            cpu,
            &mut state.attended,
            &state.q,
            pool,
            place.cached,
            spans,
            &spec,
            &mut state.attention,
        );
        tap(Site { stage: Stage::AttentionOutput, expert: None }, &state.attended, n)?;
        let attended = std::mem::take(&mut state.attended);
        self.finish_attention(cpu, config, &attended, state, adapters);
        state.attended = attended;
        ControlFlow::Continue(())
    }

    /// x += o(attended)
    pub(crate) fn finish_attention(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        attended: &[f32],
        state: &mut State,
        adapters: LayerAdapters<'_>,
    ) {
        let n = state.slots.len();
        let (product, adapters) = ([(&self.o, &mut state.h)], adapters.at(Stage::AttentionOutput));
        project(cpu, attended, n, product, adapters, &mut state.linear);
        join(cpu, config, &self.post_attn_norm, &mut state.h, &mut state.x);
    }

    /// x += mlp(norm x)
    pub(crate) fn feed_forward(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        state: &mut State,
        adapters: LayerAdapters<'_>,
        tap: &mut Tap<'_>,
    ) -> ControlFlow<()> {
        let n = state.slots.len();
        branch_norm(cpu, config, &self.ffn_norm, &state.x, &mut state.h);
        let (h, mlp) = (&mut state.h, &mut state.mlp);
        self.ffn.forward(cpu, config, h, n, mlp, &mut state.linear, adapters, tap)?;
        join(cpu, config, &self.post_ffn_norm, &mut state.h, &mut state.x);
        ControlFlow::Continue(())
    }

    /// x += down(hidden)
    ///
    /// # Panics
    /// In a mixture.
    pub(crate) fn finish_feed_forward(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        hidden: &[f32],
        state: &mut State,
    ) {
        let Ffn::Dense(mlp) = &self.ffn else { panic!("experts have inputs of their own") };
        let n = state.slots.len();
        let product = [(&mlp.down, &mut state.h)];
        project(cpu, hidden, n, product, StageAdapters::NONE, &mut state.linear);
        join(cpu, config, &self.post_ffn_norm, &mut state.h, &mut state.x);
    }
}

/// The batch as the attention kernel sees it, in a vector that is empty so far.
pub(crate) fn spans<'a>(
    parts: &[Part<'a>],
    mut spans: Vec<SequenceSpan<'a>>,
) -> Vec<SequenceSpan<'a>> {
    let mut first_query = 0;
    let span = |part: &Part<'a>| {
        first_query += part.tokens;
        SequenceSpan {
            first_query: first_query - part.tokens,
            queries: part.tokens,
            context: part.context,
            blocks: part.blocks,
            tree: part.tree,
        }
    };
    spans.extend(parts.iter().map(span));
    spans
}

/// The vector without its spans, for others: collecting in place keeps what it has allocated.
fn emptied(mut spans: Vec<SequenceSpan<'_>>) -> Vec<SequenceSpan<'static>> {
    spans.clear();
    spans.into_iter().map(|_| unreachable!("there are none")).collect()
}

/// The input of a branch: normalised where the family does that, else a copy.
fn branch_norm(cpu: &Cpu, config: &ModelConfig, norm: &Option<Vec<f32>>, x: &[f32], h: &mut [f32]) {
    match norm {
        Some(weight) => {
            rms_norm(cpu, h, x, weight, config.norm_eps, x.len() / config.dim, config.dim);
        }
        None => h.copy_from_slice(x),
    }
}

/// A branch joins the residual stream, normalised and scaled where the family does that.
fn join(cpu: &Cpu, config: &ModelConfig, norm: &Option<Vec<f32>>, h: &mut [f32], x: &mut [f32]) {
    if let Some(weight) = norm {
        rms_norm_in_place(cpu, h, weight, config.norm_eps, h.len() / config.dim, config.dim);
    }
    add_scaled(cpu, x, h, config.residual_scale);
}
