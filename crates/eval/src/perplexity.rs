//! Perplexity: e to the mean surprise per token, −ln p(token | the tokens before it), in nats.
//!
//! A text is longer than a model's context, so it is cut into [`Windows`].

use std::time::{Duration, Instant};

use bevel_kernels::{Cpu, KvType};
use bevel_model::{Model, Session};
use serde::Serialize;

use crate::windows::Window;
use crate::{Mean, Result, Text, Windows};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct PerplexityConfig {
    /// Tokens of a window.
    pub context: usize,
    /// How the text is cut.
    pub windows: Windows,
    /// Storage of keys and values.
    pub kv_type: KvType,
}

/// A model's measured surprise.
#[derive(Clone, Debug, Serialize)]
pub struct Perplexity {
    /// Mean surprise of a token, nats.
    pub nats_per_token: f64,
    /// Standard error of `nats_per_token`. Surprises are taken as independent, as in llama.cpp;
    /// neighbours are not quite.
    pub standard_error: f64,
    /// e^nats_per_token
    pub perplexity: f64,
    /// perplexity · standard_error, what llama.cpp prints behind ±.
    pub perplexity_error: f64,
    /// The perplexity lies in this interval with 95 % confidence: e^(nats ± 1.96 standard errors).
    pub confidence_95: [f64; 2],
    /// Surprise in bits divided by the bytes of the scored tokens: comparable between tokenizers.
    /// `None` where the scored tokens stand for no bytes.
    pub bits_per_byte: Option<f64>,
    /// Tokens scored.
    pub scored_tokens: u64,
    /// Bytes they stand for.
    pub scored_bytes: u64,
    /// Windows run.
    pub windows: usize,
    /// Tokens run through the model.
    pub tokens: u64,
    /// Wall time.
    pub seconds: f64,
    /// `tokens / seconds`
    pub tokens_per_second: f64,
}

/// How far a measurement is.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Tokens run.
    pub done: usize,
    /// Tokens to run.
    pub total: usize,
    /// Perplexity so far; `None` before the first score.
    pub perplexity: Option<f64>,
    /// Mean KL divergence so far, nats; `None` where none is measured.
    pub kl: Option<f64>,
}

impl PerplexityConfig {
    /// Measures `model` on `text`. `progress` is called after every window.
    ///
    /// # Errors
    /// [`Error::TextTooShort`](crate::Error::TextTooShort), [`Error::Windows`](crate::Error::Windows),
    /// and those of the model.
    pub fn run(
        &self,
        model: &Model,
        cpu: &Cpu,
        text: &Text,
        progress: &mut dyn FnMut(Running),
    ) -> Result<Perplexity> {
        let windows = self.windows.lay(self.context, text.tokens.len())?;
        let total = windows.iter().map(|w| w.tokens.len()).sum();
        let mut session = Session::new(model, cpu, self.context, self.kv_type)?;
        let (mut mean, mut done, mut bytes) = (Mean::default(), 0, 0);
        let start = Instant::now();
        for window in &windows {
            let tokens = self.windows.input(window, text);
            session.truncate(0);
            mean.extend(surprises(&mut session, cpu, model.config().vocab_size, &tokens, window)?);
            bytes += window.scored_bytes(text);
            done += tokens.len();
            let perplexity = (mean.count() > 0).then(|| mean.mean().exp());
            progress(Running { done, total, perplexity, kl: None });
        }
        Ok(Perplexity::new(&mean, bytes, windows.len(), done as u64, start.elapsed()))
    }
}

/// The surprises of the scored tokens in nats. The session is empty before.
fn surprises(
    session: &mut Session<'_>,
    cpu: &Cpu,
    vocab: usize,
    tokens: &[u32],
    window: &Window,
) -> Result<Vec<f64>> {
    let mut all = Vec::with_capacity(window.scored.len());
    for step in window.steps(vocab) {
        let logits = session.step(&tokens[step.tokens], &step.outputs)?;
        let next = &tokens[step.next];
        let mut nats_of = vec![0.0; next.len()];
        cpu.pool().run_chunks(&mut nats_of, 1, |row, out| {
            out[0] = nats(&logits[row * vocab..][..vocab], next[row]);
        });
        all.extend_from_slice(&nats_of);
    }
    Ok(all)
}

/// −ln softmax(`logits`) at `token`, summed in f64.
///
/// # Panics
/// Where `token` is outside the vocabulary.
pub fn nats(logits: &[f32], token: u32) -> f64 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - highest).exp()).sum();
    // Differences first: large logits would swallow the small logarithm.
    sum.ln() + (highest - f64::from(logits[token as usize]))
}

impl Perplexity {
    pub(crate) fn new(
        mean: &Mean,
        bytes: u64,
        windows: usize,
        tokens: u64,
        elapsed: Duration,
    ) -> Self {
        let (nats, error) = (mean.mean(), mean.standard_error());
        let bits = nats * mean.count() as f64 / std::f64::consts::LN_2;
        let seconds = elapsed.as_secs_f64();
        Self {
            nats_per_token: nats,
            standard_error: error,
            perplexity: nats.exp(),
            perplexity_error: nats.exp() * error,
            confidence_95: [(nats - 1.96 * error).exp(), (nats + 1.96 * error).exp()],
            bits_per_byte: (bytes > 0).then(|| bits / bytes as f64),
            scored_tokens: mean.count(),
            scored_bytes: bytes,
            windows,
            tokens,
            seconds,
            tokens_per_second: tokens as f64 / seconds.max(1e-9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_of_known_logits() {
        assert!((nats(&[0.0; 8], 3) - 8f64.ln()).abs() < 1e-15);
        // p = e^1 / (e^1 + e^2); a common shift changes nothing, however large.
        let expected = (1.0 + 1f64.exp()).ln();
        assert!((nats(&[1.0, 2.0], 0) - expected).abs() < 1e-15);
        assert!((nats(&[80_001.0, 80_002.0], 0) - expected).abs() < 1e-12);
    }
}
