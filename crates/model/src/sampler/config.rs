use std::sync::Arc;

/// How tokens are chosen. What changes logits comes first, then filters in the order of the fields, then
/// temperature, as in llama.cpp.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Added to the logits of these tokens. -∞ forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Logits of tokens among the last `repetition_window`, the prompt counted, are divided by this where
    /// positive, multiplied where negative (CTRL, arXiv 1909.05858). 1 switches it off.
    pub repetition_penalty: f32,
    /// Tokens that the repetition penalty looks back on.
    pub repetition_window: usize,
    /// Subtracted from the logits of tokens that occur in the answer.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens that occur in the answer, once for each time.
    pub frequency_penalty: f32,
    /// A penalty on going on as before.
    pub dry: Option<Dry>,
    /// Only the `top_k` likeliest tokens stay; 0 keeps all.
    pub top_k: usize,
    /// Tokens stay whose surprise is nearest to what is expected, until their probabilities add up to
    /// `typical_p` (arXiv 2202.00666); 1 keeps all.
    pub typical_p: f32,
    /// The likeliest tokens stay until their probabilities add up to `top_p` (arXiv 1904.09751);
    /// 1 keeps all.
    pub top_p: f32,
    /// Tokens stay whose probability is at least `min_p` times the likeliest one's
    /// (arXiv 2407.01082); 0 keeps all.
    pub min_p: f32,
    /// Logits are divided by this; 0 takes the likeliest token.
    pub temperature: f32,
    /// Start of the random numbers.
    pub seed: u64,
}

/// "Don't Repeat Yourself": where the last `n` tokens occurred before, what followed them then loses
/// `multiplier · base^(n - allowed_length)` of its logit.
#[derive(Clone, Debug, PartialEq)]
pub struct Dry {
    /// Scale of the penalty.
    pub multiplier: f32,
    /// How it grows with the length of what is repeated.
    pub base: f32,
    /// The shortest repetition that is penalized.
    pub allowed_length: usize,
    /// Tokens that it looks back on.
    pub window: usize,
    /// Tokens that a repetition does not reach across, sorted.
    pub breakers: Arc<[u32]>,
}

impl Default for SamplerConfig {
    /// Greedy decoding.
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            repetition_window: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry: None,
            top_k: 0,
            typical_p: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 0.0,
            seed: 0,
        }
    }
}

impl SamplerConfig {
    /// Whether logits change before they are filtered.
    pub(super) fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.dry.is_some()
    }

    /// Whether some tokens are left out.
    pub(super) fn filters(&self) -> bool {
        self.top_k > 0 || self.typical_p < 1.0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}
