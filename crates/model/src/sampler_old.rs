//! Choosing the next token from logits.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// How tokens are chosen. Filters apply in the order of the fields: penalty, `top_k`, `top_p`,
/// `min_p`, then temperature, as in llama.cpp.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Logits of tokens among the last `repetition_window` are divided by this where positive,
    /// multiplied where negative (CTRL, arXiv 1909.05858). 1 switches it off.
    pub repetition_penalty: f32,
    /// Tokens that the penalty looks back on.
    pub repetition_window: usize,
    /// Only the `top_k` likeliest tokens stay; 0 keeps all.
    pub top_k: usize,
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

impl Default for SamplerConfig {
    /// Greedy decoding.
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            repetition_window: 64,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 0.0,
            seed: 0,
        }
    }
}

/// A sampler with its random numbers and buffers. The same configuration and logits give the same
/// tokens on every machine.
#[derive(Debug)]
pub struct Sampler {
    config: SamplerConfig,
    random: Pcg64Mcg,
    /// Candidates: token and logit.
    candidates: Vec<(u32, f32)>,
    probabilities: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    pub fn new(config: SamplerConfig) -> Self {
        let random = Pcg64Mcg::seed_from_u64(config.seed);
        Self { config, random, candidates: Vec::new(), probabilities: Vec::new() }
    }

    /// The configuration.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Chooses a token from `logits`, `[vocab]`, after the tokens of `history`.
    ///
    /// # Panics
    /// Where `logits` is empty.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        assert!(!logits.is_empty(), "a vocabulary is never empty");
        let SamplerConfig { repetition_penalty, top_k, top_p, min_p, temperature, .. } =
            self.config;
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(token, &l)| (token as u32, l)));
        if repetition_penalty != 1.0 {
            self.penalize(history);
        }
        // Likelier first, and of equals the smaller token: so results do not hang on sort details.
        let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if temperature <= 0.0 {
            return self.candidates.iter().min_by(|a, b| by_logit(a, b)).map_or(0, |c| c.0);
        }
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k - 1, by_logit);
            self.candidates.truncate(top_k);
        }
        // Without a filter that needs the order, the whole vocabulary need not be sorted.
        if top_k > 0 || top_p < 1.0 || min_p > 0.0 {
            self.candidates.sort_unstable_by(by_logit);
        }
        if top_p < 1.0 {
            softmax(&self.candidates, 1.0, &mut self.probabilities);
            let mut sum = 0.0;
            let enough = self.probabilities.iter().position(|p| {
                sum += p;
                sum >= top_p
            });
            self.candidates.truncate(enough.map_or(usize::MAX, |last| last + 1));
        }
        if min_p > 0.0 {
            let floor = self.candidates[0].1 + min_p.ln();
            let kept = self.candidates.partition_point(|c| c.1 >= floor);
            self.candidates.truncate(kept.max(1));
        }
        softmax(&self.candidates, 1.0 / temperature, &mut self.probabilities);
        let mut left: f32 = self.random.random();
        for (candidate, p) in self.candidates.iter().zip(&self.probabilities) {
            left -= p;
            if left < 0.0 {
                return candidate.0;
            }
        }
        // Rounding left a remainder: the last candidate that can occur at all.
        let last = self.probabilities.iter().rposition(|&p| p > 0.0).unwrap_or(0);
        self.candidates[last].0
    }

    fn penalize(&mut self, history: &[u32]) {
        let SamplerConfig { repetition_penalty, repetition_window, .. } = self.config;
        let recent = &history[history.len().saturating_sub(repetition_window)..];
        for (i, &token) in recent.iter().enumerate() {
            if recent[..i].contains(&token) {
                continue;
            }
            if let Some((_, logit)) = self.candidates.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / repetition_penalty
                } else {
                    *logit * repetition_penalty
                };
            }
        }
    }
}

/// Probabilities of the candidates' logits times `factor`.
fn softmax(candidates: &[(u32, f32)], factor: f32, out: &mut Vec<f32>) {
    let highest = candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.1));
    out.clear();
    out.extend(candidates.iter().map(|c| ((c.1 - highest) * factor).exp()));
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten tokens; token 3 is likeliest, then 7.
    const LOGITS: [f32; 10] = [0.0, 0.5, -1.0, 3.0, 0.2, -2.0, 1.0, 2.5, 0.0, -0.5];

    #[track_caller]
    fn check(config: SamplerConfig, expected: &[u32]) {
        let mut seen: Vec<u32> = (0..400)
            .map(|seed| Sampler::new(SamplerConfig { seed, ..config.clone() }).sample(&LOGITS, &[]))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, expected);
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let hot = SamplerConfig { temperature: 5.0, ..SamplerConfig::default() };
        check(SamplerConfig::default(), &[3]);
        check(hot.clone(), &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        check(SamplerConfig { top_k: 3, ..hot.clone() }, &[3, 6, 7]);
        check(SamplerConfig { top_p: 0.5, ..hot.clone() }, &[3, 7]);
        check(SamplerConfig { top_p: 0.0, ..hot.clone() }, &[3]);
        // e^(2.5 - 3) is 0.61, e^(1 - 3) is 0.14.
        check(SamplerConfig { min_p: 0.5, ..hot.clone() }, &[3, 7]);
        check(SamplerConfig { min_p: 0.1, ..hot }, &[3, 6, 7]);
    }

    #[test]
    fn penalty_moves_both_signs_down_once() {
        let config = SamplerConfig { repetition_penalty: 2.0, ..SamplerConfig::default() };
        let mut sampler = Sampler::new(config);
        assert_eq!(sampler.sample(&LOGITS, &[3, 3, 3]), 7, "3.0 falls to 1.5, not further");
        assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]), 1, "-1 falls to -2");
        let far: Vec<u32> = std::iter::once(3).chain(std::iter::repeat_n(9, 64)).collect();
        assert_eq!(sampler.sample(&LOGITS, &far), 3, "outside the window");
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let config = SamplerConfig { temperature: 1.0, seed: 7, ..SamplerConfig::default() };
        let mut sampler = Sampler::new(config);
        let mut counts = [0usize; 10];
        const DRAWS: usize = 100_000;
        for _ in 0..DRAWS {
            counts[sampler.sample(&LOGITS, &[]) as usize] += 1;
        }
        let sum: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        let chi_square: f64 = LOGITS
            .iter()
            .zip(counts)
            .map(|(&l, count)| {
                let expected = DRAWS as f64 * f64::from(l).exp() / sum;
                (count as f64 - expected).powi(2) / expected
            })
            .sum();
        // 9 degrees of freedom: 27.9 is exceeded once in a thousand times.
        assert!(chi_square < 27.9, "{chi_square}");
    }
}
