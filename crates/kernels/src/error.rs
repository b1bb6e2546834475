use crate::KvShape;

/// What can go wrong when weights are repacked or caches are made. Running a kernel does not fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The type holds no weights, or the bytes do not fit it or the shape.
    #[error(transparent)]
    Base(#[from] bevel_base::Error),
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
