//! What a checkpoint says about its model: the numbers the forward pass runs on, read from a
//! `config.json` or from GGUF metadata and written back to either.

mod from_gguf;
mod from_hf;
mod rope;
mod to_gguf;
mod to_hf;

pub(crate) use from_gguf::GgufFacts;
pub use rope::{RopeConfig, RopeScaling};

use bevel_kernels::{KvShape, KvType, RopeSpec, RopeTable};

use crate::family::Family;
use crate::{Error, Result};

/// A decoder's dimensions and switches. Field names are those of the literature.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The family: what the numbers below do not say.
    pub family: &'static Family,
    /// A human-readable name, where the checkpoint has one.
    pub name: Option<String>,
    /// Tokens in the vocabulary: rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query heads share them in groups of `heads / kv_heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the MLP (of one expert, in a mixture).
    pub ffn_dim: usize,
    /// Tokens the model was trained to attend over.
    pub context: usize,
    /// ε of every RMS norm.
    pub norm_eps: f32,
    /// Rotary embedding of the layers that attend globally.
    pub rope: RopeConfig,
    /// Rotary embedding of the layers with a window, where it differs.
    pub local_rope: Option<RopeConfig>,
    /// Sliding window in tokens, the query's own position counted.
    pub window: Option<usize>,
    /// For each layer whether the window holds there.
    pub windowed: Vec<bool>,
    /// Factor on q·k, usually 1/√head_dim.
    pub attention_scale: f32,
    /// Soft cap on attention scores.
    pub attention_softcap: Option<f32>,
    /// Soft cap on logits.
    pub logit_softcap: Option<f32>,
    /// Factor on the embedding (Gemma, Granite).
    pub embedding_scale: f32,
    /// Factor on each branch before it joins the residual stream (Granite).
    pub residual_scale: f32,
    /// Divisor of the logits (Granite).
    pub logit_divisor: f32,
    /// The output head is the embedding.
    pub tied: bool,
    /// Mixture of experts.
    pub experts: Option<Experts>,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts in a layer.
    pub count: usize,
    /// Experts a token goes through.
    pub used: usize,
    /// The chosen experts' weights are divided by their sum.
    pub norm_topk: bool,
}

impl ModelConfig {
    /// What the model's key–value memory consists of.
    pub fn kv_shape(&self, kv_type: KvType) -> KvShape {
        let Self { layers, kv_heads, head_dim, .. } = *self;
        KvShape { layers, kv_heads, head_dim, kv_type }
    }

    /// A table of one of the model's rotary embeddings, for runs over at most `context` tokens: LongRoPE chooses
    /// its frequencies by it.
    pub fn rope_table(&self, rope: &RopeConfig, context: usize) -> RopeTable {
        RopeTable::new(&RopeSpec {
            rotary_dim: rope.rotary_dim,
            theta: rope.theta as f32,
            factors: rope.divisors(context),
            style: self.family.rope,
            attention_factor: rope.attention_factor(),
        })
    }

    /// Width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Refuses values no model can have, before anything is allocated by them.
    fn validate(self, path: &str) -> Result<Self> {
        let bad = |key: &str, problem: String| {
            Err(Error::Config { path: path.to_owned(), key: key.to_owned(), problem })
        };
        // Far above every real model, far below what would overflow a product of two.
        const LIMIT: usize = 1 << 26;
        for (key, value) in [
            ("vocabulary size", self.vocab_size),
            ("hidden size", self.dim),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("number of key-value heads", self.kv_heads),
            ("head dimension", self.head_dim),
            ("feed-forward size", self.ffn_dim),
            ("context length", self.context),
        ] {
            if value == 0 || value > LIMIT {
                return bad(key, format!("is {value}; expected 1 to {LIMIT}"));
            }
        }
        if self.layers > 10_000 {
            return bad("number of layers", format!("is {}; expected at most 10000", self.layers));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return bad(
                "number of heads",
                format!("is {}, no multiple of the {} key-value heads", self.heads, self.kv_heads),
            );
        }
        // Rope turns pairs of values, and its table is made before any tensor's shape is known.
        if self.head_dim > 1 << 16 || !self.head_dim.is_multiple_of(2) {
            return bad(
                "head dimension",
                format!("is {}; expected an even number up to {}", self.head_dim, 1 << 16),
            );
        }
        if self.q_dim() > LIMIT {
            return bad("number of heads", format!("times head dimension is {}", self.q_dim()));
        }
        for rope in [Some(&self.rope), self.local_rope.as_ref()].into_iter().flatten() {
            let whole = rope.rotary_dim > 0 && rope.rotary_dim.is_multiple_of(2);
            if rope.rotary_dim > self.head_dim || !whole {
                return bad(
                    "rotary dimension",
                    format!(
                        "is {}; expected an even number from 2 to the head dimension {}",
                        rope.rotary_dim, self.head_dim
                    ),
                );
            }
            if !(rope.theta.is_finite() && rope.theta > 0.0) {
                return bad("rope theta", format!("is {}", rope.theta));
            }
            for (name, factors) in rope.scaling.factors() {
                let (expected, found) = (rope.rotary_dim / 2, factors.len());
                if found != expected {
                    let problem = format!("has {found} factors; expected {expected}");
                    return bad(name, problem);
                }
            }
        }
        for (key, value) in [
            ("norm epsilon", self.norm_eps),
            ("attention scale", self.attention_scale),
            ("embedding scale", self.embedding_scale),
            ("residual scale", self.residual_scale),
            ("logit divisor", self.logit_divisor),
            ("attention soft cap", self.attention_softcap.unwrap_or(1.0)),
            ("logit soft cap", self.logit_softcap.unwrap_or(1.0)),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return bad(key, format!("is {value}; expected a positive number"));
            }
        }
        if self.window == Some(0) {
            return bad("sliding window", "is 0".to_owned());
        }
        if let Some(experts) = self.experts
            && (experts.count == 0
                || experts.count > 4096
                || experts.used == 0
                || experts.used > experts.count)
        {
            return bad(
                "number of experts",
                format!("is {} with {} used", experts.count, experts.used),
            );
        }
        Ok(self)
    }
}

/// For each layer whether the window holds: in all of them, or in all but the last of each group of
/// `global_every`.
fn window_pattern(layers: usize, global_every: usize) -> Vec<bool> {
    (0..layers.min(10_001))
        .map(|i| global_every == 0 || !(i + 1).is_multiple_of(global_every))
        .collect()
}
