/// What can go wrong with an engine as a whole. What concerns one request only is a
/// [`Refused`](crate::Refused) or an [`EndReason`](crate::EndReason).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key–value memory does not hold what it has to.
    #[error(
        "key-value memory for {tokens} tokens does not hold one context of {context}: give it more, or shorten the context"
    )]
    Memory {
        /// Tokens it would hold.
        tokens: usize,
        /// Tokens of a context.
        context: usize,
    },
    /// The key–value memory is not to be had.
    #[error(transparent)]
    Kernels(#[from] bevel_kernels::Error),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] bevel_model::Error),
    /// The file for preempted sequences cannot be made.
    #[error("cannot make a swap file in `{directory}`: {error}")]
    Swap {
        /// Where.
        directory: String,
        /// Why not.
        error: std::io::Error,
    },
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
