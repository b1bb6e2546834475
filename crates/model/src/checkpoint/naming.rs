//! How tensors are called and stored in Hugging Face checkpoints, seen from their GGUF names.

use crate::ModelConfig;
use crate::family::TensorName;
use bevel_kernels::RopeStyle;

/// Where a tensor comes from in a Hugging Face checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfTensor {
    /// Full names; more than one where a GGUF file stacks what the checkpoint keeps apart (experts).
    pub names: Vec<String>,
    /// What changes on the way to GGUF.
    pub transform: Transform,
}

/// A change of contents between a Hugging Face checkpoint and a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// None.
    None,
    /// Rows of each of `heads` heads are regrouped so that the two values rope rotates together
    /// become neighbours: row `2i + j` of a head is row `j · head_dim/2 + i` of the checkpoint's.
    InterleaveRows {
        /// Heads in the tensor.
        heads: usize,
    },
    /// One is added to every value.
    PlusOne,
}

/// A tensor's place in a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// Outside the blocks.
    Global(&'a str),
    /// In block `layer`: the rest of the name.
    Layer(usize, &'a str),
}

impl<'a> Place<'a> {
    /// Splits a GGUF tensor name.
    pub fn of(name: &'a str) -> Place<'a> {
        let split = || {
            let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            Some(Place::Layer(layer.parse().ok()?, rest))
        };
        split().unwrap_or(Place::Global(name))
    }
}

impl ModelConfig {
    /// Where the tensor called `name` in GGUF files comes from in a Hugging Face checkpoint whose
    /// decoder sits under `prefix` (usually `model.`). `None` where a checkpoint has no such tensor.
    pub fn hf_tensor(&self, name: &str, prefix: &str) -> Option<HfTensor> {
        let is_norm = name.ends_with("norm.weight");
        let plain =
            if is_norm && self.family.norm_plus_one { Transform::PlusOne } else { Transform::None };
        let single = |name: String| HfTensor { names: vec![name], transform: plain };
        match Place::of(name) {
            Place::Global("token_embd.weight") => {
                Some(single(format!("{prefix}embed_tokens.weight")))
            }
            Place::Global("output_norm.weight") => Some(single(format!("{prefix}norm.weight"))),
            Place::Global("output.weight") => {
                let outer = prefix.strip_suffix("model.").unwrap_or(prefix);
                Some(single(format!("{outer}lm_head.weight")))
            }
            Place::Global(_) => None,
            Place::Layer(layer, rest) => {
                let (stem, kind) = rest.rsplit_once('.')?;
                let TensorName { hf, .. } = self.family.layer.iter().find(|t| t.gguf == stem)?;
                let full = format!("{prefix}layers.{layer}.{hf}.{kind}");
                let names = match self.experts {
                    Some(experts) if hf.contains("{e}") => {
                        (0..experts.count).map(|e| full.replace("{e}", &e.to_string())).collect()
                    }
                    _ => vec![full],
                };
                let transform = match (stem, self.family.rope) {
                    ("attn_q", RopeStyle::Interleaved) => {
                        Transform::InterleaveRows { heads: self.heads }
                    }
                    ("attn_k", RopeStyle::Interleaved) => {
                        Transform::InterleaveRows { heads: self.kv_heads }
                    }
                    _ => plain,
                };
                Some(HfTensor { names, transform })
            }
        }
    }

    /// The shape of the tensor called `name` in GGUF files, outermost dimension first, by this
    /// configuration. `None` where the architecture has no such tensor.
    pub fn tensor_shape(&self, name: &str) -> Option<Vec<usize>> {
        let (dim, q, kv) = (self.dim, self.q_dim(), self.kv_dim());
        let ffn = self.ffn_dim;
        let rest = match Place::of(name) {
            Place::Global("token_embd.weight" | "output.weight") => {
                return Some(vec![self.vocab_size, dim]);
            }
            Place::Global("output_norm.weight") => return Some(vec![dim]),
            Place::Global(
                "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight",
            ) => {
                return Some(vec![self.rope.rotary_dim / 2]);
            }
            Place::Global(_) => return None,
            Place::Layer(layer, _) if layer >= self.layers => return None,
            Place::Layer(_, rest) => rest,
        };
        let (stem, kind) = rest.rsplit_once('.')?;
        self.family.layer.iter().find(|t| t.gguf == stem)?;
        let qk_norm = |full| match self.family.qk_norm {
            crate::family::QkNorm::Full => full,
            _ => self.head_dim,
        };
        let experts = self.experts.map_or(0, |e| e.count);
        let fused = self.family.is_fused();
        let weight = match stem {
            "attn_q" => vec![q, dim],
            "attn_k" | "attn_v" => vec![kv, dim],
            "attn_qkv" => vec![q + 2 * kv, dim],
            "attn_output" => vec![dim, q],
            "attn_q_norm" => vec![qk_norm(q)],
            "attn_k_norm" => vec![qk_norm(kv)],
            "attn_norm" | "ffn_norm" | "post_attention_norm" | "post_ffw_norm" => vec![dim],
            "ffn_up" if fused => vec![2 * ffn, dim],
            "ffn_gate" | "ffn_up" => vec![ffn, dim],
            "ffn_down" => vec![dim, ffn],
            "ffn_gate_inp" => vec![experts, dim],
            "ffn_gate_exps" | "ffn_up_exps" => vec![experts, ffn, dim],
            "ffn_down_exps" => vec![experts, dim, ffn],
            _ => return None,
        };
        match kind {
            "weight" => Some(weight),
            // A projection's bias is optional; norms and experts have none.
            "bias" if weight.len() == 2 && stem != "ffn_gate_inp" => Some(vec![weight[0]]),
            _ => None,
        }
    }

    /// Names of the tensors a checkpoint must hold, in the order files are written: GGUF names.
    pub fn required_tensors(&self) -> impl Iterator<Item = String> + '_ {
        let head = (!self.tied).then(|| "output.weight".to_owned());
        let layers = (0..self.layers).flat_map(move |layer| {
            self.family.layer.iter().map(move |t| format!("blk.{layer}.{}.weight", t.gguf))
        });
        ["token_embd.weight", "output_norm.weight"]
            .into_iter()
            .map(str::to_owned)
            .chain(head)
            .chain(layers)
    }
}

/// [`Transform::InterleaveRows`] row by row, or with `to_gguf` false its inverse: where row `r` of the
/// result comes from.
pub fn source_row(r: usize, head_dim: usize, to_gguf: bool) -> usize {
    let (head, r) = (r / head_dim * head_dim, r % head_dim);
    let half = head_dim / 2;
    head + if to_gguf { r % 2 * half + r / 2 } else { r % half * 2 + r / half }
}
