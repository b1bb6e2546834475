//! Answers that have to follow a grammar: at every step, tokens that cannot continue it are forbidden.
//! What may come next is [llguidance](https://github.com/guidance-ai/llguidance)'s to say.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bevel_model::tokenizer::{TokenKind, Tokenizer};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use crate::scheduler::SequenceId;

/// What an answer has to follow.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that a schema describes.
    JsonSchema(serde_json::Value),
    /// Text that matches as a whole.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// A grammar that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The model's tokens are not fit for it.
    #[error("this model cannot be held to a grammar: {0}")]
    Tokenizer(String),
    /// It does not parse, or asks for what is not possible.
    #[error("{0}")]
    Grammar(String),
}

/// Prepares grammars for the tokens of one model.
pub struct Grammars {
    factory: ParserFactory,
    /// Further tokens that end a text.
    ends: Vec<u32>,
    end: u32,
}

impl Grammars {
    /// For `tokenizer`. Takes some tens of milliseconds.
    ///
    /// # Errors
    /// [`GrammarError::Tokenizer`] where no token ends a text.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let error = |error: &dyn ToString| GrammarError::Tokenizer(error.to_string());
        let ends = tokenizer.end_of_generation();
        let end = tokenizer.eot().or(tokenizer.eos()).or(ends.first().copied());
        let end = end.ok_or_else(|| error(&"it has no token that ends a text"))?;
        let vocabulary = tokenizer.vocab_size();
        let info = TokRxInfo::new(u32::try_from(vocabulary).map_err(|e| error(&e))?, end);
        let words: Vec<Vec<u8>> =
            (0..vocabulary as u32).map(|token| word(tokenizer, token)).collect();
        let env = ApproximateTokEnv::new(TokTrie::from(&info, &words));
        let mut factory =
            ParserFactory::new_simple(&(std::sync::Arc::new(env) as _)).map_err(|e| error(&e))?;
        factory.quiet();
        Ok(Self { factory, ends: ends.to_vec(), end })
    }

    /// An answer's state at its beginning.
    ///
    /// # Errors
    /// [`GrammarError::Grammar`].
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Grammar(error));
        }
        let mut constraint =
            Constraint { matcher, end: self.end, ends: self.ends.clone(), allowed: Vec::new() };
        constraint.prepare().map_err(GrammarError::Grammar)?;
        Ok(constraint)
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("end", &self.end).finish_non_exhaustive()
    }
}

/// A token's bytes as llguidance wants them: special tokens are none of the text.
fn word(tokenizer: &Tokenizer, token: u32) -> Vec<u8> {
    match tokenizer.kind(token) {
        Some(TokenKind::Control) => {
            let name = tokenizer.token(token).unwrap_or_default();
            [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
        }
        _ => tokenizer.token_bytes(token).unwrap_or_default(),
    }
}

/// Where an answer is in its grammar.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    end: u32,
    ends: Vec<u32>,
    /// Tokens that may come next, a bit each.
    allowed: Vec<u32>,
}

impl Constraint {
    /// Tokens that may come next: bit `i % 32` of word `i / 32` is token `i`'s.
    pub(crate) fn allowed(&self) -> &[u32] {
        &self.allowed
    }

    /// Goes past `token`, which was allowed; true where the text is complete.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool, String> {
        self.matcher.consume_token(token).map_err(|error| error.to_string())?;
        Ok(self.matcher.is_stopped())
    }

    /// Finds what may come next.
    fn prepare(&mut self) -> Result<(), String> {
        let mask = self.matcher.compute_mask().map_err(|error| error.to_string())?;
        self.allowed.clear();
        self.allowed.extend_from_slice(mask.as_slice());
        if mask.is_allowed(self.end) {
            for &end in &self.ends {
                if let Some(word) = self.allowed.get_mut(end as usize / 32) {
                    *word |= 1 << (end % 32);
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").field("end", &self.end).finish_non_exhaustive()
    }
}

/// A thread that finds out what may come next while the model computes how likely it is.
#[derive(Debug)]
pub(crate) struct Preparer {
    /// `None` once the thread is to end.
    requests: Option<mpsc::Sender<(SequenceId, Constraint)>>,
    results: mpsc::Receiver<(SequenceId, Result<Constraint, String>)>,
    /// Those that have not come back.
    pending: usize,
    thread: Option<JoinHandle<()>>,
}

impl Preparer {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (requests, work) = mpsc::channel::<(SequenceId, Constraint)>();
        let (done, results) = mpsc::channel();
        let thread = std::thread::Builder::new().name("grammar".to_owned()).spawn(move || {
            for (id, mut constraint) in work {
                let result = constraint.prepare().map(|()| constraint);
                if done.send((id, result)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { requests: Some(requests), results, pending: 0, thread: Some(thread) })
    }

    /// Begins to prepare a constraint.
    pub(crate) fn start(&mut self, id: SequenceId, constraint: Constraint) {
        let requests = self.requests.as_ref().expect("the thread runs");
        requests.send((id, constraint)).expect("the thread takes what it is sent");
        self.pending += 1;
    }

    /// Whether there are some that have not come back.
    pub(crate) fn is_busy(&self) -> bool {
        self.pending > 0
    }

    /// Those that were started and are prepared: waits up to `patience` for all, and for one where it is
    /// endless.
    pub(crate) fn finish(
        &mut self,
        patience: Duration,
    ) -> Vec<(SequenceId, Result<Constraint, String>)> {
        let mut prepared = Vec::new();
        let deadline = Instant::now().checked_add(patience);
        while self.pending > 0 {
            let result = match deadline {
                None if !prepared.is_empty() => self.results.try_recv().ok(),
                None => Some(self.results.recv().expect("the thread answers all it is sent")),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.results.recv_timeout(left).ok()
                }
            };
            let Some(result) = result else { break };
            self.pending -= 1;
            prepared.push(result);
        }
        prepared
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
