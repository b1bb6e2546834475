//! Choosing the next token from logits.

mod candidates;
mod config;
mod penalties;

use bevel_kernels::{Cpu, log_sum_exp, softmax};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use candidates::{keep_min_p, keep_top_p, keep_typical, likeliest, likeliest_within};
pub use config::{Dry, SamplerConfig};

/// A sampler with its random numbers. The same configuration and the same choices give the same tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplerConfig,
    random: Pcg64Mcg,
}

/// What a token is chosen from.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// `[vocab]`
    pub logits: &'a [f32],
    /// The tokens before: prompt and answer.
    pub history: &'a [u32],
    /// How many of them are the prompt.
    pub prompt: usize,
    /// Tokens that may be chosen, bit `i % 32` of word `i / 32` being token `i`'s; others may not.
    pub allowed: Option<&'a [u32]>,
}

/// Buffers that samplers can share.
#[derive(Clone, Debug, Default)]
pub struct SamplerScratch {
    /// Logits with penalties, and then probabilities, `[vocab]`.
    adjusted: Vec<f32>,
    /// Tokens and their logits, the likeliest first.
    candidates: Vec<(u32, f32)>,
    /// Of the candidates.
    probabilities: Vec<f32>,
    seen: penalties::Seen,
    /// Room for the penalty on sequences.
    matches: Vec<usize>,
}

/// How likely the model found a token, before penalties, filters and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// ln p of the token.
    pub logprob: f32,
    /// How many tokens are likelier, and one: 1 for the likeliest.
    pub rank: u32,
    /// The likeliest tokens with theirs.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// Of `token`, with the `top` likeliest, under `logits`, `[vocab]`.
    ///
    /// # Panics
    /// Where the token is none of the vocabulary.
    pub fn of(cpu: &Cpu, logits: &[f32], token: u32, top: usize) -> Self {
        let sum = log_sum_exp(cpu, logits) as f32;
        let mut candidates = Vec::new();
        likeliest(logits, top, &mut candidates);
        candidates.iter_mut().for_each(|candidate| candidate.1 -= sum);
        let logit = logits[token as usize];
        let likelier = logits.iter().filter(|&&other| other > logit).count();
        Self { logprob: logit - sum, rank: likelier as u32 + 1, top: candidates }
    }
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    pub fn new(config: SamplerConfig) -> Self {
        let random = Pcg64Mcg::seed_from_u64(config.seed);
        Self { config, random }
    }

    /// The configuration.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Chooses a token.
    ///
    /// # Panics
    /// Where there are no logits, or no token is allowed.
    pub fn sample(&mut self, cpu: &Cpu, choice: &Choice<'_>, scratch: &mut SamplerScratch) -> u32 {
        assert!(!choice.logits.is_empty(), "a vocabulary is never empty");
        let SamplerScratch { adjusted, candidates, probabilities, seen, matches } = scratch;
        let config = &self.config;
        // Less heat than that cannot be told from none.
        let greedy = config.temperature < 1e-6;
        let mut logits = choice.logits;
        if choice.allowed.is_some() || config.changes_logits() || !(greedy || config.filters()) {
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            penalties::apply(config, choice, adjusted, seen, matches);
            logits = adjusted;
        }
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert!(highest > f32::NEG_INFINITY, "some token is allowed");
        if greedy {
            let first = logits.iter().position(|&l| l == highest);
            return first.expect("the highest is one of them") as u32;
        }
        if !config.filters() {
            return self.draw_from_all(cpu, adjusted);
        }
        let SamplerConfig { top_k, typical_p, top_p, min_p, temperature, .. } = *config;
        let all = logits.len();
        if typical_p < 1.0 {
            likeliest(logits, if top_k == 0 { all } else { top_k }, candidates);
            keep_typical(candidates, typical_p, probabilities);
            keep_top_p(candidates, top_p, probabilities);
        } else if top_k > 0 {
            likeliest(logits, top_k, candidates);
            keep_top_p(candidates, top_p, probabilities);
        } else if top_p < 1.0 {
            likeliest_within(logits, log_sum_exp(cpu, logits), top_p, candidates);
        } else {
            let floor = highest + min_p.ln();
            candidates.clear();
            let likely = logits.iter().enumerate().filter(|&(_, &l)| l >= floor);
            candidates.extend(likely.map(|(token, &l)| (token as u32, l)));
            candidates::sort(candidates);
        }
        keep_min_p(candidates, min_p);
        candidates::softmax(candidates, 1.0 / temperature, probabilities);
        let drawn = self.draw(probabilities);
        scratch.candidates[drawn].0
    }

    /// The `count` likeliest tokens and their ln p, by the model's probabilities with bias and penalties added
    /// to the logarithms: what beam search goes on with. Filters and temperature are left out.
    pub fn likeliest(
        &self,
        cpu: &Cpu,
        choice: &Choice<'_>,
        count: usize,
        scratch: &mut SamplerScratch,
    ) -> Vec<(u32, f32)> {
        let SamplerScratch { adjusted, seen, matches, .. } = scratch;
        let sum = log_sum_exp(cpu, choice.logits) as f32;
        adjusted.clear();
        adjusted.extend(choice.logits.iter().map(|logit| logit - sum));
        penalties::apply(&self.config, choice, adjusted, seen, matches);
        let mut tokens = Vec::new();
        likeliest(adjusted, count, &mut tokens);
        tokens
    }

    /// Draws from the whole vocabulary. The logits become probabilities.
    fn draw_from_all(&mut self, cpu: &Cpu, logits: &mut [f32]) -> u32 {
        let factor = 1.0 / self.config.temperature;
        logits.iter_mut().for_each(|l| *l *= factor);
        softmax(cpu, logits);
        self.draw(logits) as u32
    }

    /// Draws an index by the probabilities.
    fn draw(&mut self, probabilities: &[f32]) -> usize {
        let mut left: f32 = self.random.random();
        for (index, p) in probabilities.iter().enumerate() {
            left -= p;
            if left < 0.0 {
                return index;
            }
        }
        // Rounding left a remainder: the last that can occur at all.
        probabilities.iter().rposition(|&p| p > 0.0).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
