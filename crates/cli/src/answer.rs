//! One answer: a prompt read with a progress bar, tokens streamed, Ctrl-C heard all the while.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Result;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{FinishReason, GenerateOptions, Generation, PREFILL_CHUNK, Session, generate};
use serde::Serialize;

use crate::args::Global;
use crate::ui::interrupt;
use crate::ui::progress::{Progress, Unit};
use crate::ui::units::rate;

/// Reads `prompt` and generates an answer; an interrupt ends it with [`FinishReason::Cancelled`].
/// `on_text` takes each piece of text.
///
/// # Errors
/// Those of the model, and the first of `on_text`.
pub(crate) fn answer(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    global: &Global,
    on_text: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> Result<Generation> {
    let cached = prompt.len() - session.reuse(prompt).len();
    let start = Instant::now();
    if !read(session, &prompt[cached..], global)? {
        return Ok(cancelled(prompt.len(), cached, start.elapsed()));
    }
    let read = start.elapsed();
    let mut failed = None;
    let mut generation = generate(session, tokenizer, prompt, options, &mut |text| {
        if let Err(error) = on_text(text) {
            failed = Some(error);
        }
        if failed.is_some() || interrupt::requested() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    generation.cached_tokens = cached;
    generation.prefill += read;
    Ok(generation)
}

/// Runs all of `tokens` but the last chunk; false where Ctrl-C came first.
fn read(session: &mut Session<'_>, tokens: &[u32], global: &Global) -> Result<bool> {
    let ahead = tokens.len().saturating_sub(1) / PREFILL_CHUNK * PREFILL_CHUNK;
    if ahead == 0 {
        return Ok(!interrupt::requested());
    }
    let bar = Progress::new(global, "reading", tokens.len() as u64, Unit::Items);
    for (i, chunk) in tokens[..ahead].chunks(PREFILL_CHUNK).enumerate() {
        if interrupt::requested() {
            return Ok(false);
        }
        session.step(chunk, &[])?;
        bar.set(((i + 1) * PREFILL_CHUNK) as u64);
    }
    Ok(true)
}

fn cancelled(prompt_tokens: usize, cached_tokens: usize, prefill: Duration) -> Generation {
    Generation {
        text: String::new(),
        tokens: Vec::new(),
        finish: FinishReason::Cancelled,
        prompt_tokens,
        cached_tokens,
        prefill,
        decode: Duration::ZERO,
    }
}

/// The figures of an answer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Stats {
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) answer_tokens: usize,
    pub(crate) prefill_seconds: f64,
    pub(crate) prefill_tokens_per_second: f64,
    pub(crate) decode_seconds: f64,
    pub(crate) decode_tokens_per_second: f64,
    pub(crate) finish: &'static str,
}

impl Stats {
    pub(crate) fn of(generation: &Generation) -> Self {
        let per_second = |tokens: usize, time: Duration| {
            if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
        };
        let read = generation.prompt_tokens - generation.cached_tokens;
        Self {
            prompt_tokens: generation.prompt_tokens,
            cached_tokens: generation.cached_tokens,
            answer_tokens: generation.tokens.len(),
            prefill_seconds: generation.prefill.as_secs_f64(),
            prefill_tokens_per_second: per_second(read, generation.prefill),
            decode_seconds: generation.decode.as_secs_f64(),
            decode_tokens_per_second: per_second(generation.tokens.len(), generation.decode),
            finish: match generation.finish {
                FinishReason::EndOfText => "end-of-text",
                FinishReason::StopString => "stop-string",
                FinishReason::MaxTokens => "max-tokens",
                FinishReason::ContextFull => "context-full",
                FinishReason::Cancelled => "cancelled",
            },
        }
    }
}

impl std::fmt::Display for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "prompt {} tokens ({} cached) at {} tokens/s, answer {} tokens at {} tokens/s, ended by {}",
            self.prompt_tokens,
            self.cached_tokens,
            rate(self.prefill_tokens_per_second),
            self.answer_tokens,
            rate(self.decode_tokens_per_second),
            self.finish,
        )
    }
}
