use crate::KvShape;

/// What can go wrong when kernels are prepared. Running them does not fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
