//! A decoder block that is trained: its forward pass, and its backward pass from nothing but its input.

use std::ops::Range;

use bevel_kernels::{
    Attended, AttentionGradients, AttentionScratch, AttentionSpec, BLOCK_TOKENS, Cpu, KvPool,
    KvShape, KvType, RopeTable, SequenceSpan, Slot, add_bias, add_scaled, attention,
    attention_backward, gelu_tanh_mul, gelu_tanh_mul_backward, rms_norm, rms_norm_backward, rope,
    rope_backward, scale, silu_mul, silu_mul_backward,
};
use bevel_model::{Activation, Checkpoint, ModelConfig, QkNorm, Result};
use rand_pcg::Pcg64Mcg;

use crate::lora::{Lora, LoraConfig, Target};
use crate::{Frozen, Parameters};

/// A linear layer: W · x + b + s B A x.
#[derive(Debug)]
struct Projection<'c> {
    weight: Frozen<'c>,
    /// `[out]`
    bias: Option<Vec<f32>>,
    lora: Option<Lora>,
}

/// One decoder block. A norm is `None` where the family has none there.
#[derive(Debug)]
pub(crate) struct Layer<'c> {
    attn_norm: Option<Vec<f32>>,
    q: Projection<'c>,
    k: Projection<'c>,
    v: Projection<'c>,
    o: Projection<'c>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    post_attn_norm: Option<Vec<f32>>,
    ffn_norm: Option<Vec<f32>>,
    gate: Projection<'c>,
    up: Projection<'c>,
    down: Projection<'c>,
    post_ffn_norm: Option<Vec<f32>>,
    windowed: bool,
}

/// What a step runs over, the same for all layers.
pub(crate) struct Step<'a> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) config: &'a ModelConfig,
    /// Rows of each sequence.
    pub(crate) sequences: &'a [Range<usize>],
    pub(crate) rope: &'a RopeTable,
    pub(crate) local_rope: Option<&'a RopeTable>,
    pub(crate) n: usize,
}

/// Buffers that steps share.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// Unpacked weights.
    pub(crate) tile: Vec<f32>,
    kv: Option<KvPool>,
    attention: AttentionScratch,
}

/// What a block computes on its way; the backward pass needs all of it.
struct Activations {
    /// Input of q, k and v.
    attn_in: Vec<f32>,
    /// Before their norms, where they have some.
    raw_q: Option<Vec<f32>>,
    raw_k: Option<Vec<f32>>,
    /// As attention sees them.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// Output of the attention branch before its norm, where it has one.
    attn_out: Vec<f32>,
    /// The residual stream after attention.
    middle: Vec<f32>,
    /// Input of gate and up.
    ffn_in: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Input of down.
    gated: Vec<f32>,
    /// Output of the branch before its norm, where that is wanted.
    ffn_out: Vec<f32>,
}

impl<'c> Projection<'c> {
    fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &[f32],
        room: &mut Room,
    ) -> Vec<f32> {
        let (cpu, n, rows) = (step.cpu, step.n, self.weight.rows());
        let mut y = vec![0.0; n * rows];
        self.weight.forward(cpu, &mut y, x, n, &mut room.tile);
        if let Some(bias) = &self.bias {
            add_bias(cpu, &mut y, bias, n, rows);
        }
        if let Some(lora) = &self.lora {
            lora.forward(cpu, parameters, &mut y, x, n);
        }
        y
    }

    /// Adds to the gradient of the input `x`, given that of the output.
    fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        d_y: &[f32],
        x: &[f32],
        room: &mut Room,
    ) {
        self.weight.backward(step.cpu, d_x, d_y, step.n, &mut room.tile);
        if let Some(lora) = &self.lora {
            lora.backward(step.cpu, parameters, d_x, d_y, x, step.n);
        }
    }
}

impl<'c> Layer<'c> {
    pub(crate) fn load(
        checkpoint: &'c Checkpoint,
        layer: usize,
        config: &LoraConfig,
        random: &mut Pcg64Mcg,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let model = checkpoint.config();
        let family = model.family;
        let name = |stem: &str| format!("blk.{layer}.{stem}");
        let norm = |stem: &str| -> Result<Option<Vec<f32>>> {
            let exists = family.layer.iter().any(|t| t.gguf == stem);
            exists.then(|| checkpoint.read_f32(&name(&format!("{stem}.weight")))).transpose()
        };
        let mut projection =
            |target: Target, stem: &str, rows: Option<Range<usize>>| -> Result<Projection<'c>> {
                let weight =
                    Frozen::load(checkpoint, &name(&format!("{stem}.weight")), rows.clone())?;
                let bias_name = name(&format!("{stem}.bias"));
                let bias = match checkpoint.tensors().contains_key(&bias_name) {
                    false => None,
                    true => {
                        let bias = checkpoint.read_f32(&bias_name)?;
                        Some(rows.map_or(bias.clone(), |rows| bias[rows].to_vec()))
                    }
                };
                let shape = (weight.rows(), weight.cols());
                let lora = config
                    .targets
                    .contains(&target)
                    .then(|| Lora::new(config, &name(target.name()), shape, random, parameters));
                Ok(Projection { weight, bias, lora })
            };
        let (q_dim, kv_dim, ffn_dim) = (model.q_dim(), model.kv_dim(), model.ffn_dim);
        let fused = family.layer.iter().any(|tensor| tensor.gguf == "attn_qkv");
        let (q, k, v, gate, up);
        if fused {
            q = projection(Target::Query, "attn_qkv", Some(0..q_dim))?;
            k = projection(Target::Key, "attn_qkv", Some(q_dim..q_dim + kv_dim))?;
            v = projection(Target::Value, "attn_qkv", Some(q_dim + kv_dim..q_dim + 2 * kv_dim))?;
            gate = projection(Target::Gate, "ffn_up", Some(0..ffn_dim))?;
            up = projection(Target::Up, "ffn_up", Some(ffn_dim..2 * ffn_dim))?;
        } else {
            q = projection(Target::Query, "attn_q", None)?;
            k = projection(Target::Key, "attn_k", None)?;
            v = projection(Target::Value, "attn_v", None)?;
            gate = projection(Target::Gate, "ffn_gate", None)?;
            up = projection(Target::Up, "ffn_up", None)?;
        }
        let o = projection(Target::Output, "attn_output", None)?;
        let down = projection(Target::Down, "ffn_down", None)?;
        let (q_norm, k_norm) = match family.qk_norm {
            QkNorm::None => (None, None),
            QkNorm::PerHead | QkNorm::Full => (norm("attn_q_norm")?, norm("attn_k_norm")?),
        };
        Ok(Self {
            attn_norm: norm("attn_norm")?,
            q,
            k,
            v,
            o,
            q_norm,
            k_norm,
            post_attn_norm: norm("post_attention_norm")?,
            ffn_norm: norm("ffn_norm")?,
            gate,
            up,
            down,
            post_ffn_norm: norm("post_ffw_norm")?,
            windowed: model.windowed[layer],
        })
    }

    /// The block's output, given its input `x`, `[n, dim]`.
    ///
    /// # Errors
    /// Where keys and values do not fit into memory.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &mut [f32],
        room: &mut Room,
    ) -> Result<(), bevel_kernels::Error> {
        let found = self.activations(step, parameters, x, room, true)?;
        x.copy_from_slice(&found.middle);
        self.join(step, &self.post_ffn_norm, &found.ffn_out, x);
        Ok(())
    }

    /// x += branch, normalised and scaled where the family does that.
    fn join(&self, step: &Step<'_>, norm: &Option<Vec<f32>>, branch: &[f32], x: &mut [f32]) {
        let normed = normed(step, norm, branch);
        add_scaled(step.cpu, x, &normed, step.config.residual_scale);
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

    fn activations(
        &self,
        step: &Step<'_>,
        parameters: &Parameters,
        x: &[f32],
        room: &mut Room,
        wants_out: bool,
    ) -> Result<Activations, bevel_kernels::Error> {
        let (cpu, config) = (step.cpu, step.config);
        let attn_in = normed(step, &self.attn_norm, x);
        let mut q = self.q.forward(step, parameters, &attn_in, room);
        let mut k = self.k.forward(step, parameters, &attn_in, room);
        let v = self.v.forward(step, parameters, &attn_in, room);
        let (mut raw_q, mut raw_k) = (None, None);
        for (x, raw, weight, heads) in [
            (&mut q, &mut raw_q, &self.q_norm, config.heads),
            (&mut k, &mut raw_k, &self.k_norm, config.kv_heads),
        ] {
            let Some(weight) = weight else { continue };
            let (rows, d) = qk_shape(step, heads);
            let mut normed = vec![0.0; x.len()];
            rms_norm(cpu, &mut normed, x, weight, config.norm_eps, rows, d);
            *raw = Some(std::mem::replace(x, normed));
        }
        rope(cpu, &mut q, config.heads, config.head_dim, self.rope(step));
        rope(cpu, &mut k, config.kv_heads, config.head_dim, self.rope(step));
        let attended = self.attend(step, &q, &k, &v, room)?;
        let attn_out = self.o.forward(step, parameters, &attended, room);
        let mut middle = x.to_vec();
        self.join(step, &self.post_attn_norm, &attn_out, &mut middle);
        let ffn_in = normed(step, &self.ffn_norm, &middle);
        let gate = self.gate.forward(step, parameters, &ffn_in, room);
        let up = self.up.forward(step, parameters, &ffn_in, room);
        let mut gated = vec![0.0; gate.len()];
        match config.family.activation {
            Activation::Silu => silu_mul(cpu, &mut gated, &gate, &up),
            Activation::GeluTanh => gelu_tanh_mul(cpu, &mut gated, &gate, &up),
        }
        let ffn_out = match wants_out {
            true => self.down.forward(step, parameters, &gated, room),
            false => Vec::new(),
        };
        Ok(Activations {
            attn_in,
            raw_q,
            raw_k,
            q,
            k,
            v,
            attended,
            attn_out,
            middle,
            ffn_in,
            gate,
            up,
            gated,
            ffn_out,
        })
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
        let mut attended = vec![0.0; q.len()];
        let spec = self.spec(step.config);
        attention(step.cpu, &mut attended, q, kv, 0, &spans, &spec, &mut room.attention);
        Ok(attended)
    }

    /// The gradient of the block's input in the place of that of its output, `d_x`, given the input `x`; gradients
    /// of the parameters are added to theirs.
    ///
    /// # Errors
    /// Those of [`Layer::forward`].
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        x: &[f32],
        room: &mut Room,
    ) -> Result<(), bevel_kernels::Error> {
        let (cpu, config) = (step.cpu, step.config);
        // Where the last projection's output has no norm, no gradient depends on it.
        let wants_out = self.post_ffn_norm.is_some();
        let found = self.activations(step, parameters, x, room, wants_out)?;

        let d_out = joined_backward(step, &self.post_ffn_norm, d_x, &found.ffn_out);
        let mut d_gated = vec![0.0; found.gated.len()];
        self.down.backward(step, parameters, &mut d_gated, &d_out, &found.gated, room);
        let (mut d_gate, mut d_up) = (vec![0.0; d_gated.len()], vec![0.0; d_gated.len()]);
        let backward = match config.family.activation {
            Activation::Silu => silu_mul_backward,
            Activation::GeluTanh => gelu_tanh_mul_backward,
        };
        backward(cpu, &mut d_gate, &mut d_up, &d_gated, &found.gate, &found.up);
        let mut d_in = vec![0.0; d_x.len()];
        self.gate.backward(step, parameters, &mut d_in, &d_gate, &found.ffn_in, room);
        self.up.backward(step, parameters, &mut d_in, &d_up, &found.ffn_in, room);
        normed_backward(step, &self.ffn_norm, d_x, &d_in, &found.middle);

        let d_out = joined_backward(step, &self.post_attn_norm, d_x, &found.attn_out);
        let mut d_attended = vec![0.0; found.attended.len()];
        self.o.backward(step, parameters, &mut d_attended, &d_out, &found.attended, room);
        let mut d_q = vec![0.0; found.q.len()];
        let (mut d_k, mut d_v) = (vec![0.0; found.k.len()], vec![0.0; found.v.len()]);
        let gradients = AttentionGradients { q: &mut d_q, k: &mut d_k, v: &mut d_v };
        let Activations { q, k, v, attended: out, .. } = &found;
        let attended = Attended { sequences: step.sequences, q, k, v, out };
        attention_backward(cpu, gradients, &d_attended, &attended, &self.spec(config));
        for (d, raw, weight, heads) in [
            (&mut d_q, &found.raw_q, &self.q_norm, config.heads),
            (&mut d_k, &found.raw_k, &self.k_norm, config.kv_heads),
        ] {
            rope_backward(cpu, d, heads, config.head_dim, self.rope(step));
            if let (Some(raw), Some(weight)) = (raw, weight) {
                let (rows, width) = qk_shape(step, heads);
                let mut d_raw = vec![0.0; d.len()];
                let eps = config.norm_eps;
                rms_norm_backward(cpu, &mut d_raw, None, d, raw, weight, eps, rows, width);
                *d = d_raw;
            }
        }
        let mut d_in = vec![0.0; d_x.len()];
        for (projection, d) in [(&self.q, &d_q), (&self.k, &d_k), (&self.v, &d_v)] {
            projection.backward(step, parameters, &mut d_in, d, &found.attn_in, room);
        }
        normed_backward(step, &self.attn_norm, d_x, &d_in, x);
        Ok(())
    }
}

/// Rows and width of the norm of queries or keys.
fn qk_shape(step: &Step<'_>, heads: usize) -> (usize, usize) {
    match step.config.family.qk_norm {
        QkNorm::Full => (step.n, heads * step.config.head_dim),
        _ => (step.n * heads, step.config.head_dim),
    }
}

/// A normalised copy, or a copy where there is no norm.
pub(crate) fn normed(step: &Step<'_>, norm: &Option<Vec<f32>>, x: &[f32]) -> Vec<f32> {
    let mut out = x.to_vec();
    if let Some(weight) = norm {
        rms_norm(step.cpu, &mut out, x, weight, step.config.norm_eps, step.n, step.config.dim);
    }
    out
}

/// Adds the gradient of [`normed`]'s input `x` to `d_x`, given that of its output.
pub(crate) fn normed_backward(
    step: &Step<'_>,
    norm: &Option<Vec<f32>>,
    d_x: &mut [f32],
    d_out: &[f32],
    x: &[f32],
) {
    let (n, dim, eps) = (step.n, step.config.dim, step.config.norm_eps);
    match norm {
        Some(weight) => {
            rms_norm_backward(step.cpu, d_x, None, d_out, x, weight, eps, n, dim);
        }
        None => bevel_kernels::add(step.cpu, d_x, d_out),
    }
}

/// The gradient of a branch's output, before its norm, given that of the stream that it joined.
fn joined_backward(
    step: &Step<'_>,
    norm: &Option<Vec<f32>>,
    d_x: &[f32],
    branch: &[f32],
) -> Vec<f32> {
    let mut d_joined = d_x.to_vec();
    if step.config.residual_scale != 1.0 {
        scale(step.cpu, &mut d_joined, step.config.residual_scale);
    }
    if norm.is_none() {
        return d_joined;
    }
    let mut d_branch = vec![0.0; branch.len()];
    normed_backward(step, norm, &mut d_branch, &d_joined, branch);
    d_branch
}
