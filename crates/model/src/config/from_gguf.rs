use bevel_formats::gguf::{Metadata, Value};

use super::{Experts, ModelConfig, RopeConfig, RopeScaling};
use crate::family::Family;
use crate::{Error, Result};

/// The metadata keys of one architecture, with the file's name for messages.
struct Keys<'a> {
    path: &'a str,
    architecture: &'a str,
    metadata: &'a Metadata,
}

impl Keys<'_> {
    fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        let key = format!("{}.{key}", self.architecture);
        Error::Config { path: self.path.to_owned(), key, problem: problem.into() }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&format!("{}.{key}", self.architecture))
    }

    /// A whole number; a list of equal numbers (one for each layer) counts as one.
    fn usize_opt(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if let Some(list) = value.as_ints() {
            let first = list.first().copied().unwrap_or(-1);
            return match usize::try_from(first) {
                Ok(number) if list.iter().all(|&n| n == first) => Ok(Some(number)),
                _ => Err(self.error(key, "differs between layers, which bevel does not run yet")),
            };
        }
        value.as_usize().map(Some).ok_or_else(|| self.error(key, "is no whole number"))
    }

    fn usize(&self, key: &str) -> Result<usize> {
        self.usize_opt(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.error(key, "is no number"))
    }

    fn bool_opt(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, "is neither true nor false"))
    }
}

/// What the metadata alone does not tell.
pub(crate) struct GgufFacts<'a> {
    /// Rows of `token_embd.weight`.
    pub(crate) vocab_size: usize,
    /// There is no `output.weight`.
    pub(crate) tied: bool,
    /// Reads a small f32 tensor.
    pub(crate) tensor: &'a dyn Fn(&str) -> Result<Option<Vec<f32>>>,
}

impl ModelConfig {
    /// Reads GGUF metadata; `path` names the file in messages.
    ///
    /// # Errors
    /// [`Error::UnknownArchitecture`], [`Error::Config`].
    pub(crate) fn from_gguf(
        metadata: &Metadata,
        facts: &GgufFacts<'_>,
        path: &str,
    ) -> Result<Self> {
        let architecture =
            metadata.get("general.architecture").and_then(Value::as_str).unwrap_or("");
        let c = Keys { path, architecture, metadata };
        let expert_count = c.usize_opt("expert_count")?.unwrap_or(0);
        let window = c.usize_opt("attention.sliding_window")?.filter(|&w| w > 0);
        let unknown = || Error::UnknownArchitecture {
            path: path.to_owned(),
            name: architecture.to_owned(),
            known: Family::names().join(", "),
        };
        let mut family = Family::of_gguf(architecture, expert_count > 0).ok_or_else(unknown)?;
        if family.hf[0] == "llama" && window.is_some() {
            family = Family::of_hf("mistral").unwrap_or(family);
        }
        let (dim, layers) = (c.usize("embedding_length")?, c.usize("block_count")?);
        let heads = c.usize("attention.head_count")?;
        let derived = dim.checked_div(heads).unwrap_or(0);
        let head_dim = c.usize_opt("attention.key_length")?.unwrap_or(derived);
        if c.usize_opt("attention.value_length")?.unwrap_or(head_dim) != head_dim {
            return Err(c.error(
                "attention.value_length",
                "differs from the key length, which bevel does not run yet",
            ));
        }
        let context = c.usize("context_length")?;
        let experts = (expert_count > 0)
            .then(|| {
                Ok::<_, Error>(Experts {
                    count: expert_count,
                    used: c.usize("expert_used_count")?,
                    norm_topk: c
                        .bool_opt("expert_weights_norm")?
                        .unwrap_or(architecture != "olmoe"),
                })
            })
            .transpose()?;
        let ffn_dim = match c.usize_opt("expert_feed_forward_length")? {
            Some(ffn_dim) if experts.is_some() => ffn_dim,
            _ => c.usize("feed_forward_length")?,
        };
        // The 27B models scale by the width per head instead of the head's own width, and their
        // files do not say so.
        let is_gemma_27b = matches!((architecture, layers), ("gemma2", 46) | ("gemma3", 62));
        let attention_scale = match c.f64_opt("attention.scale")?.filter(|&s| s != 0.0) {
            Some(scale) => scale as f32,
            None if is_gemma_27b => (derived as f64).powf(-0.5) as f32,
            None => (head_dim as f64).powf(-0.5) as f32,
        };
        let (rope, local_rope) = ropes(&c, facts, head_dim, context)?;
        let global_every = match c.get("attention.sliding_window_pattern") {
            Some(value) => value.as_usize().unwrap_or(family.global_every),
            None => family.global_every,
        };
        let config = ModelConfig {
            family,
            name: metadata.get("general.name").and_then(Value::as_str).map(str::to_owned),
            vocab_size: facts.vocab_size,
            dim,
            layers,
            heads,
            kv_heads: c.usize_opt("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ffn_dim,
            context,
            norm_eps: c
                .f64_opt("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| c.error("attention.layer_norm_rms_epsilon", "is missing"))?
                as f32,
            local_rope: local_rope.filter(|_| window.is_some()),
            rope,
            windowed: match window {
                Some(_) => window_layers(&c, layers, global_every)?,
                None => vec![false; layers.min(10_001)],
            },
            window,
            attention_scale,
            attention_softcap: match c.f64_opt("attn_logit_softcapping")? {
                Some(cap) => Some(cap as f32),
                None => (architecture == "gemma2").then_some(50.0),
            },
            logit_softcap: match c.f64_opt("final_logit_softcapping")? {
                Some(cap) => Some(cap as f32).filter(|&cap| cap != 0.0),
                None => (architecture == "gemma2").then_some(30.0),
            },
            embedding_scale: match c.f64_opt("embedding_scale")?.filter(|&s| s != 0.0) {
                Some(scale) => scale as f32,
                None if family.scaled_embedding => (dim as f64).sqrt() as f32,
                None => 1.0,
            },
            residual_scale: c.f64_opt("residual_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0)
                as f32,
            logit_divisor: c.f64_opt("logit_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0) as f32,
            tied: facts.tied,
            experts,
        };
        config.validate(path)
    }
}

fn window_layers(c: &Keys<'_>, layers: usize, global_every: usize) -> Result<Vec<bool>> {
    use bevel_formats::gguf::Array;
    match c.get("attention.sliding_window_pattern") {
        Some(Value::Array(Array::Bool(list))) if list.len() == layers => Ok(list.clone()),
        Some(Value::Array(_)) => Err(c.error(
            "attention.sliding_window_pattern",
            format!("is no list of {layers} truth values"),
        )),
        _ => Ok(super::window_pattern(layers, global_every)),
    }
}

/// The rotary embedding of global layers, and of windowed layers where it differs.
fn ropes(
    c: &Keys<'_>,
    facts: &GgufFacts<'_>,
    head_dim: usize,
    context: usize,
) -> Result<(RopeConfig, Option<RopeConfig>)> {
    let theta = c.f64_opt("rope.freq_base")?.unwrap_or(10_000.0);
    let rotary_dim = c.usize_opt("rope.dimension_count")?.unwrap_or(head_dim);
    let original = c.usize_opt("rope.scaling.original_context_length")?.unwrap_or(context);
    let attn_factor = c.f64_opt("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let factor = match c.f64_opt("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => c.f64_opt("rope.scale_linear")?,
    };
    let kind = c.get("rope.scaling.type").and_then(Value::as_str);
    let tensor = |name: &str| -> Result<Option<Vec<f32>>> {
        let values = (facts.tensor)(name)?;
        match &values {
            Some(v) if v.len() != rotary_dim / 2 => Err(Error::Shape {
                path: c.path.to_owned(),
                tensor: name.to_owned(),
                expected: format!("[{}]", rotary_dim / 2),
                found: format!("[{}]", v.len()),
            }),
            _ => Ok(values),
        }
    };
    let scaling = match (tensor("rope_factors_short.weight")?, tensor("rope_factors_long.weight")?)
    {
        (Some(short), Some(long)) => RopeScaling::LongRope {
            short,
            long,
            original_context: original,
            attention_factor: attn_factor,
        },
        _ => match (tensor("rope_freqs.weight")?, kind, factor) {
            (Some(divisors), ..) => RopeScaling::of_divisors(divisors, theta, rotary_dim),
            (None, Some("yarn"), Some(factor)) => RopeScaling::Yarn {
                factor,
                original_context: original,
                beta_fast: c.f64_opt("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: c.f64_opt("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: attn_factor * RopeScaling::yarn_attention_factor(factor),
            },
            (None, Some("linear") | None, Some(factor)) if factor != 1.0 => {
                RopeScaling::Linear { factor }
            }
            (None, Some("none" | "linear" | "yarn") | None, _) => RopeScaling::None,
            (None, Some(other), _) => {
                return Err(c.error(
                    "rope.scaling.type",
                    format!("is `{other}`; bevel runs none, linear, yarn, and Llama 3's and LongRoPE's factors"),
                ));
            }
        },
    };
    // Gemma 3 rotates its windowed layers by an unstretched base of their own.
    let local_theta = match c.f64_opt("rope.freq_base_swa")? {
        None if c.architecture == "gemma3" => Some(10_000.0),
        theta => theta,
    };
    let local =
        local_theta.map(|theta| RopeConfig { theta, rotary_dim, scaling: RopeScaling::None });
    Ok((RopeConfig { theta, rotary_dim, scaling }, local))
}
