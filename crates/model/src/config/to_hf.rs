use serde_json::{Map, Value, json};

use super::{ModelConfig, RopeConfig, RopeScaling};
use bevel_base::DType;

impl ModelConfig {
    /// The contents of a `config.json` that transformers reads. `dtype` is the type most weights are
    /// stored in; `biases` names the projections that have one, by their Hugging Face names.
    pub fn to_hf(&self, dtype: DType, biases: &[String]) -> Value {
        let family = self.family;
        let torch_dtype = match dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            _ => "bfloat16",
        };
        let mut c = Map::new();
        let mut set = |key: &str, value: Value| {
            c.insert(key.to_owned(), value);
        };
        set("architectures", json!([family.hf_class]));
        set("model_type", json!(family.hf[0]));
        set("torch_dtype", json!(torch_dtype));
        set("vocab_size", json!(self.vocab_size));
        set("hidden_size", json!(self.dim));
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        set("intermediate_size", json!(self.ffn_dim));
        set("max_position_embeddings", json!(self.context));
        set("rms_norm_eps", json!(f64_of(self.norm_eps)));
        set("tie_word_embeddings", json!(self.tied));
        let activation = match family.activation {
            crate::family::Activation::Silu => "silu",
            crate::family::Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        set("hidden_act", json!(activation));
        if family.gguf.starts_with("gemma") {
            set("hidden_activation", json!(activation));
            set("query_pre_attn_scalar", scalar(f64::from(self.attention_scale).powi(-2)));
            set("attn_logit_softcapping", json!(self.attention_softcap.map(f64_of)));
            set("final_logit_softcapping", json!(self.logit_softcap.map(f64_of)));
        }
        if family.gguf == "granite" {
            set("attention_multiplier", json!(f64_of(self.attention_scale)));
            set("embedding_multiplier", json!(f64_of(self.embedding_scale)));
            set("residual_multiplier", json!(f64_of(self.residual_scale)));
            set("logits_scaling", json!(f64_of(self.logit_divisor)));
        }
        if matches!(family.gguf, "llama" | "granite" | "qwen3" | "qwen3moe" | "olmo2" | "olmoe") {
            set("attention_bias", json!(biases.iter().any(|b| b.contains("self_attn"))));
        }
        if family.hf[0] == "llama" || family.gguf == "granite" {
            set("mlp_bias", json!(biases.iter().any(|b| b.contains("mlp"))));
        }
        set("sliding_window", json!(self.window));
        if self.window.is_some() {
            let kind = |w: &bool| if *w { "sliding_attention" } else { "full_attention" };
            if family.global_every > 0 || family.gguf.starts_with("qwen") {
                set("layer_types", json!(self.windowed.iter().map(kind).collect::<Vec<_>>()));
            }
            if family.gguf.starts_with("qwen") {
                set("use_sliding_window", json!(true));
            }
        }
        if let Some(experts) = self.experts {
            let count_key =
                if family.hf[0] == "mixtral" { "num_local_experts" } else { "num_experts" };
            set(count_key, json!(experts.count));
            set("num_experts_per_tok", json!(experts.used));
            set("norm_topk_prob", json!(experts.norm_topk));
            set("moe_intermediate_size", json!(self.ffn_dim));
        }
        set("rope_theta", scalar(self.rope.theta));
        if self.rope.rotary_dim != self.head_dim {
            let factor = self.rope.rotary_dim as f64 / self.head_dim as f64;
            set("partial_rotary_factor", json!(factor));
        }
        if let Some(local) = &self.local_rope {
            set("rope_local_base_freq", scalar(local.theta));
        }
        if let RopeScaling::LongRope { original_context, .. } = &self.rope.scaling {
            set("original_max_position_embeddings", json!(original_context));
        }
        set("rope_scaling", rope_scaling(&self.rope, self.context));
        Value::Object(c)
    }
}

/// A float as the shortest decimal that means the same f32.
fn f64_of(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

/// A whole number without `.0` where the value is one: some readers insist on integers.
fn scalar(x: f64) -> Value {
    let rounded = x.round();
    if (x - rounded).abs() < 1e-3 { json!(rounded as i64) } else { json!(x) }
}

fn rope_scaling(rope: &RopeConfig, context: usize) -> Value {
    let floats = |v: &[f32]| v.iter().map(|&x| f64_of(x)).collect::<Vec<_>>();
    match &rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_context,
            })
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original_context,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "attention_factor": attention_factor,
            })
        }
        RopeScaling::LongRope { short, long, original_context, attention_factor } => json!({
            "rope_type": "longrope",
            "short_factor": floats(short),
            "long_factor": floats(long),
            "original_max_position_embeddings": original_context,
            "attention_factor": attention_factor,
        }),
        RopeScaling::Divisors(divisors) => json!({
            "rope_type": "longrope",
            "short_factor": floats(divisors),
            "long_factor": floats(divisors),
            "original_max_position_embeddings": context,
            "attention_factor": 1.0,
        }),
    }
}
