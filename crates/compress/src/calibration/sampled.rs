//! Calibration without data: sequences sampled from the model itself.
//!
//! Data-free quantization by the model's own text is LLM-QAT's (arXiv 2305.17888); that it serves
//! calibration as well as a corpus does is shown by Williams, Chrysostomou and Aletras,
//! "Self-calibration for Language Model Quantization and Pruning" (arXiv 2410.17170).
//!
//! 1. Each sequence begins as `script.rs` says.
//! 2. Several of them lie in a batch: the weights are read once for all.
//! 3. p = softmax(logits), temperature 1; tokens with p < 0.01 · max p are left out (min-p, arXiv
//!    2407.01082): the far tail leads a small model astray, and a text stays there.
//! 4. A token is drawn by p from random numbers that are the sequence's own.
//! 5. A token that ends a text begins the next one in the same sequence.
//! 6. A text that goes round in circles is ended.
//! 7. A sequence that is full makes room for the next.

use std::ops::ControlFlow;

use bevel_kernels::{Cpu, KvType};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Batch, KvCache, Model, Sequence, State};

use super::choice::Random;
use super::script::{Script, Turn};
use super::{Calibration, CalibrationConfig, OnTokens};
use crate::{Error, Result};

/// Sequences in a batch.
const LANES: usize = 32;
/// Bytes of keys and values: fewer lanes where they would need more.
const CACHE: usize = 512 << 20;
/// Tokens less likely than the likeliest by this factor are left out.
const MIN_P: f32 = 0.01;
/// So many tokens in circles end a text.
const CIRCLE: usize = 48;
/// The longest circle that is looked for.
const PERIOD: usize = 12;

pub(super) fn sample(
    config: &CalibrationConfig,
    model: &Model,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    on_tokens: &mut OnTokens<'_>,
) -> Result<Calibration> {
    let kv_type = KvType::F16;
    let bytes = KvCache::bytes_per_token(model.config(), kv_type).max(1);
    let lanes = (CACHE / bytes / config.tokens).clamp(1, LANES).min(config.samples);
    let mut sampler = Sampler {
        config,
        model,
        cpu,
        ends: tokenizer.end_of_generation(),
        script: Script::new(tokenizer)?,
        // Rows past the tokenizer's vocabulary stand for nothing.
        vocab: model.config().vocab_size.min(tokenizer.vocab_size()),
        // Each lane's last block may be half empty.
        cache: KvCache::new(model.config(), kv_type, lanes * (config.tokens + 16))?,
        state: State::new(model.config(), config.tokens),
    };
    let mut found = vec![Vec::new(); config.samples];
    let mut waiting = 0..config.samples;
    let mut active: Vec<Lane> = waiting.by_ref().take(lanes).map(|i| sampler.lane(i)).collect();
    let (mut full, mut circles) = (0, 0);
    while !active.is_empty() {
        sampler.step(&mut active)?;
        let mut next = Vec::with_capacity(active.len());
        for mut lane in active {
            if lane.tokens.len() < config.tokens {
                next.push(lane);
                continue;
            }
            // (7)
            sampler.cache.truncate(&mut lane.sequence, 0);
            lane.tokens.truncate(config.tokens);
            circles += lane.circles;
            full += config.tokens;
            found[lane.index] = lane.tokens;
            next.extend(waiting.next().map(|i| sampler.lane(i)));
        }
        active = next;
        let done = full + active.iter().map(|lane| lane.tokens.len()).sum::<usize>();
        if on_tokens(done, config.samples * config.tokens) == ControlFlow::Break(()) {
            return Err(Error::Stopped);
        }
    }
    let warnings = match circles {
        0 => Vec::new(),
        n => vec![format!(
            "the model repeated itself in {n} of its calibration texts, which were ended there"
        )],
    };
    let (samples, tokens, seed) = (config.samples, config.tokens, config.seed);
    let description = format!("{samples} × {tokens} tokens sampled from the model, seed {seed}");
    Ok(Calibration::new(found, description, warnings))
}

struct Sampler<'a> {
    config: &'a CalibrationConfig,
    model: &'a Model,
    cpu: &'a Cpu,
    ends: &'a [u32],
    script: Script,
    vocab: usize,
    cache: KvCache,
    state: State,
}

/// A sequence that is being written.
struct Lane {
    index: usize,
    /// The first `sequence.len()` of them went through the model.
    tokens: Vec<u32>,
    sequence: Sequence,
    random: Random,
    turn: Turn,
    /// Where the text begins that is being written.
    text: usize,
    circles: usize,
}

impl Sampler<'_> {
    fn lane(&self, index: usize) -> Lane {
        let mut random = Random::new(self.config.seed, index as u64);
        // (1)
        let (turn, tokens) = self.script.begin(index, &mut random);
        let text = tokens.len();
        Lane { index, tokens, sequence: Sequence::new(), random, turn, text, circles: 0 }
    }

    /// Runs what the lanes have that the model has not seen, and draws a token for each.
    fn step(&mut self, lanes: &mut [Lane]) -> Result<()> {
        let mut tokens = Vec::new();
        let mut outputs = Vec::with_capacity(lanes.len());
        let mut counts = Vec::with_capacity(lanes.len());
        for lane in lanes.iter_mut() {
            let seen = lane.sequence.len();
            let end = lane.tokens.len().min(self.config.tokens);
            self.cache.extend(&mut lane.sequence, end - seen)?;
            tokens.extend_from_slice(&lane.tokens[seen..end]);
            counts.push(end - seen);
            outputs.push(tokens.len() - 1);
        }
        let parts: Vec<_> =
            lanes.iter().zip(&counts).map(|(lane, &tokens)| lane.sequence.part(tokens)).collect();
        // (2)
        let batch = Batch { tokens: &tokens, parts: &parts, outputs: &outputs };
        let logits = self.model.forward(self.cpu, &batch, self.cache.pool(), &mut self.state)?;
        let (row, vocab) = (self.model.config().vocab_size, self.vocab);
        let mut drawn: Vec<(f64, u32)> =
            lanes.iter_mut().map(|lane| (lane.random.unit(), 0)).collect();
        self.cpu.pool().run_chunks(&mut drawn, 1, |i, drawn| {
            let (number, token) = &mut drawn[0];
            *token = draw(&logits[i * row..][..vocab], *number);
        });
        for (lane, (_, token)) in lanes.iter_mut().zip(drawn) {
            self.accept(lane, token);
        }
        Ok(())
    }

    fn accept(&self, lane: &mut Lane, token: u32) {
        let ends = self.ends.contains(&token);
        if !ends {
            lane.tokens.push(token);
        }
        // (6)
        let circles = !ends && in_circles(&lane.tokens[lane.text.min(lane.tokens.len())..]);
        lane.circles += usize::from(circles);
        if ends || circles {
            // (5)
            let end = ends.then_some(token);
            let (turn, next) = self.script.go_on(lane.turn, end, &mut lane.random);
            lane.turn = turn;
            lane.tokens.extend(next);
            lane.text = lane.tokens.len();
        }
    }
}

/// (3) and (4): the token at which the sum of the probabilities passes `number`, which is in [0, 1).
fn draw(logits: &[f32], number: f64) -> u32 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let floor = highest + MIN_P.ln();
    let likely = || logits.iter().enumerate().filter(|(_, l)| **l >= floor);
    let weight = |logit: f32| f64::from(logit - highest).exp();
    let sum: f64 = likely().map(|(_, &logit)| weight(logit)).sum();
    let mut left = number * sum;
    let mut last = 0;
    for (token, &logit) in likely() {
        last = token as u32;
        left -= weight(logit);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// True where the last [`CIRCLE`] tokens repeat themselves every [`PERIOD`] tokens or sooner.
fn in_circles(tokens: &[u32]) -> bool {
    let Some(start) = tokens.len().checked_sub(CIRCLE) else { return false };
    let recent = &tokens[start..];
    (1..=PERIOD).any(|period| recent[period..] == recent[..CIRCLE - period])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_are_noticed() {
        let counting: Vec<u32> = (0..100).collect();
        assert!(!in_circles(&counting));
        for (period, expected) in [(1, true), (2, true), (12, true), (13, false), (40, false)] {
            let tokens: Vec<u32> = (0..100).map(|i| i % period).collect();
            assert_eq!(in_circles(&tokens), expected, "{period}");
            assert!(!in_circles(&tokens[..CIRCLE - 1]), "too short to tell");
        }
    }

    #[test]
    fn draws_follow_the_probabilities_and_leave_the_tail_out() {
        // 1 : e : e^-6, and the last is below a hundredth of e.
        let logits = [0.0, 1.0, -6.0];
        let mut counts = [0usize; 3];
        for i in 0..10_000 {
            counts[draw(&logits, f64::from(i) / 10_000.0) as usize] += 1;
        }
        let expected = 10_000.0 / (1.0 + std::f64::consts::E);
        assert!((counts[0] as f64 - expected).abs() < 2.0, "{counts:?}");
        assert_eq!(counts[2], 0);
        assert_eq!(draw(&[f32::NEG_INFINITY, 0.0], 0.999_999), 1);
    }
}
