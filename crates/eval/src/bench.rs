//! Speed: tokens per second while a prompt is read (prefill) and while an answer is written
//! (decode).
//!
//! Token ids are pseudo-random, and choosing them is not measured: the time of a step does not depend
//! on what is in it. Each repetition starts from the same number of tokens in the cache.

use std::time::{Duration, Instant};

use bevel_kernels::{BLOCK_TOKENS, Cpu, KvType, limits};
use bevel_model::{Batch, KvCache, Model, PREFILL_CHUNK, Sequence, Session, State};
use serde::Serialize;

use crate::{Error, Result, Spread};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct BenchConfig {
    /// Tokens of the prompt; 0 measures no prefill.
    pub prompt: usize,
    /// Tokens of each answer; 0 measures no decoding.
    pub decode: usize,
    /// Sequences that are decoded together, a token of each in a step; at least 1.
    pub sequences: usize,
    /// Measurements of each; a warm-up run before them does not count.
    pub repetitions: usize,
    /// Tokens in the cache before each measurement.
    pub depth: usize,
    /// Tokens the cache has room for; `None`: as many as are needed.
    pub context: Option<usize>,
    /// Storage of keys and values.
    pub kv_type: KvType,
}

/// A model's speed.
#[derive(Clone, Debug, Serialize)]
pub struct Bench {
    /// Reading a prompt.
    pub prefill: Option<Series>,
    /// Writing answers: tokens of all sequences together.
    pub decode: Option<Series>,
    /// Sequences that were decoded together.
    pub sequences: usize,
    /// Tokens in the cache before each measurement.
    pub depth: usize,
    /// Bytes of keys and values per token.
    pub kv_bytes_per_token: usize,
}

/// What a machine can do at most, in a second on all threads: measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Bytes read from memory.
    pub read_bandwidth: f64,
    /// Multiplications and additions of 8-bit integers.
    pub byte_operations: f64,
    /// Multiplications and additions of bf16 numbers, where the model has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16_operations: Option<f64>,
    /// Multiplications and additions of single-precision numbers.
    pub float_operations: f64,
    /// Bytes of weights and of keys and values that the decoding measured here read in a second.
    pub decode_bytes: Option<f64>,
    /// They as a part of the bandwidth; above 1 where a cache holds them.
    pub decode_part: Option<f64>,
    /// The time in which the linear layers' products could be computed, as a part of prefill's.
    pub prefill_part: Option<f64>,
}

impl Limits {
    /// Measures the machine, which takes 256 MiB of memory, and holds a model's speed against it.
    pub fn measure(bench: &Bench, model: &Model, cpu: &Cpu) -> Self {
        let read_bandwidth = limits::read_bandwidth(cpu);
        let byte_operations = limits::byte_peak(cpu);
        let float_operations = limits::float_peak(cpu);
        let cost = model.weights().step_cost(model.config());
        let bf16_operations = (cost.bf16_products > 0.0).then(|| limits::bf16_peak(cpu));
        let decode_bytes = bench.decode.as_ref().map(|decode| {
            let sequences = bench.sequences as f64;
            let tokens = bench.depth as f64 + decode.tokens as f64 / sequences / 2.0;
            let cached = sequences * tokens * bench.kv_bytes_per_token as f64;
            let steps = decode.spread.median / sequences;
            steps * (cost.bytes + cached)
        });
        let seconds = 2.0 * cost.byte_products / byte_operations
            + bf16_operations.map_or(0.0, |operations| 2.0 * cost.bf16_products / operations)
            + 2.0 * cost.float_products / float_operations;
        Self {
            read_bandwidth,
            byte_operations,
            bf16_operations,
            float_operations,
            decode_bytes,
            decode_part: decode_bytes.map(|bytes| bytes / read_bandwidth),
            prefill_part: bench.prefill.as_ref().map(|prefill| prefill.spread.median * seconds),
        }
    }
}

/// Repeated measurements of one thing.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// Tokens of each measurement.
    pub tokens: usize,
    /// Tokens per second of each measurement, in order.
    pub samples: Vec<f64>,
    /// Where they lie.
    #[serde(flatten)]
    pub spread: Spread,
}

/// How far a measurement is.
#[derive(Clone, Copy, Debug)]
pub struct BenchStep {
    /// `prefill` or `decode`.
    pub what: &'static str,
    /// Runs done, the warm-up counted.
    pub done: usize,
    /// Runs in all.
    pub total: usize,
}

impl BenchConfig {
    /// Measures `model`. `progress` is called after every run.
    ///
    /// # Errors
    /// [`Error::Windows`] where `context` does not suffice, and those of the model.
    pub fn run(
        &self,
        model: &Model,
        cpu: &Cpu,
        progress: &mut dyn FnMut(BenchStep),
    ) -> Result<Bench> {
        let needed = self.depth + self.prompt.max(self.decode);
        let context = self.context.unwrap_or(needed).max(1);
        if needed > context {
            return Err(Error::Windows(format!(
                "a context of {context} tokens is too small: depth and the longer of prompt and answer take {needed}"
            )));
        }
        let tokens = tokens(needed, model.config().vocab_size);
        let (past, rest) = tokens.split_at(self.depth);
        let mut done = 0;
        let total =
            (self.repetitions + 1) * [self.prompt, self.decode].iter().filter(|&&n| n > 0).count();
        let mut series = |what, count: usize, run: &mut dyn FnMut() -> Result<Duration>| {
            if count == 0 {
                return Ok(None);
            }
            let mut samples = Vec::with_capacity(self.repetitions);
            for repetition in 0..=self.repetitions {
                let seconds = run()?.as_secs_f64().max(1e-9);
                if repetition > 0 {
                    samples.push(count as f64 / seconds);
                }
                done += 1;
                progress(BenchStep { what, done, total });
            }
            let series =
                Spread::of(&samples).map(|spread| Series { tokens: count, samples, spread });
            Ok::<_, Error>(series)
        };
        let mut prefill = None;
        if self.prompt > 0 {
            let mut session = Session::new(model, cpu, context, self.kv_type)?;
            if !past.is_empty() {
                session.feed(past)?;
            }
            prefill = series("prefill", self.prompt, &mut || {
                session.truncate(self.depth);
                let start = Instant::now();
                session.feed(&rest[..self.prompt])?;
                Ok(start.elapsed())
            })?;
        }
        let mut decode = None;
        if self.decode > 0 {
            let mut group = Group::new(model, cpu, self.sequences, context, self.kv_type)?;
            for chunk in past.chunks(PREFILL_CHUNK) {
                group.prefill(chunk)?;
            }
            decode = series("decode", self.sequences * self.decode, &mut || {
                group.truncate(self.depth);
                let start = Instant::now();
                for &token in &rest[..self.decode] {
                    group.step(token)?;
                }
                Ok(start.elapsed())
            })?;
        }
        let kv_bytes_per_token =
            bevel_model::KvCache::bytes_per_token(model.config(), self.kv_type);
        Ok(Bench {
            prefill,
            decode,
            sequences: self.sequences,
            depth: self.depth,
            kv_bytes_per_token,
        })
    }
}

/// Sequences that advance together.
struct Group<'m> {
    model: &'m Model,
    cpu: &'m Cpu,
    cache: KvCache,
    sequences: Vec<Sequence>,
    state: State,
    /// Tokens of a step, and whose logits are wanted.
    tokens: Vec<u32>,
    outputs: Vec<usize>,
}

impl<'m> Group<'m> {
    fn new(
        model: &'m Model,
        cpu: &'m Cpu,
        count: usize,
        context: usize,
        kv_type: KvType,
    ) -> Result<Self> {
        let room = context.next_multiple_of(BLOCK_TOKENS).saturating_mul(count);
        Ok(Self {
            model,
            cpu,
            cache: KvCache::new(model.config(), kv_type, room)?,
            sequences: (0..count).map(|_| Sequence::with_capacity(context)).collect(),
            state: State::new(model.config(), context),
            tokens: Vec::new(),
            outputs: (0..count).collect(),
        })
    }

    /// Runs the same tokens in every sequence.
    fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        for sequence in &mut self.sequences {
            self.cache.extend(sequence, tokens.len())?;
            let parts = [sequence.part(tokens.len())];
            let batch = Batch { tokens, parts: &parts, outputs: &[] };
            self.model.forward(self.cpu, &batch, self.cache.pool(), &mut self.state)?;
        }
        Ok(())
    }

    /// Runs a token in every sequence, logits wanted of each.
    fn step(&mut self, token: u32) -> Result<()> {
        for sequence in &mut self.sequences {
            self.cache.extend(sequence, 1)?;
        }
        self.tokens.clear();
        self.tokens.resize(self.sequences.len(), token);
        let parts: Vec<_> = self.sequences.iter().map(|sequence| sequence.part(1)).collect();
        let batch = Batch { tokens: &self.tokens, parts: &parts, outputs: &self.outputs };
        self.model.forward(self.cpu, &batch, self.cache.pool(), &mut self.state)?;
        Ok(())
    }

    /// Goes back to the first `len` tokens of each.
    fn truncate(&mut self, len: usize) {
        for sequence in &mut self.sequences {
            self.cache.truncate(sequence, len);
        }
    }
}

/// Ids spread over the vocabulary, the same ones each time.
fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    // The golden ratio's multiples modulo 1 fill the interval evenly (Weyl's sequence).
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    (1..=count as u64)
        .map(|i| ((u128::from(i.wrapping_mul(GOLDEN)) * vocab as u128) >> 64) as u32)
        .collect()
}
