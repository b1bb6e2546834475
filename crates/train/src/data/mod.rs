//! What is learnt from: records of JSON, CSV and Parquet, an example each, or a text.
//!
//! | members | what is learnt |
//! |---|---|
//! | `text` | all of it |
//! | `prompt`, `completion` | the completion, or of two lists of messages the assistant's in the second |
//! | `messages`: `role`, `content`; `tools` | what the assistant says, in the model's chat template |
//! | `conversations`: `from`, `value` (ShareGPT) | the same |
//! | `instruction`, `input`, `output` (Alpaca) | the same, of two messages |
//!
//! A record that has several of these is the first. [`Pair`]s are of `chosen` and `rejected`, texts or lists of
//! messages, with a `prompt` before both, or beginning alike.

mod cache;
mod pair;
mod read;
mod shape;
mod tokens;

use std::path::Path;

use bevel_base::Pool;
use bevel_formats::records::{self, DataFile};
use bevel_model::chat::ChatTemplate;
use bevel_model::tokenizer::Tokenizer;

pub use cache::Cached;
pub use pair::Pair;

use crate::Result;
use read::Item;

/// Tokens, and which of them are to be learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each is to be predicted. The first one never is.
    pub learnt: Vec<bool>,
}

/// What makes tokens of texts.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What conversations are rendered by.
    pub template: Option<&'a ChatTemplate>,
    /// Most tokens of an example; what is longer is cut off.
    pub context: usize,
    /// Prompts are learnt as well. Those of pairs never are.
    pub whole: bool,
}

/// Examples, or pairs of them, and what became of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examples<T = Example> {
    /// Those of which something can be learnt.
    pub all: Vec<T>,
    /// How many were cut off.
    pub cut: usize,
    /// How many had nothing to be learnt, or nothing before they were cut off.
    pub empty: usize,
}

impl<T> Default for Examples<T> {
    fn default() -> Self {
        Self { all: Vec::new(), cut: 0, empty: 0 }
    }
}

impl Reader<'_> {
    /// Examples of files, in their order, on all threads of a pool.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format) names the file, and the line or row that is no example.
    pub fn examples(&self, files: &[DataFile], pool: &Pool) -> Result<Examples> {
        read::files(self, files, pool)
    }

    /// Pairs of files, in their order, on all threads of a pool.
    ///
    /// # Errors
    /// As [`Reader::examples`].
    pub fn pairs(&self, files: &[DataFile], pool: &Pool) -> Result<Examples<Pair>> {
        read::files(self, files, pool)
    }

    /// As [`Reader::examples`]; where it is worth it, the tokens are kept in a directory and found there the next
    /// time that the same data are read with the same tokenizer, template and options.
    ///
    /// # Errors
    /// As [`Reader::examples`].
    pub fn cached_examples(
        &self,
        files: &[DataFile],
        pool: &Pool,
        cache: &Path,
    ) -> Result<(Examples, Cached)> {
        cache::files(self, files, pool, cache)
    }

    /// Examples of lines of JSON; `source` is used in messages.
    ///
    /// # Errors
    /// As [`Reader::examples`].
    pub fn lines(&self, text: &str, source: &str) -> Result<Examples> {
        let mut examples = Examples::default();
        records::lines_of(&mut text.as_bytes(), Path::new(source), &mut |place, record| {
            let made = Example::of(self, record).map_err(|reason| place.wrong(reason))?;
            examples.push(made);
            Ok::<_, crate::Error>(())
        })?;
        Ok(examples)
    }

    /// Examples of a text: pieces of it as long as the context.
    ///
    /// # Errors
    /// Where the tokenizer fails.
    pub fn text(&self, text: &str, source: &str) -> Result<Examples> {
        let tokens = self.tokenizer.encode(text, true, false);
        let tokens = tokens.map_err(|error| bevel_formats::Error::Record {
            place: source.to_owned(),
            reason: error.to_string(),
        })?;
        let mut examples = Examples::default();
        // The last token of a piece begins the next one, and is learnt once.
        for start in (0..tokens.len()).step_by(self.context.saturating_sub(1).max(1)) {
            let piece = tokens[start..tokens.len().min(start + self.context)].to_vec();
            examples.push(self.limited(Example { learnt: vec![true; piece.len()], tokens: piece }));
        }
        Ok(examples)
    }
}
