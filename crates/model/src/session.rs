//! One conversation with a model: its cache, and text generation on top of it.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bevel_kernels::{Cpu, KvType};

use crate::tokenizer::Tokenizer;
use crate::{
    Batch, Choice, Error, KvCache, Model, Part, Result, Sampler, SamplerConfig, SamplerScratch,
    ScaledAdapter, Sequence, State, StopText,
};

/// Tokens that go through the model at once while a prompt is read: enough to reuse each weight many
/// times, few enough that the buffers stay small.
pub const PREFILL_CHUNK: usize = 512;

/// A single sequence that grows token by token.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    cpu: &'m Cpu,
    cache: KvCache,
    sequence: Sequence,
    state: State,
    tokens: Vec<u32>,
    context: usize,
    adapters: Vec<ScaledAdapter>,
}

impl<'m> Session<'m> {
    /// A session that can hold `context` tokens.
    ///
    /// # Errors
    /// Those of [`KvCache::new`].
    pub fn new(model: &'m Model, cpu: &'m Cpu, context: usize, kv_type: KvType) -> Result<Self> {
        Ok(Self {
            model,
            cpu,
            cache: KvCache::new(model.config(), kv_type, context)?,
            sequence: Sequence::with_capacity(context),
            state: State::new(model.config(), context),
            tokens: Vec::with_capacity(context),
            context,
            adapters: Vec::new(),
        })
    }

    /// With adapters of its own, beside those that the model has for all.
    pub fn with_adapters(self, adapters: Vec<ScaledAdapter>) -> Self {
        Self { adapters, ..self }
    }

    /// Tokens that went through the model.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Runs `tokens` after those before and returns the logits after the last one, `[vocab]`.
    ///
    /// # Errors
    /// Those of [`Session::step`]. Where they do not all fit, none is run.
    ///
    /// # Panics
    /// Where `tokens` is empty.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        assert!(!tokens.is_empty(), "logits need a token");
        self.check_room(tokens.len())?;
        let chunks = tokens.chunks(PREFILL_CHUNK);
        let last = chunks.len() - 1;
        for (i, chunk) in chunks.enumerate() {
            if i < last {
                self.step(chunk, &[])?;
            }
        }
        let start = last * PREFILL_CHUNK;
        let chunk = &tokens[start..];
        self.step(chunk, &[chunk.len() - 1])
    }

    /// Runs `tokens` in one pass and returns the logits after each of `outputs` (indices into
    /// `tokens`), `[outputs, vocab]`.
    ///
    /// # Errors
    /// [`Error::ContextFull`], and those of [`Model::forward`]. The session is then as before.
    pub fn step(&mut self, tokens: &[u32], outputs: &[usize]) -> Result<&[f32]> {
        let before = self.sequence.len();
        self.check_room(tokens.len())?;
        self.cache.extend(&mut self.sequence, tokens.len())?;
        let parts = [Part { adapters: &self.adapters, ..self.sequence.part(tokens.len()) }];
        let batch = Batch { tokens, parts: &parts, outputs };
        match self.model.forward(self.cpu, &batch, self.cache.pool(), &mut self.state) {
            Ok(_) => {
                self.tokens.extend_from_slice(tokens);
                Ok(self.state.logits())
            }
            Err(error) => {
                self.cache.truncate(&mut self.sequence, before);
                Err(error)
            }
        }
    }

    fn check_room(&self, count: usize) -> Result<()> {
        let (needed, available) = (self.sequence.len() + count, self.context);
        if needed > available {
            return Err(Error::ContextFull { needed, available });
        }
        Ok(())
    }

    /// Goes back to the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.truncate(&mut self.sequence, len);
    }

    /// Goes back to what the session shares with `prompt` and returns the rest of it: at least its
    /// last token, whose logits are wanted.
    pub fn reuse<'p>(&mut self, prompt: &'p [u32]) -> &'p [u32] {
        let same = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let keep = same.min(prompt.len().saturating_sub(1));
        self.truncate(keep);
        &prompt[keep..]
    }
}

/// When to stop and how to choose tokens.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// At most so many tokens; `None`: until the context is full.
    pub max_tokens: Option<usize>,
    /// Text that ends the answer, wherever token boundaries fall. It is not part of the answer.
    pub stop: Vec<String>,
    /// Goes on past tokens that end a text.
    pub ignore_eos: bool,
    /// The sampler.
    pub sampler: SamplerConfig,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it.
    EndOfText,
    /// A stop string appeared.
    StopString,
    /// `max_tokens` was reached.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// The caller broke off.
    Cancelled,
}

/// A finished answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its text, stop strings cut off.
    pub text: String,
    /// Its tokens, an end-of-text token not counted.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens of the prompt, and how many of them were in the cache already.
    pub prompt_tokens: usize,
    /// See `prompt_tokens`.
    pub cached_tokens: usize,
    /// Time from the prompt to the first logits.
    pub prefill: Duration,
    /// Time for the tokens after that.
    pub decode: Duration,
}

/// Reads `prompt`, reusing what the session already holds of it, and generates an answer.
/// `on_text` is called with each piece of text as soon as it is certain; it ends the answer by
/// [`ControlFlow::Break`].
///
/// # Errors
/// [`Error::EmptyPrompt`], and those of [`Session::step`]; a context that fills up during the answer
/// ends it without an error.
pub fn generate(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation> {
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let mut sampler = Sampler::new(options.sampler.clone());
    let rest = session.reuse(prompt);
    let cached_tokens = prompt.len() - rest.len();
    let start = Instant::now();
    let mut scratch = SamplerScratch::default();
    let cpu = session.cpu;
    let mut choose = |logits: &[f32], history: &[u32]| {
        let choice = Choice { logits, history, prompt: prompt.len(), allowed: None };
        sampler.sample(cpu, &choice, &mut scratch)
    };
    let mut token = choose(session.feed(rest)?, prompt);
    let prefill = start.elapsed();

    let start = Instant::now();
    let mut decoder = tokenizer.decoder_continuing().skip_special(true);
    let mut text = StopText::new(options.stop.clone());
    let mut tokens: Vec<u32> = Vec::new();
    let mut history = prompt.to_vec();
    let enough = |count: usize| options.max_tokens.is_some_and(|max| count >= max);
    let mut finish = loop {
        if enough(0) {
            break FinishReason::MaxTokens;
        }
        if tokenizer.end_of_generation().contains(&token) && !options.ignore_eos {
            break FinishReason::EndOfText;
        }
        tokens.push(token);
        history.push(token);
        let stopped = text.push(&decoder.push(token)).is_some();
        if on_text(text.ready()).is_break() {
            break FinishReason::Cancelled;
        }
        if stopped {
            break FinishReason::StopString;
        }
        if enough(tokens.len()) {
            break FinishReason::MaxTokens;
        }
        if session.tokens().len() >= session.context() {
            break FinishReason::ContextFull;
        }
        token = choose(session.step(&[token], &[0])?, &history);
    };
    if finish != FinishReason::StopString {
        if text.push(&decoder.finish()).is_some() {
            finish = FinishReason::StopString;
        } else {
            text.end();
        }
        let _ = on_text(text.ready());
    }
    Ok(Generation {
        text: text.finished().to_owned(),
        tokens,
        finish,
        prompt_tokens: prompt.len(),
        cached_tokens,
        prefill,
        decode: start.elapsed(),
    })
}
