/// What can go wrong with a model: its description, its tensors, or what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The architecture is none bevel runs.
    #[error("`{path}`: architecture `{name}` is unknown; bevel runs {known}")]
    UnknownArchitecture {
        /// The model.
        path: String,
        /// `model_type` or `general.architecture`.
        name: String,
        /// Names bevel knows.
        known: String,
    },
    /// A configuration value is missing, of the wrong type or out of range.
    #[error("`{path}`: `{key}` {problem}")]
    Config {
        /// The model.
        path: String,
        /// The configuration key.
        key: String,
        /// What is wrong with it, as the end of a sentence.
        problem: String,
    },
    /// A family whose residual stream cannot be rotated.
    #[error(
        "`{path}`: a {family} model normalises what each block adds to the residual stream, which no rotation leaves unchanged; quantize it without"
    )]
    NotRotatable {
        /// The model.
        path: String,
        /// Its family.
        family: String,
    },
    /// A tensor the architecture needs is not in the checkpoint.
    #[error(
        "`{path}`: tensor `{tensor}` is missing; the file is incomplete or of another architecture than it says"
    )]
    MissingTensor {
        /// The model.
        path: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "`{path}`: tensor `{tensor}` has shape {found}, but the configuration asks for {expected}"
    )]
    Shape {
        /// The model.
        path: String,
        /// The tensor.
        tensor: String,
        /// Shape by the configuration.
        expected: String,
        /// Shape in the file.
        found: String,
    },
    /// A tensor has a type that cannot be a weight here.
    #[error("`{path}`: tensor `{tensor}` has type {dtype}: {problem}")]
    TensorType {
        /// The model.
        path: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: bevel_base::DType,
        /// What is wrong with it.
        problem: String,
    },
    /// Reading or writing one tensor failed.
    #[error("`{path}`: tensor `{tensor}`: {source}")]
    Tensor {
        /// The model.
        path: String,
        /// The tensor.
        tensor: String,
        /// What failed.
        source: bevel_base::Error,
    },
    /// A file of the model cannot be read.
    #[error("cannot read `{path}`: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write `{path}`: {source}")]
    Write {
        /// The file or directory.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// An adapter is none that can be run on the model.
    #[error("`{path}` is no adapter for this model: {problem}")]
    Adapter {
        /// The adapter.
        path: String,
        /// Why not.
        problem: String,
    },
    /// A JSON file of the model does not parse.
    #[error("`{path}` is not valid JSON: {source}")]
    Json {
        /// The file.
        path: String,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The path is neither a GGUF file nor a Hugging Face directory.
    #[error("`{path}` is no model: {problem}")]
    NotAModel {
        /// The path.
        path: String,
        /// What was found instead.
        problem: String,
    },
    /// A checkpoint file does not parse.
    #[error(transparent)]
    Format(#[from] bevel_formats::Error),
    /// A kernel refuses its operands.
    #[error("`{path}`: tensor `{tensor}`: {source}")]
    Kernel {
        /// The model.
        path: String,
        /// The tensor.
        tensor: String,
        /// What failed.
        source: bevel_kernels::Error,
    },
    /// The model comes with no tokenizer that bevel can use.
    #[error("`{path}`: no usable tokenizer: {source}")]
    Tokenizer {
        /// The model.
        path: String,
        /// What is wrong with it.
        source: crate::tokenizer::TokenizerError,
    },
    /// A sequence would outgrow the memory set aside for it.
    #[error(
        "the context is full: {needed} tokens are needed, {available} fit; ask for a larger --ctx or a shorter prompt"
    )]
    ContextFull {
        /// Tokens the sequence would have.
        needed: usize,
        /// Tokens that fit.
        available: usize,
    },
    /// There is nothing to go on from: the prompt has no tokens.
    #[error(
        "the prompt is empty, and the model has no token that begins a text; give it some text"
    )]
    EmptyPrompt,
    /// A token id is not in the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab} tokens")]
    Token {
        /// The id.
        token: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// The model's output is not a number.
    #[error(
        "the model's output at position {position} is not a number: the weights or their scales are broken; `bevel inspect --check` names the tensors"
    )]
    NotFinite {
        /// Position in the sequence.
        position: usize,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
