//! A decoder block that is trained: its forward pass, and its backward pass.

use std::ops::Range;

use bevel_kernels::linalg::Update;
use bevel_kernels::{
    Attended, AttentionGradients, AttentionSpec, BLOCK_TOKENS, KvPool, KvShape, KvType, RopeTable,
    SequenceSpan, Slot, add, attention, attention_backward, rms_norm, rope, rope_backward, scale,
};
use bevel_model::{Experts as Settings, ModelConfig, QkNorm, Result};

use crate::Parameters;
use crate::experts::{Experts, SavedExperts};
use crate::frozen::Frozen;
use crate::linear::{Kept, Linear};
use crate::lora::{Adapter, Lora, Target};
use crate::mlp::{Mlp, SavedMlp};
use crate::room::{Input, Room, Step, capacity};
use crate::weight::{Loader, Matrix, Vector};

/// One decoder block. A norm is `None` where the family has none there.
#[derive(Debug)]
pub(crate) struct Layer<'c> {
    attn_norm: Option<Vector>,
    q: Linear<'c>,
    k: Linear<'c>,
    v: Linear<'c>,
    o: Linear<'c>,
    q_norm: Option<Vector>,
    k_norm: Option<Vector>,
    post_attn_norm: Option<Vector>,
    ffn_norm: Option<Vector>,
    ffn: Ffn<'c>,
    post_ffn_norm: Option<Vector>,
    windowed: bool,
}

/// The second branch of a block.
#[derive(Debug)]
enum Ffn<'c> {
    Dense(Box<Mlp<'c>>),
    Experts(Box<Experts<'c>>),
}

/// What its backward pass needs.
#[derive(Debug)]
enum SavedFfn {
    Dense(SavedMlp),
    Experts(SavedExperts),
}

impl Default for SavedFfn {
    fn default() -> Self {
        Self::Dense(SavedMlp::default())
    }
}

/// What the backward pass needs of the forward pass. What follows from it at little cost, as the inputs of linear layers
/// that come out of a norm, is computed again.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    /// The block's input.
    x: Vec<f32>,
    /// Queries and keys before their norms, where they have some.
    raw_q: Option<Vec<f32>>,
    raw_k: Option<Vec<f32>>,
    /// As attention sees them.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// Output of the attention branch before its norm, where it has one.
    attn_out: Option<Vec<f32>>,
    /// The residual stream after attention.
    middle: Vec<f32>,
    ffn: SavedFfn,
    /// Output of the other branch before its norm, where it has one.
    ffn_out: Option<Vec<f32>>,
    /// Of attention's linear layers, in the order of [`Target::ALL`].
    linear: [Kept; 4],
}

/// What is wanted of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The output.
    Output,
    /// The output, and what the backward pass needs.
    Both,
    /// What the backward pass needs; the output may be anything.
    Saved,
}

impl Saved {
    /// Gives the buffers back.
    fn give(self, room: &mut Room) {
        let Self { x, q, k, v, attended, middle, .. } = self;
        room.give([x, q, k, v, attended, middle]);
        match self.ffn {
            SavedFfn::Dense(saved) => saved.give(room),
            SavedFfn::Experts(saved) => saved.give(room),
        }
        room.give([self.raw_q, self.raw_k, self.attn_out, self.ffn_out].into_iter().flatten());
        self.linear.into_iter().for_each(|kept| kept.give(room));
    }
}

impl<'c> Layer<'c> {
    pub(crate) fn load(loader: &mut Loader<'c, '_>, layer: usize) -> Result<Self> {
        let model = loader.checkpoint.config();
        let family = model.family;
        let (q_dim, kv_dim, ffn_dim) = (model.q_dim(), model.kv_dim(), model.ffn_dim);
        let fused = family.layer.iter().any(|tensor| tensor.gguf == "attn_qkv");
        let mut linear = |target: Target| {
            let (stem, rows) = match (fused, target) {
                (true, Target::Query) => ("attn_qkv", Some(0..q_dim)),
                (true, Target::Key) => ("attn_qkv", Some(q_dim..q_dim + kv_dim)),
                (true, Target::Value) => ("attn_qkv", Some(q_dim + kv_dim..q_dim + 2 * kv_dim)),
                (true, Target::Gate) => ("ffn_up", Some(0..ffn_dim)),
                (true, Target::Up) => ("ffn_up", Some(ffn_dim..2 * ffn_dim)),
                _ => (target.name(), None),
            };
            loader.linear(layer, stem, target, rows)
        };
        let (q, k, v) = (linear(Target::Query)?, linear(Target::Key)?, linear(Target::Value)?);
        let o = linear(Target::Output)?;
        let ffn = match model.experts {
            None => {
                let (gate, up) = (linear(Target::Gate)?, linear(Target::Up)?);
                Ffn::Dense(Box::new(Mlp { gate, up, down: linear(Target::Down)? }))
            }
            Some(settings) => Ffn::Experts(Box::new(loader.experts(layer, settings)?)),
        };
        let mut norm = |stem: &str| -> Result<Option<Vector>> {
            let exists = family.layer.iter().any(|tensor| tensor.gguf == stem);
            let name = format!("blk.{layer}.{stem}.weight");
            exists.then(|| loader.vector(&name, None)).transpose()
        };
        Ok(Self {
            attn_norm: norm("attn_norm")?,
            q,
            k,
            v,
            o,
            q_norm: norm("attn_q_norm")?,
            k_norm: norm("attn_k_norm")?,
            post_attn_norm: norm("post_attention_norm")?,
            ffn_norm: norm("ffn_norm")?,
            ffn,
            post_ffn_norm: norm("post_ffw_norm")?,
            windowed: model.windowed[layer],
        })
    }

    /// Its linear layers, in the order of [`Target::ALL`]; without those of experts.
    fn linears(&self) -> Vec<&Linear<'c>> {
        let attention = [&self.q, &self.k, &self.v, &self.o].into_iter();
        match &self.ffn {
            Ffn::Dense(mlp) => attention.chain([&mlp.gate, &mlp.up, &mlp.down]).collect(),
            Ffn::Experts(_) => attention.collect(),
        }
    }

    /// Bytes of weights that are not trained.
    pub(crate) fn frozen_bytes(&self) -> usize {
        let linear: usize = self.linears().iter().map(|linear| linear.weight.frozen_bytes()).sum();
        let experts = match &self.ffn {
            Ffn::Dense(_) => 0,
            Ffn::Experts(mixture) => {
                let each = mixture.experts.iter().flat_map(|mlp| [&mlp.gate, &mlp.up, &mlp.down]);
                let each: usize = each.map(|linear| linear.weight.frozen_bytes()).sum();
                each + mixture.router.frozen_bytes()
            }
        };
        linear + experts
    }

    /// Bytes of [`Saved`] for `n` tokens.
    pub(crate) fn kept_bytes(&self, config: &ModelConfig, n: usize) -> usize {
        let (dim, q, kv) = (config.dim, config.q_dim(), config.kv_dim());
        let ffn = config.ffn_dim;
        let mut widths = vec![dim, q, kv, kv, q, dim];
        match config.experts {
            None => widths.extend([ffn, ffn]),
            Some(experts) => {
                widths.push(experts.count);
                widths.extend([ffn, ffn, dim].map(|width| experts.used * width));
            }
        }
        widths.extend(self.q_norm.is_some().then_some(q));
        widths.extend(self.k_norm.is_some().then_some(kv));
        widths.extend(self.post_attn_norm.is_some().then_some(dim));
        widths.extend(self.post_ffn_norm.is_some().then_some(dim));
        for linear in self.linears() {
            if let Some(lora) = &linear.lora {
                widths.push(lora.rank());
                widths.extend(lora.scales().then(|| linear.weight.rows()));
            }
        }
        widths.into_iter().map(|width| 4 * capacity(n * width)).sum()
    }

    /// The adapters of its linear layers.
    pub(crate) fn adapters(&self, layer: usize, parameters: &Parameters) -> Vec<Adapter> {
        let all = Target::ALL.into_iter().zip(self.linears());
        all.filter_map(|(target, linear)| {
            let name = format!("blk.{layer}.{}", target.name());
            linear.lora.as_ref().map(|lora| lora.adapter(name, parameters))
        })
        .collect()
    }

    /// The block's output in the place of its input, `[n, dim]`, and what its backward pass needs, where they are wanted.
    ///
    /// # Errors
    /// Where keys and values do not fit into memory.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &mut Vec<f32>,
        wanted: Wanted,
        room: &mut Room,
    ) -> Result<Option<Saved>, bevel_kernels::Error> {
        let (cpu, config) = (step.cpu, step.config);
        let mut attn_in = normed(step, parameters, &self.attn_norm, x, room);
        self.q.round_inputs(step, &mut attn_in);
        let packed = step.packed(&attn_in, step.n, room);
        let input = Input { values: &attn_in, packed: &packed };
        let (mut q, kept_q) = self.q.forward(step, parameters, input, room);
        let (mut k, kept_k) = self.k.forward(step, parameters, input, room);
        let (v, kept_v) = self.v.forward(step, parameters, input, room);
        room.give_panels(packed);
        room.give([attn_in]);
        let (mut raw_q, mut raw_k) = (None, None);
        for (x, raw, weight, heads) in [
            (&mut q, &mut raw_q, &self.q_norm, config.heads),
            (&mut k, &mut raw_k, &self.k_norm, config.kv_heads),
        ] {
            let Some(weight) = weight else { continue };
            let (rows, d) = qk_shape(step, heads);
            let mut normed = room.take(x.len());
            rms_norm(cpu, &mut normed, x, weight.get(parameters), config.norm_eps, rows, d);
            *raw = Some(std::mem::replace(x, normed));
        }
        rope(cpu, &mut q, config.heads, config.head_dim, self.rope(step));
        rope(cpu, &mut k, config.kv_heads, config.head_dim, self.rope(step));
        let attended = self.attend(step, &q, &k, &v, room)?;
        let rounded = self.o.rounded_inputs(step, &attended, room);
        let values = rounded.as_deref().unwrap_or(&attended);
        let packed = step.packed(values, step.n, room);
        let (attn_out, kept_o) =
            self.o.forward(step, parameters, Input { values, packed: &packed }, room);
        room.give_panels(packed);
        room.give(rounded);
        let (middle, attn_out) = joined(step, parameters, &self.post_attn_norm, attn_out, x, room);
        let mut ffn_in = normed(step, parameters, &self.ffn_norm, &middle, room);
        // Where the branch's output has no norm, no gradient depends on it.
        let needed = wanted != Wanted::Saved || self.post_ffn_norm.is_some();
        let (branch, ffn) = match &self.ffn {
            Ffn::Dense(mlp) => {
                mlp.round_inputs(step, &mut ffn_in);
                let (branch, saved) = mlp.forward(step, parameters, &ffn_in, needed, room);
                (branch, SavedFfn::Dense(saved))
            }
            Ffn::Experts(experts) => {
                let (branch, saved) = experts.forward(step, parameters, &ffn_in, room);
                (Some(branch), SavedFfn::Experts(saved))
            }
        };
        room.give([ffn_in]);
        let (mut out, mut ffn_out) = (Vec::new(), None);
        if let Some(branch) = branch {
            (out, ffn_out) = joined(step, parameters, &self.post_ffn_norm, branch, &middle, room);
        }
        let saved = Saved {
            x: std::mem::replace(x, out),
            raw_q,
            raw_k,
            q,
            k,
            v,
            attended,
            attn_out,
            middle,
            ffn,
            ffn_out,
            linear: [kept_q, kept_k, kept_v, kept_o],
        };
        if wanted == Wanted::Output {
            saved.give(room);
            return Ok(None);
        }
        Ok(Some(saved))
    }

    fn spec(&self, config: &ModelConfig) -> AttentionSpec {
        AttentionSpec {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            window: config.window.filter(|_| self.windowed),
        }
    }

    fn rope<'s>(&self, step: &Step<'s>) -> &'s RopeTable {
        step.local_rope.filter(|_| self.windowed).unwrap_or(step.rope)
    }

    /// Attention as inference computes it, over keys and values in single precision.
    fn attend(
        &self,
        step: &Step<'_>,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        room: &mut Room,
    ) -> Result<Vec<f32>, bevel_kernels::Error> {
        let blocks_of = |rows: &Range<usize>| rows.len().div_ceil(BLOCK_TOKENS);
        let blocks: usize = step.sequences.iter().map(blocks_of).sum();
        if room.kv.as_ref().is_none_or(|kv| kv.blocks() < blocks) {
            let shape = KvShape { layers: 1, ..step.config.kv_shape(KvType::F32) };
            room.kv = Some(KvPool::new(shape, blocks)?);
        }
        let mut attended = room.take(q.len());
        let kv = room.kv.as_mut().expect("there is one now");
        let (mut tables, mut slots, mut first) = (Vec::new(), Vec::with_capacity(step.n), 0u32);
        for rows in step.sequences {
            let table: Vec<u32> = (first..).take(blocks_of(rows)).collect();
            slots.extend((0..rows.len()).map(|i| Slot {
                block: table[i / BLOCK_TOKENS],
                offset: (i % BLOCK_TOKENS) as u32,
            }));
            first += table.len() as u32;
            tables.push(table);
        }
        let spans: Vec<SequenceSpan<'_>> = step
            .sequences
            .iter()
            .zip(&tables)
            .map(|(rows, blocks)| SequenceSpan {
                first_query: rows.start,
                queries: rows.len(),
                context: rows.len(),
                blocks,
                tree: &[],
            })
            .collect();
        kv.write(step.cpu, 0, k, v, &slots);
        let spec = self.spec(step.config);
        attention(step.cpu, &mut attended, q, kv, 0, &spans, &spec, &mut room.attention);
        Ok(attended)
    }

    /// The gradient of the block's input in the place of that of its output, `d_x`; gradients of the parameters are
    /// added to theirs.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        saved: Saved,
        room: &mut Room,
    ) {
        let (cpu, config) = (step.cpu, step.config);
        let [kept_q, kept_k, kept_v, kept_o] = &saved.linear;
        let (set, add) = (Update::Set, Update::Add);

        let d_out =
            joined_backward(step, parameters, &self.post_ffn_norm, d_x, &saved.ffn_out, room);
        let d_ffn = d_out.as_deref().unwrap_or(d_x);
        let mut ffn_in = normed(step, parameters, &self.ffn_norm, &saved.middle, room);
        let mut d_in = room.take(d_x.len());
        match (&self.ffn, &saved.ffn) {
            (Ffn::Dense(mlp), SavedFfn::Dense(saved)) => {
                mlp.round_inputs(step, &mut ffn_in);
                mlp.backward(step, parameters, &mut d_in, d_ffn, &ffn_in, saved, room);
            }
            (Ffn::Experts(experts), SavedFfn::Experts(saved)) => {
                experts.backward(step, parameters, &mut d_in, d_ffn, &ffn_in, saved, room);
            }
            _ => unreachable!("a layer's own forward pass saved it"),
        }
        normed_backward(step, parameters, &self.ffn_norm, d_x, &d_in, &saved.middle);
        room.give([ffn_in]);
        room.give(d_out);

        let d_out =
            joined_backward(step, parameters, &self.post_attn_norm, d_x, &saved.attn_out, room);
        let mut d_attended = room.take(saved.attended.len());
        let rounded = self.o.rounded_inputs(step, &saved.attended, room);
        self.o.backward(
            step,
            parameters,
            set,
            &mut d_attended,
            d_out.as_deref().unwrap_or(d_x),
            rounded.as_deref().unwrap_or(&saved.attended),
            kept_o,
            room,
        );
        room.give(rounded);
        let mut d_q = room.take(saved.q.len());
        let (mut d_k, mut d_v) = (room.take(saved.k.len()), room.take(saved.v.len()));
        let gradients = AttentionGradients { q: &mut d_q, k: &mut d_k, v: &mut d_v };
        let Saved { q, k, v, attended: out, .. } = &saved;
        let attended = Attended { sequences: step.sequences, q, k, v, out };
        let (spec, part) = (self.spec(config), &mut room.attention_backward);
        attention_backward(cpu, gradients, &d_attended, &attended, &spec, step.precision, part);
        for (d, raw, weight, heads) in [
            (&mut d_q, &saved.raw_q, &self.q_norm, config.heads),
            (&mut d_k, &saved.raw_k, &self.k_norm, config.kv_heads),
        ] {
            rope_backward(cpu, d, heads, config.head_dim, self.rope(step));
            if let (Some(raw), Some(weight)) = (raw, weight) {
                let mut d_raw = room.zeros(d.len());
                let (rows, _) = qk_shape(step, heads);
                weight.norm_backward(step, parameters, &mut d_raw, d, raw, rows);
                room.give([std::mem::replace(d, d_raw)]);
            }
        }
        let mut attn_in = normed(step, parameters, &self.attn_norm, &saved.x, room);
        self.q.round_inputs(step, &mut attn_in);
        self.q.backward(step, parameters, set, &mut d_in, &d_q, &attn_in, kept_q, room);
        self.k.backward(step, parameters, add, &mut d_in, &d_k, &attn_in, kept_k, room);
        self.v.backward(step, parameters, add, &mut d_in, &d_v, &attn_in, kept_v, room);
        normed_backward(step, parameters, &self.attn_norm, d_x, &d_in, &saved.x);
        room.give([d_attended, d_q, d_k, d_v, attn_in, d_in]);
        room.give(d_out);
        saved.give(room);
    }
}

impl<'c> Loader<'c, '_> {
    /// A linear layer of a block: some rows of a tensor, with an adapter where one is wanted.
    fn linear(
        &mut self,
        layer: usize,
        stem: &str,
        target: Target,
        rows: Option<Range<usize>>,
    ) -> Result<Linear<'c>> {
        let name = |kind: &str| format!("blk.{layer}.{stem}.{kind}");
        let weight = self.matrix(&name("weight"), rows.clone())?;
        let has_bias = self.checkpoint.tensors().contains_key(&name("bias"));
        let bias = has_bias.then(|| self.vector(&name("bias"), rows.clone())).transpose()?;
        let adapter = format!("blk.{layer}.{}", target.name());
        let config = self.trainable.lora.as_ref().filter(|lora| lora.adapts(&adapter));
        // A layer that is trained itself needs no adapter.
        let config = config.filter(|_| !self.trainable.trains(&name("weight")));
        let original = self.trainable.original.as_ref().filter(|_| config.is_some());
        let original = original
            .map(|original| Frozen::load(original, &name("weight"), rows).map(Matrix::Frozen))
            .transpose()?;
        let lora = config.map(|config| {
            let (random, parameters) = (&mut self.random, &mut *self.parameters);
            let original = original.as_ref();
            Lora::new(self.cpu, config, &adapter, &weight, original, random, parameters)
        });
        if let Some(original) = &self.trainable.original {
            // It is not looked at again.
            original.release(&name("weight"));
        }
        Ok(Linear { weight, bias, lora })
    }
}

impl<'c> Loader<'c, '_> {
    /// The mixture of a block. Experts have no adapters.
    fn experts(&mut self, layer: usize, settings: Settings) -> Result<Experts<'c>> {
        let name = |stem: &str| format!("blk.{layer}.{stem}.weight");
        let router = self.matrix(&name("ffn_gate_inp"), None)?;
        let gates = self.stack(&name("ffn_gate_exps"))?;
        let ups = self.stack(&name("ffn_up_exps"))?;
        let downs = self.stack(&name("ffn_down_exps"))?;
        let plain = |weight| Linear { weight, bias: None, lora: None };
        let mlp = |((gate, up), down)| Mlp { gate: plain(gate), up: plain(up), down: plain(down) };
        let experts = gates.into_iter().zip(ups).zip(downs).map(mlp).collect();
        Ok(Experts { settings, router, experts })
    }
}

/// x + branch, the branch normalised and scaled where the family does that; and the branch as it was where its norm needs
/// it.
fn joined(
    step: &Step<'_>,
    parameters: &Parameters,
    norm: &Option<Vector>,
    branch: Vec<f32>,
    x: &[f32],
    room: &mut Room,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let (mut out, branch) = match norm {
        Some(_) => (normed(step, parameters, norm, &branch, room), Some(branch)),
        None => (branch, None),
    };
    if step.config.residual_scale != 1.0 {
        scale(step.cpu, &mut out, step.config.residual_scale);
    }
    add(step.cpu, &mut out, x);
    (out, branch)
}

/// Rows and width of the norm of queries or keys.
fn qk_shape(step: &Step<'_>, heads: usize) -> (usize, usize) {
    match step.config.family.qk_norm {
        QkNorm::Full => (step.n, heads * step.config.head_dim),
        _ => (step.n * heads, step.config.head_dim),
    }
}

/// A normalised copy, or a copy where there is no norm.
pub(crate) fn normed(
    step: &Step<'_>,
    parameters: &Parameters,
    norm: &Option<Vector>,
    x: &[f32],
    room: &mut Room,
) -> Vec<f32> {
    let Some(weight) = norm else { return room.copy(x) };
    let mut out = room.take(x.len());
    let (weight, eps) = (weight.get(parameters), step.config.norm_eps);
    rms_norm(step.cpu, &mut out, x, weight, eps, x.len() / weight.len(), weight.len());
    out
}

/// Adds the gradient of [`normed`]'s input `x` to `d_x`, given that of its output.
pub(crate) fn normed_backward(
    step: &Step<'_>,
    parameters: &mut Parameters,
    norm: &Option<Vector>,
    d_x: &mut [f32],
    d_out: &[f32],
    x: &[f32],
) {
    match norm {
        Some(norm) => {
            let rows = x.len() / step.config.dim;
            norm.norm_backward(step, parameters, d_x, d_out, x, rows);
        }
        None => bevel_kernels::add(step.cpu, d_x, d_out),
    }
}

/// The gradient of a branch's output, before its norm, given that of the stream that it joined; `None` where it is the same.
fn joined_backward(
    step: &Step<'_>,
    parameters: &mut Parameters,
    norm: &Option<Vector>,
    d_x: &[f32],
    branch: &Option<Vec<f32>>,
    room: &mut Room,
) -> Option<Vec<f32>> {
    let factor = step.config.residual_scale;
    if factor == 1.0 && branch.is_none() {
        return None;
    }
    let mut d_joined = room.copy(d_x);
    if factor != 1.0 {
        scale(step.cpu, &mut d_joined, factor);
    }
    let Some(branch) = branch else { return Some(d_joined) };
    let mut d_branch = room.zeros(branch.len());
    normed_backward(step, parameters, norm, &mut d_branch, &d_joined, branch);
    room.give([d_joined]);
    Some(d_branch)
}
