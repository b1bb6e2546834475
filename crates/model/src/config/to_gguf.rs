use bevel_formats::gguf::{Array, Metadata, Value};

use super::{ModelConfig, RopeScaling};

impl ModelConfig {
    /// Writes the architecture's keys the way llama.cpp reads them.
    pub fn to_gguf(&self, metadata: &mut Metadata) {
        let arch = self.family.gguf;
        metadata.insert("general.architecture".to_owned(), arch.into());
        metadata.insert("general.type".to_owned(), "model".into());
        if let Some(name) = &self.name {
            metadata.insert("general.name".to_owned(), name.as_str().into());
        }
        let mut set = |key: &str, value: Value| {
            metadata.insert(format!("{arch}.{key}"), value);
        };
        let number = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
        let real = |x: f64| Value::F32(x as f32);

        set("vocab_size", number(self.vocab_size));
        set("context_length", number(self.context));
        set("embedding_length", number(self.dim));
        set("block_count", number(self.layers));
        set("feed_forward_length", number(self.ffn_dim));
        set("attention.head_count", number(self.heads));
        set("attention.head_count_kv", number(self.kv_heads));
        set("attention.key_length", number(self.head_dim));
        set("attention.value_length", number(self.head_dim));
        set("attention.layer_norm_rms_epsilon", self.norm_eps.into());
        if let Some(experts) = self.experts {
            set("expert_count", number(experts.count));
            set("expert_used_count", number(experts.used));
            set("expert_feed_forward_length", number(self.ffn_dim));
            set("expert_weights_norm", experts.norm_topk.into());
        }
        if let Some(window) = self.window {
            set("attention.sliding_window", number(window));
            if self.windowed != super::window_pattern(self.layers, self.family.global_every) {
                let pattern = Array::Bool(self.windowed.clone());
                set("attention.sliding_window_pattern", Value::Array(pattern));
            }
        } else if arch == "phi3" {
            // llama.cpp insists on the key and takes zero for none.
            set("attention.sliding_window", number(0));
        }
        if self.attention_scale != (self.head_dim as f64).powf(-0.5) as f32 {
            set("attention.scale", self.attention_scale.into());
        }
        if let Some(cap) = self.attention_softcap {
            set("attn_logit_softcapping", cap.into());
        }
        if let Some(cap) = self.logit_softcap {
            set("final_logit_softcapping", cap.into());
        }
        if arch == "granite" {
            set("embedding_scale", self.embedding_scale.into());
            set("residual_scale", self.residual_scale.into());
            set("logit_scale", self.logit_divisor.into());
        }

        set("rope.dimension_count", number(self.rope.rotary_dim));
        set("rope.freq_base", real(self.rope.theta));
        if let Some(local) = &self.local_rope {
            set("rope.freq_base_swa", real(local.theta));
        }
        match &self.rope.scaling {
            // The divisors of these travel as a tensor.
            RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => {}
            RopeScaling::Linear { factor } => {
                set("rope.scaling.type", "linear".into());
                set("rope.scaling.factor", real(*factor));
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
            } => {
                set("rope.scaling.type", "yarn".into());
                set("rope.scaling.factor", real(*factor));
                set("rope.scaling.original_context_length", number(*original_context));
                set("rope.scaling.yarn_beta_fast", real(*beta_fast));
                set("rope.scaling.yarn_beta_slow", real(*beta_slow));
                let relative = attention_factor / RopeScaling::yarn_attention_factor(*factor);
                set("rope.scaling.attn_factor", real(relative));
            }
            RopeScaling::LongRope { original_context, attention_factor, .. } => {
                set("rope.scaling.original_context_length", number(*original_context));
                set("rope.scaling.attn_factor", real(*attention_factor));
            }
        }
    }
}
