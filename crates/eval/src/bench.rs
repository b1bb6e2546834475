//! Speed: tokens per second while a prompt is read (prefill) and while an answer is written
//! (decode).
//!
//! Token ids are pseudo-random, and choosing them is not measured: the time of a step does not depend
//! on what is in it. Each repetition starts from the same number of tokens in the cache.

use std::time::Instant;

use bevel_kernels::{Cpu, KvType, limits};
use bevel_model::{Model, Session};
use serde::Serialize;

use crate::{Error, Result, Spread};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct BenchConfig {
    /// Tokens of the prompt; 0 measures no prefill.
    pub prompt: usize,
    /// Tokens of the answer; 0 measures no decoding.
    pub decode: usize,
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
    /// Writing an answer, one sequence.
    pub decode: Option<Series>,
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
        let decode_bytes = bench.decode.as_ref().map(|decode| {
            let tokens = bench.depth as f64 + decode.tokens as f64 / 2.0;
            let cached = tokens * bench.kv_bytes_per_token as f64;
            decode.spread.median * (cost.bytes + cached)
        });
        let seconds = 2.0 * cost.byte_products / byte_operations
            + 2.0 * cost.float_products / float_operations;
        Self {
            read_bandwidth,
            byte_operations,
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
        let mut session = Session::new(model, cpu, context, self.kv_type)?;
        let tokens = tokens(needed, model.config().vocab_size);
        if self.depth > 0 {
            session.feed(&tokens[..self.depth])?;
        }
        let mut done = 0;
        let total =
            (self.repetitions + 1) * [self.prompt, self.decode].iter().filter(|&&n| n > 0).count();
        let mut series =
            |what, count: usize, run: &mut dyn FnMut(&mut Session<'_>) -> Result<()>| {
                if count == 0 {
                    return Ok(None);
                }
                let mut samples = Vec::with_capacity(self.repetitions);
                for repetition in 0..=self.repetitions {
                    session.truncate(self.depth);
                    let start = Instant::now();
                    run(&mut session)?;
                    let seconds = start.elapsed().as_secs_f64().max(1e-9);
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
        let rest = &tokens[self.depth..];
        let prefill = series("prefill", self.prompt, &mut |session| {
            session.feed(&rest[..self.prompt])?;
            Ok(())
        })?;
        let decode = series("decode", self.decode, &mut |session| {
            for token in &rest[..self.decode] {
                session.step(std::slice::from_ref(token), &[0])?;
            }
            Ok(())
        })?;
        let kv_bytes_per_token =
            bevel_model::KvCache::bytes_per_token(model.config(), self.kv_type);
        Ok(Bench { prefill, decode, depth: self.depth, kv_bytes_per_token })
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
