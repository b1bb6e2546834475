//! The loop: examples in a random order, a step for every few of them.

use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

use bevel_kernels::Cpu;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::data::Example;
use crate::{AdamW, AdamWConfig, Batch, Error, Network, Parameters, Result};

/// How the learning rate goes after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Down to zero along half a cosine.
    Cosine,
    /// Down to zero in a line.
    Linear,
    /// As it is.
    Constant,
}

/// How a model is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Steps in all.
    pub steps: usize,
    /// Examples of a step.
    pub batch: usize,
    /// Most tokens that are computed together: a step with more adds up the gradients of several parts.
    pub tokens_together: usize,
    /// The learning rate at its highest.
    pub learning_rate: f64,
    /// Part of the steps in which it rises to that.
    pub warmup: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Gradients are scaled down to this norm.
    pub clip: f64,
    /// The optimizer's.
    pub adamw: AdamWConfig,
    /// The loss of the held-out examples is measured every so many steps, and at the end.
    pub evaluate_every: usize,
    /// Start of the random order.
    pub seed: u64,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// From 1 on.
    pub step: usize,
    /// Of each token to be learnt, in nats, before the step.
    pub loss: f64,
    /// Of the parameters, before clipping.
    pub gradient_norm: f64,
    /// Of the step.
    pub learning_rate: f64,
    /// Tokens that were computed.
    pub tokens: usize,
    /// The time that took.
    pub time: Duration,
    /// Of each token of the held-out examples after the step, where it was measured.
    pub held_out: Option<f64>,
}

impl StepReport {
    /// Tokens that were computed in a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

impl TrainConfig {
    /// The learning rate of a step, from 0 on.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        let warmup = (self.warmup * self.steps as f64).ceil();
        let step = step as f64;
        if step < warmup {
            return self.learning_rate * (step + 1.0) / warmup;
        }
        let done = (step - warmup) / (self.steps as f64 - warmup).max(1.0);
        self.learning_rate
            * match self.schedule {
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
                Schedule::Linear => 1.0 - done,
                Schedule::Constant => 1.0,
            }
    }
}

/// Trains the parameters of a network on examples, and tells of every step. Ends early where `observe` breaks off.
///
/// # Errors
/// [`Error::NotFinite`] at the first step whose loss or gradient is no number, and those of
/// [`Network::loss_and_gradients`].
///
/// # Panics
/// Where there are no examples.
pub fn train(
    network: &mut Network<'_>,
    parameters: &mut Parameters,
    cpu: &Cpu,
    examples: &[Example],
    held_out: &[Example],
    config: &TrainConfig,
    observe: &mut dyn FnMut(&StepReport) -> ControlFlow<()>,
) -> Result<()> {
    assert!(!examples.is_empty(), "there is something to learn from");
    let mut optimizer = AdamW::new(config.adamw, parameters.values.len());
    let mut order = Order::new(examples.len(), config.seed);
    for step in 0..config.steps {
        let start = Instant::now();
        let chosen: Vec<&Example> =
            (0..config.batch.min(examples.len())).map(|_| &examples[order.next()]).collect();
        let learnt: usize = chosen.iter().map(|example| example.targets()).sum();
        parameters.clear_gradients();
        let (mut loss, mut tokens) = (0.0, 0);
        for part in Packed::of(&chosen, config.tokens_together, 1.0 / learnt as f32) {
            loss += network.loss_and_gradients(cpu, parameters, &part.batch(), None)?;
            tokens += part.tokens.len();
        }
        let gradient_norm = parameters.clip_gradients(config.clip);
        if !gradient_norm.is_finite() {
            return Err(Error::NotFinite);
        }
        let learning_rate = config.learning_rate_at(step);
        optimizer.step(parameters, learning_rate as f32);
        let time = start.elapsed();
        let last = step + 1 == config.steps;
        let measures = last || (step + 1).is_multiple_of(config.evaluate_every.max(1));
        let held_out = match measures && !held_out.is_empty() {
            true => Some(mean_loss(network, parameters, cpu, held_out, config.tokens_together)?),
            false => None,
        };
        let step = step + 1;
        let report =
            StepReport { step, loss, gradient_norm, learning_rate, tokens, time, held_out };
        if observe(&report).is_break() {
            break;
        }
    }
    Ok(())
}

/// The loss of each token to be learnt, in nats.
///
/// # Errors
/// Those of [`Network::loss`].
pub fn mean_loss(
    network: &mut Network<'_>,
    parameters: &Parameters,
    cpu: &Cpu,
    examples: &[Example],
    tokens_together: usize,
) -> Result<f64> {
    let all: Vec<&Example> = examples.iter().collect();
    let learnt: usize = all.iter().map(|example| example.targets()).sum();
    let mut loss = 0.0;
    for part in Packed::of(&all, tokens_together, 1.0) {
        loss += network.loss(cpu, parameters, &part.batch())?;
    }
    Ok(loss / learnt.max(1) as f64)
}

impl Example {
    /// Tokens to be learnt.
    fn targets(&self) -> usize {
        self.learnt.iter().filter(|&&learnt| learnt).count()
    }
}

/// Examples side by side.
#[derive(Default)]
struct Packed {
    tokens: Vec<u32>,
    sequences: Vec<Range<usize>>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Packed {
    /// Examples in parts of up to so many tokens, with a weight for each token that is learnt.
    fn of(examples: &[&Example], most: usize, weight: f32) -> Vec<Self> {
        let mut parts: Vec<Self> = Vec::new();
        for example in examples {
            // Nothing follows the last token.
            let n = example.tokens.len() - 1;
            if parts.last().is_none_or(|part| part.tokens.len() + n > most) {
                parts.push(Self::default());
            }
            let part = parts.last_mut().expect("there is one now");
            let start = part.tokens.len();
            part.sequences.push(start..start + n);
            part.tokens.extend_from_slice(&example.tokens[..n]);
            part.targets.extend_from_slice(&example.tokens[1..]);
            let weights =
                example.learnt[1..].iter().map(|&learnt| if learnt { weight } else { 0.0 });
            part.weights.extend(weights);
        }
        parts
    }

    fn batch(&self) -> Batch<'_> {
        let Self { tokens, sequences, targets, weights } = self;
        Batch { tokens, sequences, targets, weights }
    }
}

/// Every example once, in a random order, and again in another.
struct Order {
    order: Vec<usize>,
    next: usize,
    random: Pcg64Mcg,
}

impl Order {
    fn new(count: usize, seed: u64) -> Self {
        Self { order: (0..count).collect(), next: count, random: Pcg64Mcg::seed_from_u64(seed) }
    }

    fn next(&mut self) -> usize {
        if self.next == self.order.len() {
            self.next = 0;
            for i in (1..self.order.len()).rev() {
                self.order.swap(i, self.random.random_range(0..=i));
            }
        }
        self.next += 1;
        self.order[self.next - 1]
    }
}
