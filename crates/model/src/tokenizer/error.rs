/// What can go wrong with a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A tokenizer file could not be read or written.
    #[error("cannot read or write `{path}`: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A Hugging Face directory has no `tokenizer.json`.
    #[error(
        "`{0}` has no `tokenizer.json`; bevel does not read `tokenizer.model` or `vocab.json`: save the tokenizer with a fast tokenizer of transformers, which writes that file"
    )]
    NoTokenizer(String),
    /// A JSON file of the tokenizer does not say what it should.
    #[error("`{file}` is not a tokenizer file: {source}")]
    Json {
        /// The file's name.
        file: String,
        /// What the parser said, with line and column.
        source: serde_json::Error,
    },
    /// A GGUF key is missing.
    #[error("the file has no `{0}`, so its tokenizer cannot be rebuilt: convert the model again")]
    MissingKey(String),
    /// A GGUF key holds something else than it should.
    #[error("`{key}` should hold {expected}: convert the model again")]
    WrongKey {
        /// The metadata key.
        key: String,
        /// What it should hold.
        expected: String,
    },
    /// A kind of tokenizer that bevel does not have.
    #[error(
        "the tokenizer is of kind `{0}`; bevel knows byte-level BPE (`gpt2`) and SentencePiece-style BPE (`llama`)"
    )]
    UnknownKind(String),
    /// The vocabulary, the merges or the added tokens contradict each other.
    #[error("the tokenizer contradicts itself: {0}")]
    Inconsistent(String),
    /// A part of the tokenizer is valid but bevel does not implement it.
    #[error("the tokenizer uses {0}, which bevel does not implement")]
    Unsupported(String),
    /// A normalizer or pre-tokenizer that could not be built, or failed on a text.
    #[error("the tokenizer's {part} failed: {message}")]
    Part {
        /// Which part.
        part: &'static str,
        /// What went wrong.
        message: String,
    },
    /// The pre-tokenizer has no name in GGUF files.
    #[error(
        "the pre-tokenizer {0} matches none of those that have a name in GGUF files, so llama.cpp could not load the result"
    )]
    UnnamedPreTokenizer(String),
    /// The embedding has fewer rows than the tokenizer has tokens.
    #[error("the tokenizer has {tokens} tokens but the model's embedding only {rows} rows")]
    TooManyTokens {
        /// Tokens in the vocabulary.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
}

/// A result with a [`TokenizerError`].
pub type Result<T, E = TokenizerError> = std::result::Result<T, E>;
