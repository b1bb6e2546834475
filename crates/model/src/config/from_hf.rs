use serde_json::{Map, Value};

use super::{Experts, ModelConfig, RopeConfig, RopeScaling};
use crate::family::Family;
use crate::{Error, Result};

/// A JSON object with the file's name, for messages.
struct Fields<'a> {
    path: &'a str,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Config { path: self.path.to_owned(), key: key.to_owned(), problem: problem.into() }
    }

    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn usize_opt(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .and_then(|v| v.try_into().ok())
                    .ok_or_else(|| self.error(key, format!("is `{v}`; expected a whole number")))
            })
            .transpose()
    }

    fn usize(&self, key: &str) -> Result<usize> {
        self.usize_opt(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|v| {
                v.as_f64().ok_or_else(|| self.error(key, format!("is `{v}`; expected a number")))
            })
            .transpose()
    }

    fn f64(&self, key: &str) -> Result<f64> {
        self.f64_opt(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn bool_opt(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
            .map(|v| {
                v.as_bool()
                    .ok_or_else(|| self.error(key, format!("is `{v}`; expected true or false")))
            })
            .transpose()
    }

    fn f32s(&self, key: &str) -> Result<Vec<f32>> {
        self.get(key)
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect())
            .ok_or_else(|| self.error(key, "is not a list of numbers"))
    }

    fn object(&self, key: &str) -> Option<Fields<'_>> {
        self.get(key).and_then(Value::as_object).map(|map| Fields { path: self.path, map })
    }
}

impl ModelConfig {
    /// Reads the contents of a `config.json`; `path` names the file in messages.
    ///
    /// # Errors
    /// [`Error::UnknownArchitecture`], [`Error::Config`].
    pub fn from_hf(config: &Value, path: &str) -> Result<Self> {
        let not_object = || Error::Config {
            path: path.to_owned(),
            key: "config.json".to_owned(),
            problem: "is no JSON object".to_owned(),
        };
        let c = Fields { path, map: config.as_object().ok_or_else(not_object)? };
        let model_type = c.get("model_type").and_then(Value::as_str).unwrap_or("");
        let family = Family::of_hf(model_type).ok_or_else(|| Error::UnknownArchitecture {
            path: path.to_owned(),
            name: model_type.to_owned(),
            known: Family::names().join(", "),
        })?;
        let dim = c.usize("hidden_size")?;
        let layers = c.usize("num_hidden_layers")?;
        let heads = c.usize("num_attention_heads")?;
        let head_dim = match c.usize_opt("head_dim")? {
            Some(head_dim) => head_dim,
            None if matches!(family.gguf, "gemma2" | "gemma3") => 256,
            None if matches!(family.gguf, "qwen3" | "qwen3moe") => 128,
            None => dim.checked_div(heads).unwrap_or(0),
        };
        let context = c.usize("max_position_embeddings")?;
        let window = match c.bool_opt("use_sliding_window")? {
            Some(false) => None,
            // Qwen 2 and 3 have a window only where it is switched on.
            None if family.gguf.starts_with("qwen") => None,
            _ => c.usize_opt("sliding_window")?,
        };
        let experts = family
            .has_experts()
            .then(|| {
                let count = match c.usize_opt("num_local_experts")? {
                    Some(count) => count,
                    None => c.usize("num_experts")?,
                };
                Ok::<_, Error>(Experts {
                    count,
                    used: c.usize("num_experts_per_tok")?,
                    norm_topk: c.bool_opt("norm_topk_prob")?.unwrap_or(family.norm_topk),
                })
            })
            .transpose()?;
        if experts.is_some() {
            let skipped = c.get("mlp_only_layers").and_then(Value::as_array);
            if skipped.is_some_and(|list| !list.is_empty())
                || c.usize_opt("decoder_sparse_step")?.is_some_and(|step| step != 1)
            {
                return Err(c.error(
                    "mlp_only_layers",
                    "mixes dense and expert layers, which bevel does not run yet",
                ));
            }
        }
        if c.get("clip_qkv").is_some() {
            return Err(c.error("clip_qkv", "is set, which bevel does not run yet"));
        }
        let ffn_dim = match c.usize_opt("moe_intermediate_size")? {
            Some(ffn_dim) if experts.is_some() => ffn_dim,
            _ => c.usize("intermediate_size")?,
        };
        let (rope, local_rope) = ropes(&c, family, head_dim, context, window.is_some())?;
        let config = ModelConfig {
            family,
            name: c
                .get("_name_or_path")
                .and_then(Value::as_str)
                .filter(|n| !n.is_empty())
                .map(str::to_owned),
            vocab_size: c.usize("vocab_size")?,
            dim,
            layers,
            heads,
            kv_heads: c.usize_opt("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            ffn_dim,
            context,
            norm_eps: c.f64_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope,
            local_rope,
            windowed: windowed(&c, family, layers, window)?,
            window,
            attention_scale: match (
                c.f64_opt("attention_multiplier")?,
                c.f64_opt("query_pre_attn_scalar")?,
            ) {
                (Some(scale), _) => scale as f32,
                (None, Some(scalar)) => scalar.powf(-0.5) as f32,
                (None, None) => (head_dim as f64).powf(-0.5) as f32,
            },
            attention_softcap: c.f64_opt("attn_logit_softcapping")?.map(|v| v as f32),
            logit_softcap: c.f64_opt("final_logit_softcapping")?.map(|v| v as f32),
            embedding_scale: match c.f64_opt("embedding_multiplier")? {
                Some(scale) => scale as f32,
                None if family.scaled_embedding => (dim as f64).sqrt() as f32,
                None => 1.0,
            },
            residual_scale: c.f64_opt("residual_multiplier")?.unwrap_or(1.0) as f32,
            logit_divisor: c.f64_opt("logits_scaling")?.unwrap_or(1.0) as f32,
            tied: c.bool_opt("tie_word_embeddings")?.unwrap_or(family.tied_by_default),
            experts,
        };
        activation(&c, family)?;
        config.validate(path)
    }
}

/// Refuses a checkpoint whose activation is not its family's.
fn activation(c: &Fields<'_>, family: &Family) -> Result<()> {
    use crate::family::Activation;
    let found = c.get("hidden_activation").or_else(|| c.get("hidden_act")).and_then(Value::as_str);
    let accepted: &[&str] = match family.activation {
        Activation::Silu => &["silu", "swish"],
        // Gemma's configurations say `gelu` for historical reasons; the models use the tanh form.
        Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu_new", "gelu"],
    };
    match found {
        Some(name) if !accepted.contains(&name) => Err(c.error(
            "hidden_act",
            format!("is `{name}`; {} models use `{}`", family.gguf, accepted[0]),
        )),
        _ => Ok(()),
    }
}

/// For each layer whether the sliding window holds there.
fn windowed(
    c: &Fields<'_>,
    family: &Family,
    layers: usize,
    window: Option<usize>,
) -> Result<Vec<bool>> {
    if window.is_none() {
        return Ok(vec![false; layers.min(10_001)]);
    }
    if let Some(types) = c.get("layer_types").and_then(Value::as_array) {
        if types.len() != layers {
            return Err(
                c.error("layer_types", format!("has {} entries for {layers} layers", types.len()))
            );
        }
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(c.error("layer_types", format!("has the unknown entry `{t}`"))),
            })
            .collect();
    }
    if family.gguf.starts_with("qwen") {
        let first = c.usize_opt("max_window_layers")?.unwrap_or(layers);
        return Ok((0..layers.min(10_001)).map(|i| i >= first).collect());
    }
    let every = c.usize_opt("sliding_window_pattern")?.unwrap_or(family.global_every);
    Ok(super::window_pattern(layers, every))
}

/// The rotary embedding of global layers, and of windowed layers where it differs.
fn ropes(
    c: &Fields<'_>,
    family: &Family,
    head_dim: usize,
    context: usize,
    has_window: bool,
) -> Result<(RopeConfig, Option<RopeConfig>)> {
    let partial = c.f64_opt("partial_rotary_factor")?.unwrap_or(1.0);
    let build = |scaling: Option<Fields<'_>>, theta: Option<f64>| -> Result<RopeConfig> {
        let mut rotary = partial;
        let mut theta = theta;
        let mut kind = RopeScaling::None;
        if let Some(s) = &scaling {
            theta = s.f64_opt("rope_theta")?.or(theta);
            rotary = s.f64_opt("partial_rotary_factor")?.unwrap_or(rotary);
            kind = rope_scaling(c, s, context)?;
        }
        let rotary_dim = (head_dim as f64 * rotary) as usize;
        Ok(RopeConfig { theta: theta.unwrap_or(10_000.0), rotary_dim, scaling: kind })
    };
    let theta = c.f64_opt("rope_theta")?;
    // transformers 5 writes `rope_parameters`, for Gemma 3 one for each kind of layer.
    if let Some(parameters) = c.object("rope_parameters") {
        if let Some(full) = parameters.object("full_attention") {
            let local = parameters.object("sliding_attention");
            let local = local.map(|local| build(Some(local), None)).transpose()?;
            return Ok((build(Some(full), theta)?, local.filter(|_| has_window)));
        }
        return Ok((build(Some(parameters), theta)?, None));
    }
    let theta = theta.or((family.gguf == "gemma3").then_some(1e6));
    let global = build(c.object("rope_scaling"), theta)?;
    let local = match c.f64_opt("rope_local_base_freq")? {
        None if family.gguf != "gemma3" => None,
        theta => Some(build(None, theta)?),
    };
    Ok((global, local.filter(|_| has_window)))
}

fn rope_scaling(c: &Fields<'_>, s: &Fields<'_>, context: usize) -> Result<RopeScaling> {
    let kind = s.get("rope_type").or_else(|| s.get("type")).and_then(Value::as_str);
    let original = match s.usize_opt("original_max_position_embeddings")? {
        Some(original) => original,
        None => c.usize_opt("original_max_position_embeddings")?.unwrap_or(context),
    };
    let stretch = context as f64 / original.max(1) as f64;
    Ok(match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: s.f64("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: s.f64("factor")?,
            low_freq_factor: s.f64("low_freq_factor")?,
            high_freq_factor: s.f64("high_freq_factor")?,
            original_context: original,
        },
        "yarn" => {
            let factor = s.f64_opt("factor")?.unwrap_or(stretch);
            let mscale =
                |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
            let attention_factor = match (
                s.f64_opt("attention_factor")?,
                s.f64_opt("mscale")?.filter(|m| *m != 0.0),
                s.f64_opt("mscale_all_dim")?.filter(|m| *m != 0.0),
            ) {
                (Some(factor), ..) => factor,
                (None, Some(a), Some(b)) => mscale(a) / mscale(b),
                _ => mscale(1.0),
            };
            RopeScaling::Yarn {
                factor,
                original_context: original,
                beta_fast: s.f64_opt("beta_fast")?.unwrap_or(32.0),
                beta_slow: s.f64_opt("beta_slow")?.unwrap_or(1.0),
                attention_factor,
            }
        }
        // `su` is the name of Phi-3's first checkpoints.
        "longrope" | "su" => {
            let factor = s.f64_opt("factor")?.unwrap_or(stretch);
            let default = if factor <= 1.0 {
                1.0
            } else {
                (1.0 + factor.ln() / (original as f64).ln()).sqrt()
            };
            RopeScaling::LongRope {
                short: s.f32s("short_factor")?,
                long: s.f32s("long_factor")?,
                original_context: original,
                attention_factor: s.f64_opt("attention_factor")?.unwrap_or(default),
            }
        }
        other => {
            return Err(c.error(
                "rope_type",
                format!("is `{other}`; bevel runs default, linear, llama3, yarn and longrope"),
            ));
        }
    })
}
