use std::borrow::Cow;
use std::sync::Arc;

use bevel_kernels::Cpu;
use bevel_model::tokenizer::{StreamDecoder, Tokenizer};
use bevel_model::{Choice, Sampler, SamplerConfig, SamplerScratch, StopText, TokenLogprobs};

use crate::engine::{Beam, Candidate};
use crate::grammar::Constraint;
use crate::request::{EndReason, OutputToken, Request};

/// One answer as it grows: what chooses its tokens, and what makes text of them.
#[derive(Clone, Debug)]
pub(crate) struct Stream<'m> {
    pub(crate) request: Arc<Request>,
    /// Tokens of the prompt found in the cache when it was first admitted.
    pub(crate) cached_tokens: Option<usize>,
    pub(crate) answer_tokens: usize,
    /// What the next token has to follow. Elsewhere while it is being prepared.
    pub(crate) constraint: Option<Constraint>,
    /// Logits of the next token, while the constraint is not there yet: `[vocab]`.
    logits: Option<Vec<f32>>,
    /// Tokens of the prompt, those counted from the second one on, that are scored.
    pub(crate) scored: usize,
    /// How likely they were, until somebody was told.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    /// Where it is one of the beams of a search.
    pub(crate) beam: Beam,
    /// Tokens that end texts.
    ends: usize,
    /// Sum of what the prompt's tokens gave, where that is wanted: `[dim]`.
    pooled: Vec<f32>,
    sampler: Sampler,
    decoder: StreamDecoder<'m>,
    text: StopText,
}

/// What follows an answer so far.
pub(crate) enum Chosen {
    Token(OutputToken),
    /// Of a beam, the likeliest first.
    Candidates(Vec<Candidate>),
    /// The logits are no numbers.
    NotFinite,
}

/// What a step did to an answer.
pub(crate) struct Step {
    pub(crate) text: String,
    pub(crate) token: Option<OutputToken>,
    pub(crate) end: Option<EndReason>,
}

impl<'m> Stream<'m> {
    pub(crate) fn new(request: Arc<Request>, index: u32, tokenizer: &'m Tokenizer) -> Self {
        let config = &request.sampler;
        let seed = config.seed.wrapping_add(index.into());
        Self {
            sampler: Sampler::new(SamplerConfig { seed, ..config.clone() }),
            decoder: tokenizer.decoder_continuing().skip_special(!request.keep_special),
            text: StopText::new(request.stop.clone()),
            cached_tokens: None,
            answer_tokens: 0,
            constraint: request.constraint.clone(),
            logits: None,
            scored: 0,
            prompt_logprobs: Vec::new(),
            beam: Beam::default(),
            ends: tokenizer.end_of_generation().len(),
            pooled: Vec::new(),
            request,
        }
    }

    /// The `index`-th answer from its beginning, to the same as this one answers.
    pub(crate) fn again(&mut self, index: u32, tokenizer: &'m Tokenizer) -> Self {
        Self {
            cached_tokens: self.cached_tokens,
            prompt_logprobs: std::mem::take(&mut self.prompt_logprobs),
            ..Self::new(self.request.clone(), index, tokenizer)
        }
    }

    /// The logits to choose from: those of this step, or those kept from a step when the constraint was not
    /// there. Where it still is not, they are kept.
    pub(crate) fn choosable<'l>(&mut self, logits: Option<&'l [f32]>) -> Option<Cow<'l, [f32]>> {
        if self.request.constraint.is_some() && self.constraint.is_none() {
            self.logits = logits.map(<[f32]>::to_vec).or(self.logits.take());
            return None;
        }
        logits.map(Cow::Borrowed).or_else(|| self.logits.take().map(Cow::Owned))
    }

    /// Chooses what follows `history`, prompt and answer, given `logits`, `[vocab]`.
    pub(crate) fn choose(
        &mut self,
        cpu: &Cpu,
        logits: &[f32],
        history: &[u32],
        scratch: &mut SamplerScratch,
    ) -> Chosen {
        if !logits.iter().all(|l| l.is_finite()) {
            return Chosen::NotFinite;
        }
        let allowed = self.constraint.as_ref().map(Constraint::allowed);
        let choice = Choice { logits, history, prompt: self.request.prompt.len(), allowed };
        let logprobs =
            |id| self.request.logprobs.map(|top| TokenLogprobs::of(cpu, logits, id, top));
        match self.request.beams {
            None => {
                let id = self.sampler.sample(cpu, &choice, scratch);
                Chosen::Token(OutputToken { id, logprobs: logprobs(id) })
            }
            // Some end their answers, and as many beams are wanted besides.
            Some(beams) => {
                let width = beams.width as usize;
                let count = width + width.max(self.ends);
                let likeliest = self.sampler.likeliest(cpu, &choice, count, scratch);
                let candidate = |(id, logprob)| {
                    let token = OutputToken { id, logprobs: logprobs(id) };
                    Candidate { token, logprob }
                };
                Chosen::Candidates(likeliest.into_iter().map(candidate).collect())
            }
        }
    }

    /// Adds a token. `room` is false where no further one fits.
    pub(crate) fn push(
        &mut self,
        token: OutputToken,
        end_of_generation: &[u32],
        room: bool,
    ) -> Step {
        let id = token.id;
        if self.request.max_tokens == Some(0) {
            return self.finish(EndReason::MaxTokens, None);
        }
        // A grammar knows where its text ends.
        let ends = !self.request.ignore_eos || self.request.constraint.is_some();
        if ends && end_of_generation.contains(&id) {
            return self.finish(EndReason::EndOfText(id), None);
        }
        let complete = match self.constraint.as_mut().map(|constraint| constraint.advance(id)) {
            None => false,
            Some(Ok(complete)) => complete,
            Some(Err(problem)) => return self.finish(EndReason::Grammar(problem), None),
        };
        self.answer_tokens += 1;
        let piece = self.decoder.push(id);
        if let Some(stop) = self.text.push(&piece) {
            let reason = EndReason::StopString(stop.to_owned());
            return Step {
                text: self.text.ready().to_owned(),
                token: Some(token),
                end: Some(reason),
            };
        }
        if complete {
            return self.finish(EndReason::Complete, Some(token));
        }
        if self.request.max_tokens.is_some_and(|most| self.answer_tokens >= most) {
            return self.finish(EndReason::MaxTokens, Some(token));
        }
        if !room {
            return self.finish(EndReason::ContextFull, Some(token));
        }
        Step { text: self.text.ready().to_owned(), token: Some(token), end: None }
    }

    /// Ends the answer: what was held back belongs to it now.
    pub(crate) fn finish(&mut self, reason: EndReason, token: Option<OutputToken>) -> Step {
        let rest = self.decoder.finish();
        let reason = match self.text.push(&rest) {
            Some(stop) => EndReason::StopString(stop.to_owned()),
            None => {
                self.text.end();
                reason
            }
        };
        Step { text: self.text.ready().to_owned(), token, end: Some(reason) }
    }

    /// Adds what some of the prompt's tokens gave, `[tokens, dim]`, from the beginning where `first`.
    pub(crate) fn pool(&mut self, hidden: &[f32], dim: usize, first: bool) {
        if first || self.pooled.is_empty() {
            self.pooled.clear();
            self.pooled.resize(dim, 0.0);
        }
        for row in hidden.chunks_exact(dim) {
            self.pooled.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    }

    /// The embedding: what was added up, with length 1. `None` where it has none.
    pub(crate) fn embedding(&self) -> Option<Vec<f32>> {
        let length = self.pooled.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let scaled = || self.pooled.iter().map(|&x| (f64::from(x) / length) as f32).collect();
        (length.is_finite() && length > 0.0).then(scaled)
    }
}
