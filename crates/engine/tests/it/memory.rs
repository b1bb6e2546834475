//! A stand-in for key–value memory: what is written for a token depends on all tokens before it, as keys
//! and values do, so that a wrong block is noticed.

use std::hash::{DefaultHasher, Hash, Hasher};

use bevel_engine::blocks::BlockCopy;
use bevel_kernels::BLOCK_TOKENS;

pub(crate) struct Memory(Vec<[u64; BLOCK_TOKENS]>);

impl Memory {
    pub(crate) fn new(blocks: usize) -> Self {
        Self(vec![[0; BLOCK_TOKENS]; blocks])
    }

    /// Computes tokens `start ..` of a sequence. It reads what is there of those before.
    #[track_caller]
    pub(crate) fn compute(&mut self, blocks: &[u32], tokens: &[u32], start: usize) {
        self.check(blocks, &tokens[..start]);
        for (position, state) in states(tokens).enumerate().skip(start) {
            self.0[blocks[position / BLOCK_TOKENS] as usize][position % BLOCK_TOKENS] = state;
        }
    }

    /// Panics unless the blocks hold `tokens`.
    #[track_caller]
    pub(crate) fn check(&self, blocks: &[u32], tokens: &[u32]) {
        for (position, state) in states(tokens).enumerate() {
            let block = blocks[position / BLOCK_TOKENS];
            let found = self.0[block as usize][position % BLOCK_TOKENS];
            assert_eq!(found, state, "token {position} in block {block}");
        }
    }

    pub(crate) fn copy(&mut self, copy: BlockCopy) {
        self.0[copy.to as usize] = self.0[copy.from as usize];
    }

    pub(crate) fn get(&self, block: u32) -> [u64; BLOCK_TOKENS] {
        self.0[block as usize]
    }

    pub(crate) fn set(&mut self, block: u32, content: [u64; BLOCK_TOKENS]) {
        self.0[block as usize] = content;
    }
}

fn states(tokens: &[u32]) -> impl Iterator<Item = u64> {
    tokens.iter().scan(DefaultHasher::new(), |hasher, token| {
        token.hash(hasher);
        Some(hasher.finish())
    })
}
