//! Perplexity: e to the mean surprise per token, −ln p(token | the tokens before it), in nats.
//!
//! A text is longer than a model's context, so it is cut into windows, and figures are comparable
//! only between equal cuts. Two are in use:
//!
//! 1. llama.cpp's: consecutive windows of `context` tokens, the first of each replaced by the token
//!    that begins a sequence where the model has one. Only the tokens after the middle are scored,
//!    `context − 1 − context / 2` a window, so that each has at least half a window before it.
//! 2. The sliding window of the Hugging Face documentation: windows of `context` tokens whose starts
//!    lie `stride` apart; each window scores the tokens that none before it has scored.

use std::ops::Range;
use std::time::{Duration, Instant};

use bevel_kernels::{Cpu, KvType};
use bevel_model::{Model, PREFILL_CHUNK, Session};
use serde::Serialize;

use crate::{Error, Mean, Result, Text};

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Windows {
    /// llama.cpp's consecutive windows, of which the second half is scored.
    HalfWindow,
    /// Windows that overlap, each moved on by so many tokens.
    Strided(usize),
}

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
}

/// One window: where it lies in the text, and which of its tokens are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    tokens: Range<usize>,
    scored: Range<usize>,
}

impl PerplexityConfig {
    /// Measures `model` on `text`. `progress` is called after every window.
    ///
    /// # Errors
    /// [`Error::TextTooShort`], [`Error::Windows`], and those of the model.
    pub fn run(
        &self,
        model: &Model,
        cpu: &Cpu,
        text: &Text,
        progress: &mut dyn FnMut(Running),
    ) -> Result<Perplexity> {
        let windows = self.windows(text.tokens.len())?;
        let total = windows.iter().map(|w| w.tokens.len()).sum();
        let mut session = Session::new(model, cpu, self.context, self.kv_type)?;
        let (mut mean, mut done, mut bytes) = (Mean::default(), 0, 0);
        let start = Instant::now();
        for window in &windows {
            let mut tokens = text.tokens[window.tokens.clone()].to_vec();
            if let (Windows::HalfWindow, Some(bos)) = (self.windows, text.bos) {
                tokens[0] = bos;
            }
            let first = window.tokens.start;
            let scored = window.scored.start - first..window.scored.end - first;
            session.truncate(0);
            let vocab = model.config().vocab_size;
            mean.extend(surprises(&mut session, cpu, vocab, &tokens, scored)?);
            bytes +=
                text.byte_lens[window.scored.clone()].iter().map(|&n| u64::from(n)).sum::<u64>();
            done += tokens.len();
            let perplexity = (mean.count() > 0).then(|| mean.mean().exp());
            progress(Running { done, total, perplexity });
        }
        Ok(Perplexity::new(&mean, bytes, windows.len(), done as u64, start.elapsed()))
    }

    /// Lays the windows over a text of `len` tokens.
    fn windows(&self, len: usize) -> Result<Vec<Window>> {
        let context = self.context;
        if context < 4 {
            return Err(Error::Windows(format!(
                "windows of {context} tokens are too short to score anything; --ctx begins at 4"
            )));
        }
        match self.windows {
            Windows::HalfWindow => {
                if len < context {
                    return Err(Error::TextTooShort { tokens: len, context });
                }
                let window = |i: usize| {
                    let (start, end) = (i * context, (i + 1) * context);
                    Window { tokens: start..end, scored: start + context / 2 + 1..end }
                };
                Ok((0..len / context).map(window).collect())
            }
            Windows::Strided(stride) => {
                if stride == 0 || stride > context {
                    return Err(Error::Windows(format!(
                        "a stride of {stride} tokens does not suit windows of {context}: expected 1 to {context}"
                    )));
                }
                if len < 2 {
                    return Err(Error::TextTooShort { tokens: len, context: 2 });
                }
                let mut windows = Vec::new();
                let (mut start, mut scored) = (0, 0);
                while scored < len {
                    let end = (start + context).min(len);
                    // Nothing stands before the first token of a window, so nothing predicts it.
                    windows.push(Window { tokens: start..end, scored: scored.max(start + 1)..end });
                    (start, scored) = (start + stride, end);
                }
                // The text's end may leave a last window with one token and nothing to score.
                windows.retain(|w| !w.scored.is_empty());
                Ok(windows)
            }
        }
    }
}

/// Logits held at once: 64 MB, whatever the size of the vocabulary.
const LOGITS_AT_ONCE: usize = 16 << 20;

/// The surprises of `tokens[scored]` in nats. The session is empty before.
fn surprises(
    session: &mut Session<'_>,
    cpu: &Cpu,
    vocab: usize,
    tokens: &[u32],
    scored: Range<usize>,
) -> Result<Vec<f64>> {
    let rows = (LOGITS_AT_ONCE / vocab).clamp(16, PREFILL_CHUNK);
    // The logits after token t - 1 predict token t.
    let wanted = scored.start - 1..scored.end - 1;
    let mut all = Vec::with_capacity(scored.len());
    let mut from = 0;
    while from < wanted.end {
        let room = (wanted.start.max(from) + rows).min(from + PREFILL_CHUNK);
        let to = room.min(wanted.end);
        let outputs: Vec<usize> = (wanted.start.max(from)..to).map(|t| t - from).collect();
        let logits = session.step(&tokens[from..to], &outputs)?;
        let next = &tokens[to - outputs.len() + 1..=to];
        let mut nats_of = vec![0.0; outputs.len()];
        cpu.pool().run_chunks(&mut nats_of, 1, |row, out| {
            out[0] = nats(&logits[row * vocab..][..vocab], next[row]);
        });
        all.extend_from_slice(&nats_of);
        from = to;
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
    fn new(mean: &Mean, bytes: u64, windows: usize, tokens: u64, elapsed: Duration) -> Self {
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

    #[track_caller]
    fn check(windows: Windows, len: usize, expected: &[(Range<usize>, Range<usize>)]) {
        let config = PerplexityConfig { context: 8, windows, kv_type: KvType::F32 };
        let found: Vec<_> =
            config.windows(len).unwrap().into_iter().map(|w| (w.tokens, w.scored)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn windows_lie_as_documented() {
        check(Windows::HalfWindow, 8, &[(0..8, 5..8)]);
        check(Windows::HalfWindow, 23, &[(0..8, 5..8), (8..16, 13..16)]);
        check(Windows::Strided(8), 12, &[(0..8, 1..8), (8..12, 9..12)]);
        check(Windows::Strided(3), 13, &[(0..8, 1..8), (3..11, 8..11), (6..13, 11..13)]);
        check(Windows::Strided(4), 5, &[(0..5, 1..5)]);
        check(Windows::Strided(8), 9, &[(0..8, 1..8)]);
    }

    #[test]
    fn overlapping_windows_score_every_token_but_the_first_once() {
        for (len, stride) in (2..40).flat_map(|len| (1..8).map(move |stride| (len, stride))) {
            let config = PerplexityConfig {
                context: 8,
                windows: Windows::Strided(stride),
                kv_type: KvType::F32,
            };
            let scored: Vec<usize> =
                config.windows(len).unwrap().into_iter().flat_map(|w| w.scored).collect();
            assert_eq!(scored, (1..len).collect::<Vec<_>>(), "stride {stride}");
        }
    }

    #[test]
    fn surprise_of_known_logits() {
        assert!((nats(&[0.0; 8], 3) - 8f64.ln()).abs() < 1e-15);
        // p = e^1 / (e^1 + e^2); a common shift changes nothing, however large.
        let expected = (1.0 + 1f64.exp()).ln();
        assert!((nats(&[1.0, 2.0], 0) - expected).abs() < 1e-15);
        assert!((nats(&[80_001.0, 80_002.0], 0) - expected).abs() < 1e-12);
    }
}
