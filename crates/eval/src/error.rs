use std::path::PathBuf;

/// What can go wrong with a measurement.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text does not fill one window.
    #[error(
        "the text has {tokens} tokens, but a window takes {context}; give a longer text or a smaller --ctx"
    )]
    TextTooShort {
        /// Tokens in the text.
        tokens: usize,
        /// Tokens of a window.
        context: usize,
    },
    /// The windows are laid out in a way that scores nothing.
    #[error("{0}")]
    Windows(String),
    /// Two models that are to be compared do not share a vocabulary.
    #[error("the two models cannot be compared: {0}")]
    Vocabulary(String),
    /// A file of logits is damaged, or does not belong to what is asked of it.
    #[error("`{}`: {reason}", .path.display())]
    BaseLogits {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        reason: String,
    },
    /// A multiple-choice question cannot be asked.
    #[error("line {line}: {problem}")]
    Question {
        /// Line of the file, from 1.
        line: usize,
        /// What was expected, what was found and what to do.
        problem: String,
    },
    /// The chat template refuses a question.
    #[error(transparent)]
    Template(#[from] bevel_model::chat::TemplateError),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] bevel_formats::Error),
    /// The model fails.
    #[error(transparent)]
    Model(#[from] bevel_model::Error),
    /// The text cannot be cut into tokens.
    #[error(transparent)]
    Tokenizer(#[from] bevel_model::tokenizer::TokenizerError),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
