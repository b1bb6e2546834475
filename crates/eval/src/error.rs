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
    /// The model fails.
    #[error(transparent)]
    Model(#[from] bevel_model::Error),
    /// The text cannot be cut into tokens.
    #[error(transparent)]
    Tokenizer(#[from] bevel_model::tokenizer::TokenizerError),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
