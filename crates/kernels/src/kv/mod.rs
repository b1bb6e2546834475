//! The key–value cache: one pool of fixed-size blocks that sequences own through block tables
//! (PagedAttention, arXiv 2309.06180).
//!
//! A block holds 16 tokens for every layer. Within one layer and block:
//!
//! ```text
//! K  [kv_heads, tile of keys]       the scores of 16 tokens are one vector, summed over head_dim
//! V  [kv_heads, tile of values]
//! ```
//!
//! and the blocks of a layer lie one after the other: `[layers, blocks, K | V]`. What a tile is depends
//! on the [`KvType`]: [`store`] has elements one by one, [`groups`] small integers with scales.
//!
//! A rotated cache holds keys and values times a Hadamard matrix (QuaRot, arXiv 2404.00456), which
//! leaves no outliers to stretch the scales of their neighbours. Attention multiplies queries by the same
//! matrix, so that scores stay what they are, and what comes out once more, which undoes it.

mod groups;
mod memory;
mod store;

use crate::hadamard::{block_len, hadamard};
use crate::{Cpu, Error, Isa, Result};
pub(crate) use groups::{GROUP, Q4, Q4Group, Q8, Q8Group};
use memory::Memory;
pub(crate) use store::{Plain, Store};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// How keys and values are stored.
///
/// Of packed types 32 values of a token's head share a scale; heads whose size is no multiple of 32 are
/// stored as if it were the next one, with zeros. Groups with an infinity, a NaN, or a value beyond the
/// largest half-precision number times the largest code become NaN, so that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 32-bit floats: exact.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// 8-bit integers with a half-precision scale for each 32 of them: 8.5 bits a value.
    Q8_0 {
        /// Multiplied by a Hadamard matrix before.
        rotated: bool,
    },
    /// 4-bit integers with a half-precision scale for each 32 of them: 4.5 bits a value.
    Q4_0 {
        /// Multiplied by a Hadamard matrix before.
        rotated: bool,
    },
}

/// Does `$body` with `$store` standing for the layout of `$kv_type`.
macro_rules! with_store {
    ($kv_type:expr, $store:ident => $body:expr) => {
        match $kv_type {
            $crate::KvType::F32 => {
                type $store = $crate::kv::Plain<f32>;
                $body
            }
            $crate::KvType::F16 => {
                type $store = $crate::kv::Plain<half::f16>;
                $body
            }
            $crate::KvType::BF16 => {
                type $store = $crate::kv::Plain<half::bf16>;
                $body
            }
            $crate::KvType::Q8_0 { .. } => {
                type $store = $crate::kv::Q8;
                $body
            }
            $crate::KvType::Q4_0 { .. } => {
                type $store = $crate::kv::Q4;
                $body
            }
        }
    };
}
pub(crate) use with_store;

/// What a cached token consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Key–value heads in a layer.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// How they are stored.
    pub kv_type: KvType,
}

impl KvShape {
    /// Bytes of a head's keys and of its values in one block, `None` where they overflow.
    fn tile_bytes(&self) -> Option<(usize, usize)> {
        let d = self.head_dim;
        with_store!(self.kv_type, S => Some((S::key_bytes(d)?, S::value_bytes(d)?)))
    }

    /// Bytes of one block of one layer.
    fn layer_block_bytes(&self) -> Option<usize> {
        let (keys, values) = self.tile_bytes()?;
        keys.checked_add(values)?.checked_mul(self.kv_heads)
    }

    /// Values that a Hadamard matrix mixes: the power of two in `head_dim`. 1 where keys and values
    /// are stored as they are.
    pub(crate) fn rotation(&self) -> usize {
        match self.kv_type {
            KvType::Q8_0 { rotated: true } | KvType::Q4_0 { rotated: true } => {
                block_len(self.head_dim)
            }
            _ => 1,
        }
    }
}

/// Where a token's key and value go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index of the block in the pool.
    pub block: u32,
    /// Token within the block, less than [`BLOCK_TOKENS`].
    pub offset: u32,
}

/// Keys and values of all layers in fixed-size blocks.
///
/// Which blocks belong to which sequence is the caller's knowledge; the pool only stores them.
pub struct KvPool {
    shape: KvShape,
    blocks: usize,
    /// Bytes of a head's keys and of its values in a block.
    keys: usize,
    values: usize,
    memory: Memory,
    /// Room to rotate a key and a value of each head, `[kv_heads, 2, head_dim]`.
    rotated: Vec<f32>,
}

impl KvPool {
    /// A pool of `blocks` blocks. Memory is taken from the system as blocks are first written.
    ///
    /// # Errors
    /// [`Error::KvTooLarge`] where the pool does not fit in the address space or the system refuses it.
    pub fn new(shape: KvShape, blocks: usize) -> Result<Self> {
        let too_large = || Error::KvTooLarge { shape, blocks };
        let (keys, values) = shape.tile_bytes().ok_or_else(too_large)?;
        let bytes = shape
            .layer_block_bytes()
            .and_then(|bytes| bytes.checked_mul(shape.layers)?.checked_mul(blocks))
            .ok_or_else(too_large)?;
        let memory = Memory::zeroed(bytes).ok_or_else(too_large)?;
        let rotated = match shape.rotation() {
            1 => Some(0),
            _ => shape.kv_heads.checked_mul(2 * shape.head_dim),
        };
        let rotated = rotated.ok_or_else(too_large)?;
        Ok(Self { shape, blocks, keys, values, memory, rotated: vec![0.0; rotated] })
    }

    /// What a token consists of.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of the whole pool once every block was written.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Bytes of one block in all layers, saturating.
    pub fn bytes_per_block(shape: &KvShape) -> usize {
        shape
            .layer_block_bytes()
            .and_then(|bytes| bytes.checked_mul(shape.layers))
            .unwrap_or(usize::MAX)
    }

    /// Stores keys and values (`[n, kv_heads, head_dim]` each) of one layer, the i-th token's in
    /// `slots[i]`. What is stored is the same on every instruction set.
    ///
    /// # Panics
    /// Where lengths do not fit, or a layer or slot is outside the pool.
    pub fn write(&mut self, cpu: &Cpu, layer: usize, k: &[f32], v: &[f32], slots: &[Slot]) {
        let token = self.shape.kv_heads * self.shape.head_dim;
        let n = slots.len();
        assert_eq!(k.len(), n * token, "length of the keys of {n} tokens");
        assert_eq!(v.len(), n * token, "length of the values of {n} tokens");
        assert!(layer < self.shape.layers, "layer {layer} of {}", self.shape.layers);
        slots.iter().for_each(|&slot| self.check(slot));
        with_store!(self.shape.kv_type, S => self.write_as::<S>(cpu, layer, k, v, slots));
    }

    /// The key and the value (`[kv_heads, head_dim]` each) that one layer holds in `slot`: what was
    /// written, as the type rounds it. Slow; for looking at what is cached.
    ///
    /// # Panics
    /// Where lengths do not fit, or layer or slot is outside the pool.
    pub fn read(&self, layer: usize, slot: Slot, k: &mut [f32], v: &mut [f32]) {
        let KvShape { kv_heads, head_dim, kv_type, .. } = self.shape;
        assert!(layer < self.shape.layers, "layer {layer} of {}", self.shape.layers);
        self.check(slot);
        assert_eq!((k.len(), v.len()), (kv_heads * head_dim, kv_heads * head_dim), "one token");
        let (layer, token) = (self.layer(layer), slot.offset as usize);
        let row = head_dim.next_multiple_of(BLOCK_TOKENS);
        let mut keys = vec![0.0; head_dim * BLOCK_TOKENS];
        let mut values = vec![0.0; row * BLOCK_TOKENS];
        let heads = k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(head_dim));
        for (head, (k, v)) in heads.enumerate() {
            with_store!(kv_type, S => {
                S::keys(layer.keys(slot.block, head), &mut keys);
                S::values(layer.values(slot.block, head), &mut values);
            });
            for (k, row) in k.iter_mut().zip(keys.chunks_exact(BLOCK_TOKENS)) {
                *k = row[token];
            }
            v.copy_from_slice(&values[token * row..][..head_dim]);
            for x in [k, v] {
                hadamard(Isa::Scalar, x, self.shape.rotation());
            }
        }
    }

    /// Copies block `from` to block `to` in every layer: the copy of copy-on-write.
    ///
    /// # Panics
    /// Where a block is outside the pool.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        assert!(from < self.blocks && to < self.blocks, "blocks {from}, {to} of {}", self.blocks);
        let block = self.block_bytes();
        for layer in 0..self.shape.layers {
            let start = layer * self.blocks;
            let source = (start + from) * block;
            self.memory.bytes_mut().copy_within(source..source + block, (start + to) * block);
        }
    }

    /// Reads what a block holds in all layers, [`KvPool::bytes_per_block`] bytes; to be kept elsewhere and
    /// brought back by [`KvPool::load_block`].
    ///
    /// # Panics
    /// Where the block is outside the pool or `out` has another length.
    pub fn save_block(&self, block: u32, out: &mut [u8]) {
        let len = self.block_bytes();
        assert_eq!(out.len(), len * self.shape.layers, "bytes of a block");
        for (layer, out) in out.chunks_exact_mut(len.max(1)).enumerate() {
            let start = self.start_of_block(layer, block);
            out.copy_from_slice(&self.memory.bytes()[start..start + len]);
        }
    }

    /// Puts what [`KvPool::save_block`] read into a block of a pool of the same shape.
    ///
    /// # Panics
    /// As [`KvPool::save_block`].
    pub fn load_block(&mut self, block: u32, data: &[u8]) {
        let len = self.block_bytes();
        assert_eq!(data.len(), len * self.shape.layers, "bytes of a block");
        for (layer, data) in data.chunks_exact(len.max(1)).enumerate() {
            let start = self.start_of_block(layer, block);
            self.memory.bytes_mut()[start..start + len].copy_from_slice(data);
        }
    }

    fn start_of_block(&self, layer: usize, block: u32) -> usize {
        assert!((block as usize) < self.blocks, "block {block} of {}", self.blocks);
        (layer * self.blocks + block as usize) * self.block_bytes()
    }

    /// All blocks of a layer: `[blocks, K | V]`.
    pub(crate) fn layer(&self, layer: usize) -> LayerBlocks<'_> {
        let per_layer = self.blocks * self.block_bytes();
        LayerBlocks {
            data: &self.memory.bytes()[layer * per_layer..][..per_layer],
            keys: self.keys,
            values: self.values,
            kv_heads: self.shape.kv_heads,
        }
    }

    /// Bytes of a block of one layer.
    fn block_bytes(&self) -> usize {
        self.shape.kv_heads * (self.keys + self.values)
    }

    fn check(&self, slot: Slot) {
        let inside = (slot.block as usize) < self.blocks && (slot.offset as usize) < BLOCK_TOKENS;
        assert!(inside, "{slot:?} in a pool of {} blocks", self.blocks);
    }

    fn write_as<S: Store>(
        &mut self,
        cpu: &Cpu,
        layer: usize,
        k: &[f32],
        v: &[f32],
        slots: &[Slot],
    ) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let (keys, values, block) = (self.keys, self.values, self.block_bytes());
        let (isa, rotation) = (cpu.isa(), self.shape.rotation());
        let start = layer * self.blocks * block;
        let out = Shared(self.memory.bytes_mut()[start..].as_mut_ptr());
        let room = Shared(self.rotated.as_mut_ptr());
        let write_head = |head: usize| {
            for (i, slot) in slots.iter().enumerate() {
                let (at, token) = (slot.block as usize * block, slot.offset as usize);
                let source = (i * kv_heads + head) * head_dim;
                let (mut k, mut v) = (&k[source..][..head_dim], &v[source..][..head_dim]);
                // SAFETY: `write` checked every slot, so both tiles lie inside the layer; tiles of
                // different heads do not overlap, and a head belongs to one task.
                let (k_tile, v_tile) = unsafe {
                    let base = out.get().add(at);
                    let k_tile = base.add(head * keys);
                    let v_tile = base.add(kv_heads * keys + head * values);
                    (
                        std::slice::from_raw_parts_mut(k_tile, keys),
                        std::slice::from_raw_parts_mut(v_tile, values),
                    )
                };
                if rotation > 1 {
                    // SAFETY: there is room of this size for every head, and a head belongs to one
                    // task.
                    let room = unsafe {
                        let start = room.get().add(head * 2 * head_dim);
                        std::slice::from_raw_parts_mut(start, 2 * head_dim)
                    };
                    let (k_room, v_room) = room.split_at_mut(head_dim);
                    k_room.copy_from_slice(k);
                    v_room.copy_from_slice(v);
                    hadamard(isa, k_room, rotation);
                    hadamard(isa, v_room, rotation);
                    (k, v) = (k_room, v_room);
                }
                S::put(isa, k_tile, v_tile, token, k, v);
            }
        };
        if slots.len() < 2 * BLOCK_TOKENS {
            (0..kv_heads).for_each(write_head);
        } else {
            cpu.pool().run(kv_heads, write_head);
        }
    }
}

impl std::fmt::Debug for KvPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvPool")
            .field("shape", &self.shape)
            .field("blocks", &self.blocks)
            .field("bytes", &self.bytes())
            .finish()
    }
}

/// One layer's blocks.
#[derive(Clone, Copy)]
pub(crate) struct LayerBlocks<'a> {
    data: &'a [u8],
    keys: usize,
    values: usize,
    kv_heads: usize,
}

impl<'a> LayerBlocks<'a> {
    /// A head's tile of keys.
    pub(crate) fn keys(&self, block: u32, head: usize) -> &'a [u8] {
        let start = self.start(block) + head * self.keys;
        &self.data[start..][..self.keys]
    }

    /// A head's tile of values.
    pub(crate) fn values(&self, block: u32, head: usize) -> &'a [u8] {
        let start = self.start(block) + self.kv_heads * self.keys + head * self.values;
        &self.data[start..][..self.values]
    }

    fn start(&self, block: u32) -> usize {
        block as usize * self.kv_heads * (self.keys + self.values)
    }
}

struct Shared<T>(*mut T);

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: tasks write to disjoint parts (see `write_as`).
unsafe impl<T: Send> Sync for Shared<T> {}
