//! The block manager of PagedAttention (Kwon et al., *Efficient Memory Management for Large Language
//! Model Serving with PagedAttention*, arXiv 2309.06180): which block of the key–value memory belongs to
//! whom. It moves no data and knows no model.
//!
//! 1. Memory is a pool of blocks of 16 tokens. A sequence has a [`Table`] of them and takes one more when
//!    the last is full, so that at most 15 places of a sequence are empty.
//! 2. Blocks are counted by how many tables name them. Nobody else writes to a block that two name: who
//!    has to, copies it first (copy-on-write).
//! 3. A full block is known by a hash of its tokens and of all that comes before them: tokens, and adapters. A prompt that begins
//!    as an earlier one did takes its blocks instead of computing them again, whoever it belonged to.
//! 4. A block that no table names keeps what it holds until its place is needed: the one that was given
//!    up longest ago goes first, and the end of a sequence before its beginning.

use std::collections::HashMap;

use bevel_kernels::BLOCK_TOKENS;
use sha2::{Digest, Sha256};

/// What a full block holds, and what comes before it: equal hashes, equal keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct BlockHash([u8; 16]);

impl BlockHash {
    /// Of a block's tokens behind the blocks that `parent` stands for.
    fn of(parent: Self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(parent.0);
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        let digest = hash.finalize();
        Self(*digest.first_chunk().expect("SHA-256 has 32 bytes"))
    }
}

/// What keys and values depend on beside tokens: what comes before a sequence's first one. Sequences share blocks
/// only where it is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root(BlockHash);

impl Root {
    /// That of a model alone.
    pub const PLAIN: Self = Self(BlockHash([0; 16]));

    /// That of a model with what `numbers` say.
    pub fn of(numbers: impl IntoIterator<Item = u64>) -> Self {
        let halves = |number: u64| [number as u32, (number >> 32) as u32];
        let numbers: Vec<u32> = numbers.into_iter().flat_map(halves).collect();
        Self(BlockHash::of(Self::PLAIN.0, &numbers))
    }
}

impl Default for Root {
    fn default() -> Self {
        Self::PLAIN
    }
}

/// The blocks of one sequence. It belongs to the manager that made it, and goes back to it by
/// [`BlockManager::free`].
#[derive(Debug, Default)]
#[must_use = "blocks are lost that nobody frees"]
pub struct Table {
    /// Block `i` holds tokens `16i … 16i + 15`.
    blocks: Vec<u32>,
    /// Tokens that there is room for, written or about to be.
    len: usize,
    root: Root,
    /// Hashes of the full blocks that were committed.
    hashes: Vec<BlockHash>,
}

impl Table {
    /// The block table.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Tokens that the table has room for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True where it has room for none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A copy to be made before anything is written: of block `from`, in all layers, to block `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// The block that others go on using.
    pub from: u32,
    /// The block that the table names now.
    pub to: u32,
}

/// There are not enough blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// What a manager has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Tokens that were looked up in the prefix cache.
    pub looked_up: u64,
    /// Tokens that were found there.
    pub found: u64,
    /// Blocks whose contents made way for others.
    pub evicted: u64,
    /// Blocks copied because somebody else was using them.
    pub copied: u64,
}

/// Who has which block.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    unused: UnusedBlocks,
    /// Where full blocks are whose contents are known.
    cached: HashMap<BlockHash, u32>,
    stats: BlockStats,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Tables that name it.
    references: u32,
    /// What it holds, where it is in `cached`.
    hash: Option<BlockHash>,
}

impl BlockManager {
    /// A manager of `blocks` blocks, all unused.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks],
            unused: UnusedBlocks::all(blocks),
            cached: HashMap::new(),
            stats: BlockStats::default(),
        }
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that no table names, whether or not they hold something.
    pub fn unused(&self) -> usize {
        self.unused.len
    }

    /// What was done so far.
    pub fn stats(&self) -> BlockStats {
        self.stats
    }

    /// Blocks that a sequence of `tokens` would take from the unused ones, the first `most` of whose
    /// tokens may come from the cache.
    pub fn would_take(&self, root: Root, tokens: &[u32], most: usize) -> usize {
        let found = self.find(root, &tokens[..most]);
        let in_use = found.iter().filter(|&&b| self.blocks[b as usize].references > 0).count();
        tokens.len().div_ceil(BLOCK_TOKENS) - in_use
    }

    /// A table with what the cache has of the first `most` of `tokens`, whole blocks only. Its keys and
    /// values need not be computed: [`Table::len`] tokens.
    ///
    /// A model that is to say what follows needs to see the last token: `most` is less than the length then.
    pub fn allocate(&mut self, root: Root, tokens: &[u32], most: usize) -> Table {
        let blocks = self.find(root, &tokens[..most]);
        for &block in &blocks {
            self.refer(block);
        }
        let len = blocks.len() * BLOCK_TOKENS;
        self.stats.looked_up += tokens.len() as u64;
        self.stats.found += len as u64;
        let hashes = hashes(root.0, &tokens[..len]).collect();
        Table { blocks, len, root, hashes }
    }

    /// Makes room for `count` more tokens. Where the table shares the block that the next token goes to,
    /// it gets a copy, which the caller has to make.
    ///
    /// # Errors
    /// [`NoRoom`]; the table is as before.
    pub fn append(&mut self, table: &mut Table, count: usize) -> Result<Option<BlockCopy>, NoRoom> {
        if count == 0 {
            return Ok(None);
        }
        let begun = !table.len.is_multiple_of(BLOCK_TOKENS);
        let shared = begun.then(|| table.blocks[table.len / BLOCK_TOKENS]);
        let shared = shared.filter(|&block| self.blocks[block as usize].references > 1);
        let more = (table.len + count).div_ceil(BLOCK_TOKENS) - table.blocks.len();
        if more + usize::from(shared.is_some()) > self.unused.len {
            return Err(NoRoom);
        }
        let copy = shared.map(|from| {
            let to = self.take();
            self.stats.copied += 1;
            *table.blocks.last_mut().expect("the table shares a block") = to;
            self.release(from);
            BlockCopy { from, to }
        });
        if begun && copy.is_none() {
            // What it held will change.
            self.forget(table.blocks[table.len / BLOCK_TOKENS]);
        }
        for _ in 0..more {
            let block = self.take();
            table.blocks.push(block);
        }
        table.len += count;
        Ok(copy)
    }

    /// Says that the keys and values of `tokens`, the sequence's first ones, have been computed, so that
    /// other sequences may use them.
    ///
    /// # Panics
    /// Where the table has no room for them.
    pub fn commit(&mut self, table: &mut Table, tokens: &[u32]) {
        assert!(tokens.len() <= table.len, "{} tokens of {}", tokens.len(), table.len);
        let known = table.hashes.len();
        let parent = table.hashes.last().copied().unwrap_or(table.root.0);
        let start = (known * BLOCK_TOKENS).min(tokens.len());
        for (hash, &block) in hashes(parent, &tokens[start..]).zip(&table.blocks[known..]) {
            table.hashes.push(hash);
            // Where somebody else computed the same meanwhile, theirs stays the known one.
            let owner = &mut self.blocks[block as usize];
            if owner.hash.is_none() && !self.cached.contains_key(&hash) {
                owner.hash = Some(hash);
                self.cached.insert(hash, block);
            }
        }
    }

    /// A second table of the same blocks, for an answer that goes another way from here.
    pub fn fork(&mut self, table: &Table) -> Table {
        for &block in &table.blocks {
            self.blocks[block as usize].references += 1;
        }
        let Table { blocks, len, root, hashes } = table;
        Table { blocks: blocks.clone(), len: *len, root: *root, hashes: hashes.clone() }
    }

    /// Goes back to the first `len` tokens.
    pub fn truncate(&mut self, table: &mut Table, len: usize) {
        table.len = table.len.min(len);
        table.hashes.truncate(table.len / BLOCK_TOKENS);
        let keep = table.len.div_ceil(BLOCK_TOKENS);
        // The end of a sequence makes way before its beginning.
        for block in table.blocks.drain(keep..).rev() {
            self.release(block);
        }
    }

    /// Takes a table's blocks back. What they hold stays in the cache until others need the place.
    pub fn free(&mut self, mut table: Table) {
        self.truncate(&mut table, 0);
    }

    /// Forgets what unused blocks hold.
    pub fn clear_cache(&mut self) {
        for block in 0..self.blocks.len() as u32 {
            if self.blocks[block as usize].references == 0 {
                self.forget(block);
            }
        }
    }

    /// Panics where an invariant does not hold, given all tables that there are.
    #[doc(hidden)]
    pub fn check(&self, tables: &[&Table]) {
        let mut references = vec![0; self.blocks.len()];
        for table in tables {
            assert_eq!(table.blocks.len(), table.len.div_ceil(BLOCK_TOKENS), "{table:?}");
            assert!(table.hashes.len() <= table.len / BLOCK_TOKENS, "{table:?}");
            for &block in &table.blocks {
                references[block as usize] += 1;
            }
        }
        let mut is_unused = vec![false; self.blocks.len()];
        for block in self.unused.iter() {
            assert!(!std::mem::replace(&mut is_unused[block as usize], true), "{block} twice");
        }
        for (i, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.references, references[i], "tables that name block {i}");
            assert_eq!(is_unused[i], block.references == 0, "block {i} among the unused ones");
            if let Some(hash) = block.hash {
                assert_eq!(self.cached.get(&hash), Some(&(i as u32)), "block {i} in the cache");
            }
        }
        for (hash, &block) in &self.cached {
            assert_eq!(self.blocks[block as usize].hash, Some(*hash), "block {block}");
        }
        let unused = is_unused.iter().filter(|&&unused| unused).count();
        assert_eq!(self.unused.len, unused, "unused blocks");
    }

    /// The blocks that hold the beginning of `tokens`.
    fn find(&self, root: Root, tokens: &[u32]) -> Vec<u32> {
        hashes(root.0, tokens).map_while(|hash| self.cached.get(&hash).copied()).collect()
    }

    /// Another table names `block`.
    fn refer(&mut self, block: u32) {
        let references = &mut self.blocks[block as usize].references;
        *references += 1;
        if *references == 1 {
            self.unused.remove(block);
        }
    }

    /// A table no longer names `block`.
    fn release(&mut self, block: u32) {
        let Block { references, hash } = &mut self.blocks[block as usize];
        *references -= 1;
        if *references == 0 {
            // What holds nothing is taken before anything is evicted.
            if hash.is_some() {
                self.unused.push_last(block);
            } else {
                self.unused.push_first(block);
            }
        }
    }

    /// Takes the unused block that is wanted least. There is one.
    fn take(&mut self) -> u32 {
        let block = self.unused.first().expect("the caller counted the unused blocks");
        if self.blocks[block as usize].hash.is_some() {
            self.stats.evicted += 1;
            self.forget(block);
        }
        self.refer(block);
        block
    }

    /// Whatever `block` holds, nobody shall find it.
    fn forget(&mut self, block: u32) {
        if let Some(hash) = self.blocks[block as usize].hash.take() {
            self.cached.remove(&hash);
        }
    }
}

/// The hashes of full blocks of tokens that follow those of `parent`.
fn hashes(parent: BlockHash, tokens: &[u32]) -> impl Iterator<Item = BlockHash> {
    tokens.chunks_exact(BLOCK_TOKENS).scan(parent, |parent, tokens| {
        *parent = BlockHash::of(*parent, tokens);
        Some(*parent)
    })
}

/// Blocks that no table names, from the one to be taken first: a doubly linked list, so that one can leave
/// its middle.
#[derive(Debug)]
struct UnusedBlocks {
    /// `links[b]`: the neighbours of block `b`; `links[blocks]`: the last and the first one.
    links: Vec<Link>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

impl UnusedBlocks {
    fn all(blocks: usize) -> Self {
        let ring = u32::try_from(blocks + 1).expect("blocks have 32-bit numbers");
        let link = |b: u32| Link { before: (b + ring - 1) % ring, after: (b + 1) % ring };
        Self { links: (0..ring).map(link).collect(), len: blocks }
    }

    /// The place in the ring that is no block.
    fn end(&self) -> u32 {
        (self.links.len() - 1) as u32
    }

    fn first(&self) -> Option<u32> {
        (self.len > 0).then(|| self.links[self.end() as usize].after)
    }

    fn iter(&self) -> impl Iterator<Item = u32> {
        let after = |b: u32| Some(self.links[b as usize].after).filter(|&b| b != self.end());
        std::iter::successors(after(self.end()), move |&b| after(b))
    }

    fn push_first(&mut self, block: u32) {
        self.insert(block, self.end(), self.links[self.end() as usize].after);
    }

    fn push_last(&mut self, block: u32) {
        self.insert(block, self.links[self.end() as usize].before, self.end());
    }

    fn insert(&mut self, block: u32, before: u32, after: u32) {
        self.links[block as usize] = Link { before, after };
        self.links[before as usize].after = block;
        self.links[after as usize].before = block;
        self.len += 1;
    }

    fn remove(&mut self, block: u32) {
        let Link { before, after } = self.links[block as usize];
        self.links[before as usize].after = after;
        self.links[after as usize].before = before;
        self.len -= 1;
    }
}
