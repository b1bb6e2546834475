//! The loop: examples in a random order, a step for every few of them.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use bevel_kernels::Cpu;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::data::{Example, Pair};
use crate::packed::Packed;
use crate::{
    Error, Network, Noise, Optimizer, OptimizerConfig, Parameters, Result, noise, preferences,
};

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
    pub optimizer: OptimizerConfig,
    /// NEFTune's α; 0 for no noise.
    pub neftune: f32,
    /// Training ends after so many measurements of the held-out loss that found none lower; 0 for never.
    pub patience: usize,
    /// The parameters are in the end those of the lowest held-out loss.
    pub keep_best: bool,
    /// Examples are taken in their order and not in a random one.
    pub in_order: bool,
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
    /// Of each token to be learnt, or of each pair, in nats, before the step.
    pub loss: f64,
    /// Of the parameters, before clipping.
    pub gradient_norm: f64,
    /// Of the step.
    pub learning_rate: f64,
    /// Tokens that were computed.
    pub tokens: usize,
    /// The time that took.
    pub time: Duration,
    /// Of each token of the held-out examples after the step, where it was measured; of each pair where pairs are
    /// learnt.
    pub held_out: Option<f64>,
    /// Part of the step's pairs whose preferred answer had gained more than the other, where pairs are learnt.
    pub preferred: Option<f64>,
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

/// What is learnt from.
#[derive(Clone, Copy, Debug)]
pub enum Lessons<'a> {
    /// Every token of examples that is to be learnt counts the same.
    Examples(&'a [Example]),
    /// Pairs of answers (DPO).
    Pairs {
        /// The pairs.
        pairs: &'a [Pair],
        /// β: how far the model may go from where it began; the smaller, the farther.
        beta: f64,
    },
}

impl Lessons<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Examples(examples) => examples.len(),
            Self::Pairs { pairs, .. } => pairs.len(),
        }
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of each, from the longest to the shortest.
    fn lengths(&self) -> Vec<usize> {
        let of = |example: &Example| example.tokens.len() - 1;
        let mut lengths: Vec<usize> = match self {
            Self::Examples(examples) => examples.iter().map(of).collect(),
            Self::Pairs { pairs, .. } => {
                pairs.iter().map(|pair| of(&pair.chosen) + of(&pair.rejected)).collect()
            }
        };
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths
    }

    /// The most tokens of a step of so many that are computed together, where at most `most` are to be, or the longest one
    /// alone.
    pub fn tokens_together(&self, batch: usize, most: usize) -> usize {
        let lengths = self.lengths();
        let longest = lengths.first().copied().unwrap_or(0);
        let all: usize = lengths.iter().take(batch).sum();
        // Of examples that are all as long, as many as fit.
        let whole =
            if lengths.last() == Some(&longest) { most - most % longest.max(1) } else { most };
        all.min(whole.max(longest))
    }

    /// −ln p of pairs as the model is before training.
    fn reference(
        &self,
        network: &mut Network<'_>,
        parameters: &Parameters,
        cpu: &Cpu,
        together: usize,
    ) -> Result<Vec<[f64; 2]>> {
        match self {
            Self::Examples(_) => Ok(Vec::new()),
            Self::Pairs { pairs, .. } => {
                let pairs: Vec<&Pair> = pairs.iter().collect();
                preferences::losses(network, parameters, cpu, &pairs, together)
            }
        }
    }
}

/// A run of training.
#[derive(Debug)]
pub struct Trainer<'a> {
    config: TrainConfig,
    lessons: Lessons<'a>,
    held_out: Lessons<'a>,
    /// −ln p before training, of pairs.
    reference: [Vec<[f64; 2]>; 2],
    pub(crate) optimizer: Optimizer,
    order: Order,
    /// Steps done.
    pub(crate) step: usize,
    pub(crate) best: Option<Best>,
    /// Measurements since the best one.
    pub(crate) worse: usize,
}

/// The lowest held-out loss so far, and the parameters then, where they are kept.
#[derive(Debug)]
pub(crate) struct Best {
    pub(crate) step: usize,
    pub(crate) loss: f64,
    pub(crate) values: Vec<f32>,
}

impl<'a> Trainer<'a> {
    /// A run over what is to be learnt, measured by what is held out. The optimizer's state lies in memory, or in files
    /// of the directory `paged`.
    ///
    /// # Errors
    /// Those of [`Optimizer::paged`] and, where pairs are learnt, of [`Network::loss`].
    ///
    /// # Panics
    /// Where there is nothing to be learnt.
    pub fn new(
        network: &mut Network<'_>,
        parameters: &Parameters,
        cpu: &Cpu,
        lessons: Lessons<'a>,
        held_out: Lessons<'a>,
        config: TrainConfig,
        paged: Option<&Path>,
    ) -> Result<Self> {
        assert!(!lessons.is_empty(), "there is something to learn from");
        let values = parameters.values.len();
        let optimizer = match paged {
            None => Optimizer::new(config.optimizer, values),
            Some(directory) => Optimizer::paged(config.optimizer, values, directory)?,
        };
        // What is held out is computed in parts as large as those that are learnt.
        let together = lessons.tokens_together(config.batch, config.tokens_together);
        let config = TrainConfig { tokens_together: together, ..config };
        let reference = [
            lessons.reference(network, parameters, cpu, together)?,
            held_out.reference(network, parameters, cpu, together)?,
        ];
        let order = Order::new(lessons.len(), config.seed, config.in_order);
        Ok(Self {
            config,
            lessons,
            held_out,
            reference,
            optimizer,
            order,
            step: 0,
            best: None,
            worse: 0,
        })
    }

    /// The loss of what is held out: of each token, or of each pair. `None` where nothing is.
    ///
    /// # Errors
    /// Those of [`Network::loss`].
    pub fn held_out_loss(
        &self,
        network: &mut Network<'_>,
        parameters: &Parameters,
        cpu: &Cpu,
    ) -> Result<Option<f64>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let together = self.config.tokens_together;
        let loss = match self.held_out {
            Lessons::Examples(examples) => mean_loss(network, parameters, cpu, examples, together)?,
            Lessons::Pairs { pairs, beta } => {
                let pairs: Vec<&Pair> = pairs.iter().collect();
                let now = preferences::losses(network, parameters, cpu, &pairs, together)?;
                preferences::loss(&now, &self.reference[1], beta).loss / pairs.len() as f64
            }
        };
        Ok(Some(loss))
    }

    /// Whether there is nothing left to do: all steps were done, or the held-out loss does not fall any more.
    pub fn is_done(&self) -> bool {
        let given_up = self.config.patience > 0 && self.worse >= self.config.patience;
        self.step >= self.config.steps || given_up
    }

    /// Steps done.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// Does one step.
    ///
    /// # Errors
    /// [`Error::BadStep`] where the loss or a gradient is no number, and those of [`Network::loss_and_gradients`].
    pub fn step(
        &mut self,
        network: &mut Network<'_>,
        parameters: &mut Parameters,
        cpu: &Cpu,
    ) -> Result<StepReport> {
        let start = Instant::now();
        let batch = self.config.batch.min(self.lessons.len());
        let chosen: Vec<usize> = (0..batch).map(|_| self.order.next()).collect();
        let bad = |step: usize| Error::BadStep {
            step: step + 1,
            examples: chosen.iter().map(|&index| index + 1).collect(),
        };
        parameters.clear_gradients();
        let (loss, tokens, preferred) =
            self.gradients(network, parameters, cpu, &chosen).map_err(|error| match error {
                Error::NotFinite => bad(self.step),
                error => error,
            })?;
        let gradient_norm = parameters.clip_gradients(self.config.clip);
        if !(gradient_norm.is_finite() && loss.is_finite()) {
            return Err(bad(self.step));
        }
        let learning_rate = self.config.learning_rate_at(self.step);
        self.optimizer.step(cpu, parameters, learning_rate as f32);
        let time = start.elapsed();
        self.step += 1;
        let step = self.step;
        let measures =
            step == self.config.steps || step.is_multiple_of(self.config.evaluate_every.max(1));
        let held_out = match measures {
            true => self.held_out_loss(network, parameters, cpu)?,
            false => None,
        };
        if let Some(loss) = held_out {
            self.worse += 1;
            if self.best.as_ref().is_none_or(|best| loss < best.loss) {
                self.worse = 0;
                let values =
                    if self.config.keep_best { parameters.values.clone() } else { Vec::new() };
                self.best = Some(Best { step, loss, values });
            }
        }
        Ok(StepReport {
            step,
            loss,
            gradient_norm,
            learning_rate,
            tokens,
            time,
            held_out,
            preferred,
        })
    }

    fn gradients(
        &self,
        network: &mut Network<'_>,
        parameters: &mut Parameters,
        cpu: &Cpu,
        chosen: &[usize],
    ) -> Result<(f64, usize, Option<f64>)> {
        let TrainConfig { tokens_together: together, seed, neftune, .. } = self.config;
        let of_step = noise::mix(seed, self.step as u64);
        let noise = |part: usize| Some(Noise { seed: noise::mix(of_step, part as u64), neftune });
        match self.lessons {
            Lessons::Examples(examples) => {
                let chosen: Vec<&Example> = chosen.iter().map(|&index| &examples[index]).collect();
                let learnt: usize = chosen.iter().map(|example| example.targets()).sum();
                let groups: Vec<&[&Example]> = chosen.chunks(1).collect();
                let (mut loss, mut tokens) = (0.0, 0);
                let parts = Packed::of(&groups, together, 1.0 / learnt as f32);
                for (index, part) in parts.iter().enumerate() {
                    let (batch, noise) = (part.batch(), noise(index));
                    loss += network.loss_and_gradients(cpu, parameters, &batch, noise)?;
                    tokens += part.tokens.len();
                }
                Ok((loss, tokens, None))
            }
            Lessons::Pairs { pairs, beta } => {
                let reference: Vec<[f64; 2]> =
                    chosen.iter().map(|&index| self.reference[0][index]).collect();
                let chosen: Vec<&Pair> = chosen.iter().map(|&index| &pairs[index]).collect();
                let found = preferences::gradients(
                    network, parameters, cpu, &chosen, &reference, beta, together, &noise,
                )?;
                let right = found.right as f64 / chosen.len() as f64;
                Ok((found.loss, found.tokens, Some(right)))
            }
        }
    }

    /// Ends a run: where they are kept, the parameters become those of the lowest held-out loss, and the step at which
    /// that was is returned.
    pub fn finish(self, parameters: &mut Parameters) -> Option<usize> {
        let best = self.best.filter(|best| !best.values.is_empty() && best.step < self.step)?;
        parameters.values.copy_from_slice(&best.values);
        Some(best.step)
    }

    /// Goes through the order of examples without learning from them, up to `step`.
    pub(crate) fn skip_to(&mut self, step: usize) {
        let batch = self.config.batch.min(self.lessons.len());
        self.order = Order::new(self.lessons.len(), self.config.seed, self.config.in_order);
        for _ in 0..step * batch {
            self.order.next();
        }
        self.step = step;
    }
}

/// Trains the parameters of a network on examples, and tells of every step. Ends early where `observe` breaks off.
///
/// # Errors
/// Those of [`Trainer::new`] and [`Trainer::step`].
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
    let (lessons, held_out) = (Lessons::Examples(examples), Lessons::Examples(held_out));
    let mut trainer =
        Trainer::new(network, parameters, cpu, lessons, held_out, config.clone(), None)?;
    while !trainer.is_done() {
        let report = trainer.step(network, parameters, cpu)?;
        if observe(&report).is_break() {
            break;
        }
    }
    trainer.finish(parameters);
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
    let groups: Vec<&[&Example]> = all.chunks(1).collect();
    let mut loss = 0.0;
    for part in Packed::of(&groups, tokens_together, 1.0) {
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

/// Every example once, in a random order, and again in another.
#[derive(Debug)]
struct Order {
    order: Vec<usize>,
    next: usize,
    random: Option<Pcg64Mcg>,
}

impl Order {
    fn new(count: usize, seed: u64, in_order: bool) -> Self {
        let random = (!in_order).then(|| Pcg64Mcg::seed_from_u64(seed));
        Self { order: (0..count).collect(), next: count, random }
    }

    fn next(&mut self) -> usize {
        if self.next == self.order.len() {
            self.next = 0;
            if let Some(random) = &mut self.random {
                for i in (1..self.order.len()).rev() {
                    self.order.swap(i, random.random_range(0..=i));
                }
            }
        }
        self.next += 1;
        self.order[self.next - 1]
    }
}
