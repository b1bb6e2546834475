use bevel_base::DType;

use crate::KvShape;

/// What can go wrong when weights are repacked or caches are made. Running a kernel does not fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes do not fit the type or the shape.
    #[error(transparent)]
    Base(#[from] bevel_base::Error),
    /// The type holds no weights.
    #[error("a matrix of {0} cannot be multiplied: its values are no weights")]
    NotWeights(DType),
    /// A key–value pool does not fit in memory.
    #[error(
        "a key–value cache of {blocks} blocks of {tokens} tokens, {bytes} bytes each, does not fit in memory: use a shorter context or fewer sequences",
        tokens = crate::BLOCK_TOKENS,
        bytes = crate::KvPool::bytes_per_block(shape)
    )]
    KvTooLarge {
        /// What a token consists of.
        shape: KvShape,
        /// Blocks asked for.
        blocks: usize,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
