use bevel_kernels::{BLOCK_TOKENS, KvPool, KvShape, KvType, Slot};

use crate::{Error, ModelConfig, Part, Result};

/// The key–value memory of a model: a pool of fixed blocks from which sequences take what they
/// need (PagedAttention, arXiv 2309.06180).
#[derive(Debug)]
pub struct KvCache {
    pool: KvPool,
    free: Vec<u32>,
}

/// One sequence's place in a [`KvCache`].
#[derive(Debug, Default)]
pub struct Sequence {
    blocks: Vec<u32>,
    len: usize,
}

impl KvCache {
    /// Memory for `tokens` tokens in all, rounded up to whole blocks. Pages are taken from the
    /// system when they are first written.
    ///
    /// # Errors
    /// [`Error::Config`] where that many tokens cannot be addressed.
    pub fn new(config: &ModelConfig, kv_type: KvType, tokens: usize) -> Result<Self> {
        Self::of_shape(config.kv_shape(kv_type), tokens)
    }

    /// Memory for one layer alone, exact.
    pub(crate) fn for_one_layer(config: &ModelConfig, tokens: usize) -> Result<Self> {
        Self::of_shape(KvShape { layers: 1, ..config.kv_shape(KvType::F32) }, tokens)
    }

    fn of_shape(shape: KvShape, tokens: usize) -> Result<Self> {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let pool = KvPool::new(shape, blocks).map_err(|e| Error::Config {
            path: "--ctx".to_owned(),
            key: "context".to_owned(),
            problem: format!("of {tokens} tokens: {e}"),
        })?;
        let free = (0..u32::try_from(blocks).unwrap_or(u32::MAX)).rev().collect();
        Ok(Self { pool, free })
    }

    /// Bytes of keys and values that one token takes in all layers.
    pub fn bytes_per_token(config: &ModelConfig, kv_type: KvType) -> usize {
        KvPool::bytes_per_block(&config.kv_shape(kv_type)) / BLOCK_TOKENS
    }

    /// The blocks, for [`crate::Model::forward`].
    pub fn pool(&mut self) -> &mut KvPool {
        &mut self.pool
    }

    /// Bytes of the whole pool.
    pub fn bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// Makes room for `count` more tokens in `sequence`.
    ///
    /// # Errors
    /// [`Error::ContextFull`]; the sequence is left as it was.
    pub fn extend(&mut self, sequence: &mut Sequence, count: usize) -> Result<()> {
        let needed = sequence.len.saturating_add(count);
        let more = needed.div_ceil(BLOCK_TOKENS).saturating_sub(sequence.blocks.len());
        if more > self.free.len() {
            let available = (sequence.blocks.len() + self.free.len()) * BLOCK_TOKENS;
            return Err(Error::ContextFull { needed, available });
        }
        sequence.blocks.extend(self.free.drain(self.free.len() - more..).rev());
        sequence.len = needed;
        Ok(())
    }

    /// Forgets all but the first `len` tokens of `sequence`; the blocks left over are free again.
    pub fn truncate(&mut self, sequence: &mut Sequence, len: usize) {
        sequence.len = sequence.len.min(len);
        let keep = sequence.len.div_ceil(BLOCK_TOKENS);
        self.free.extend(sequence.blocks.drain(keep..).rev());
    }
}

impl Sequence {
    /// An empty sequence.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty sequence that grows to `tokens` tokens without allocating.
    pub fn with_capacity(tokens: usize) -> Self {
        Self { blocks: Vec::with_capacity(tokens.div_ceil(BLOCK_TOKENS)), len: 0 }
    }

    /// Tokens in the sequence.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block table: block `i` holds tokens `16i … 16i + 15`.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Its newest `tokens` tokens, as part of a batch.
    pub fn part(&self, tokens: usize) -> Part<'_> {
        Part { tokens, context: self.len, blocks: &self.blocks, tree: &[], adapters: &[] }
    }
}

/// Where the token at `position` is kept.
pub(crate) fn slot(blocks: &[u32], position: usize) -> Slot {
    Slot { block: blocks[position / BLOCK_TOKENS], offset: (position % BLOCK_TOKENS) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(tokens: usize) -> KvCache {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 8, kv_type: KvType::F32 };
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        KvCache {
            pool: KvPool::new(shape, blocks).unwrap(),
            free: (0..blocks as u32).rev().collect(),
        }
    }

    #[test]
    fn blocks_are_taken_and_given_back() {
        let mut cache = cache(64);
        let (mut a, mut b) = (Sequence::new(), Sequence::new());
        cache.extend(&mut a, 17).unwrap();
        cache.extend(&mut b, 16).unwrap();
        cache.extend(&mut a, 15).unwrap();
        assert_eq!((a.len(), a.blocks()), (32, [0, 1].as_slice()));
        assert_eq!(b.blocks(), [2]);
        assert!(cache.extend(&mut b, 33).is_err());
        assert_eq!(b.len(), 16, "a refused extension changes nothing");
        cache.truncate(&mut a, 16);
        cache.extend(&mut b, 32).unwrap();
        assert_eq!(b.blocks(), [2, 1, 3]);
        cache.truncate(&mut a, 0);
        cache.truncate(&mut b, 0);
        assert_eq!(cache.free.len(), 4);
    }
}
