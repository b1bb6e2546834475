use std::time::Instant;

use bevel_model::{SamplerConfig, ScaledAdapter, TokenLogprobs};

use crate::blocks::Root;
use crate::grammar::Constraint;

/// What a client wants.
#[derive(Clone, Debug)]
pub struct Request {
    /// The tokens to go on from.
    pub prompt: Vec<u32>,
    /// Answers to give. They share the prompt; the `i`-th one's random numbers start at the sampler's seed
    /// plus `i`.
    pub answers: u32,
    /// What is added to the model for it: adapters of this model.
    pub adapters: Vec<ScaledAdapter>,
    /// How tokens are chosen.
    pub sampler: SamplerConfig,
    /// At most so many tokens each; `None`: until the context is full.
    pub max_tokens: Option<usize>,
    /// Text that ends an answer, wherever token boundaries fall, and is not part of it.
    pub stop: Vec<String>,
    /// Goes on past tokens that end a text.
    pub ignore_eos: bool,
    /// Special tokens are part of the text.
    pub keep_special: bool,
    /// What each answer has to follow.
    pub constraint: Option<Constraint>,
    /// No answer: an embedding of the prompt.
    pub embed: Option<Pooling>,
    /// Tells how likely each token was, and the so many likeliest ones.
    pub logprobs: Option<usize>,
    /// The same of the prompt's tokens from the second one on. The prompt is computed whole then.
    pub prompt_logprobs: Option<usize>,
    /// The answers are the likeliest that beam search finds.
    pub beams: Option<Beams>,
    /// Requests of a smaller number go first.
    pub priority: i32,
    /// When the answers end, wherever they are.
    pub deadline: Option<Instant>,
}

impl Request {
    /// One greedy answer to `prompt`, until it ends or the context is full.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            answers: 1,
            adapters: Vec::new(),
            sampler: SamplerConfig::default(),
            max_tokens: None,
            stop: Vec::new(),
            ignore_eos: false,
            keep_special: false,
            constraint: None,
            embed: None,
            logprobs: None,
            prompt_logprobs: None,
            beams: None,
            priority: 0,
            deadline: None,
        }
    }

    /// Sequences that it becomes.
    pub(crate) fn sequences(&self) -> u32 {
        self.beams.map_or(self.answers, |beams| beams.width)
    }

    /// What its keys and values depend on beside its tokens.
    pub(crate) fn root(&self) -> Root {
        let numbers = |a: &ScaledAdapter| [a.adapter.id(), u64::from(a.scale.to_bits())];
        match self.adapters.is_empty() {
            true => Root::PLAIN,
            false => Root::of(self.adapters.iter().flat_map(numbers)),
        }
    }

    /// Whether all tokens of the prompt are to be computed, and not only those that no other began with.
    pub(crate) fn wants_whole_prompt(&self) -> bool {
        self.embed == Some(Pooling::Mean) || self.prompt_logprobs.is_some()
    }
}

/// How beam search goes about it. Tokens are taken by how likely they are with bias, penalties and constraint;
/// temperature and filters count for nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beams {
    /// Beginnings that are gone on with: as many as there are answers, or more.
    pub width: u32,
    /// An answer of `n` tokens, the one that ends it counted, is worth its ln p divided by `n` to this power.
    pub length_penalty: f32,
    /// When there is nothing better to come.
    pub stopping: Stopping,
}

/// When beam search ends, as `early_stopping` of Hugging Face's generation has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopping {
    /// When as many answers have ended as there are beams.
    AtOnce,
    /// When the likeliest beam, as it is, is worth no more than each of these.
    Likely,
    /// When no beam can come to be worth more than one of these.
    Certain,
}

/// How an embedding is made of what a model makes of a prompt's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last one's.
    Last,
}

/// A request that was taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(crate) u64);

/// Why a request is not taken in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many requests wait already.
    #[error("{0} answers are being generated or wait; try again later")]
    QueueFull(usize),
    /// There is nothing to go on from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt does not fit.
    #[error("the prompt has {tokens} tokens, but the context holds {context}; shorten it")]
    PromptTooLong {
        /// Of the prompt.
        tokens: usize,
        /// Tokens of prompt and answer together.
        context: usize,
    },
    /// A token that the model does not have.
    #[error("token {token} is none of the model's {vocabulary}")]
    Token {
        /// The first of them.
        token: u32,
        /// Tokens that the model has.
        vocabulary: usize,
    },
    /// The system starts no further thread.
    #[error("no thread for the grammar can be started: {0}")]
    Thread(String),
    /// Fewer than one answer, or more than run together.
    #[error("{asked} answers to one request; from 1 to {most} are possible")]
    Answers {
        /// That many.
        asked: u32,
        /// Sequences that run together.
        most: usize,
    },
    /// Fewer beams than answers, or more than run together.
    #[error("{asked} beams; from {answers}, the answers wanted, to {most} are possible")]
    Beams {
        /// That many.
        asked: u32,
        /// Answers wanted.
        answers: u32,
        /// Sequences that run together.
        most: usize,
    },
}

/// News of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The request.
    pub request: RequestId,
    /// Which of its answers.
    pub index: u32,
    /// Text that is certain now; none while it could be the beginning of a stop string or of a character.
    pub text: String,
    /// The token that was chosen, unless it only ended the text.
    pub token: Option<OutputToken>,
    /// The prompt's embedding, of length 1, where that was asked for: it comes with the end.
    pub embedding: Option<Vec<f32>>,
    /// How likely the prompt's tokens were, from the second one on, where that was asked for: comes with the
    /// first output of the first answer.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// How the answer ended, if it has.
    pub end: Option<End>,
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// The token.
    pub id: u32,
    /// How likely it was, where that was asked.
    pub logprobs: Option<TokenLogprobs>,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How many of them were in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens of the answer, those that end a text not counted.
    pub answer_tokens: usize,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The model ended it, by this token.
    EndOfText(u32),
    /// This stop string appeared.
    StopString(String),
    /// Nothing can follow, by its grammar; or what was wanted is an embedding, and here it is.
    Complete,
    /// Its grammar could not be followed any further, for this reason.
    Grammar(String),
    /// There are as many tokens as were wanted.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// Its time was up.
    Deadline,
    /// The model's numbers overflowed.
    NotFinite,
}
