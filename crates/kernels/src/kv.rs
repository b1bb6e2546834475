//! The key–value cache: one pool of fixed-size blocks that sequences own through block tables
//! (PagedAttention, arXiv 2309.06180).
//!
//! A block holds 16 tokens for every layer. Within one layer and block:
//!
//! ```text
//! K  [kv_heads, head_dim, 16 tokens]     the scores of 16 tokens are one vector, summed over head_dim
//! V  [kv_heads, 16 tokens, row]          row = head_dim rounded up to 16, the excess zero
//! ```
//!
//! and the blocks of a layer lie one after the other: `[layers, blocks, K | V]`.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use half::{bf16, f16};

use crate::{Cpu, Error, Result};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 32-bit floats: exact.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
}

impl KvType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::BF16 => 2,
        }
    }
}

/// What a cached token consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Key–value heads in a layer.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Element type.
    pub kv_type: KvType,
}

impl KvShape {
    /// Values between two tokens of a V tile: `head_dim` rounded up to 16.
    pub(crate) const fn value_row(&self) -> usize {
        self.head_dim.next_multiple_of(BLOCK_TOKENS)
    }

    /// Elements of K and of V in one block of one layer, `None` where they overflow.
    fn halves(&self) -> Option<(usize, usize)> {
        let keys = self.kv_heads.checked_mul(self.head_dim)?.checked_mul(BLOCK_TOKENS)?;
        let row = self.head_dim.checked_next_multiple_of(BLOCK_TOKENS)?;
        let values = self.kv_heads.checked_mul(row)?.checked_mul(BLOCK_TOKENS)?;
        Some((keys, values))
    }

    /// Bytes of one block of one layer, a multiple of 64 wherever `head_dim` is even.
    fn layer_block_bytes(&self) -> Option<usize> {
        let (keys, values) = self.halves()?;
        keys.checked_add(values)?.checked_mul(self.kv_type.bytes())
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
    /// Elements of K and of V in one block of one layer.
    keys: usize,
    values: usize,
    memory: Memory,
}

impl KvPool {
    /// A pool of `blocks` blocks. Memory is taken from the system as blocks are first written.
    ///
    /// # Errors
    /// [`Error::KvTooLarge`] where the pool does not fit in the address space or the system refuses it.
    pub fn new(shape: KvShape, blocks: usize) -> Result<Self> {
        let too_large = || Error::KvTooLarge { shape, blocks };
        let (keys, values) = shape.halves().ok_or_else(too_large)?;
        let bytes = shape
            .layer_block_bytes()
            .and_then(|bytes| bytes.checked_mul(shape.layers)?.checked_mul(blocks))
            .ok_or_else(too_large)?;
        let memory = Memory::zeroed(bytes).ok_or_else(too_large)?;
        Ok(Self { shape, blocks, keys, values, memory })
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
        self.memory.len
    }

    /// Bytes of one block in all layers, saturating.
    pub fn bytes_per_block(shape: &KvShape) -> usize {
        shape
            .layer_block_bytes()
            .and_then(|bytes| bytes.checked_mul(shape.layers))
            .unwrap_or(usize::MAX)
    }

    /// Stores keys and values (`[n, kv_heads, head_dim]` each) of one layer, the i-th token's in
    /// `slots[i]`.
    ///
    /// # Panics
    /// Where lengths do not fit, or a layer or slot is outside the pool.
    pub fn write(&mut self, cpu: &Cpu, layer: usize, k: &[f32], v: &[f32], slots: &[Slot]) {
        let KvShape { kv_heads, head_dim, kv_type, layers } = self.shape;
        let n = slots.len();
        assert!(layer < layers, "layer {layer} of {layers}");
        assert_eq!(k.len(), n * kv_heads * head_dim, "length of the keys of {n} tokens");
        assert_eq!(v.len(), n * kv_heads * head_dim, "length of the values of {n} tokens");
        for slot in slots {
            let inside =
                (slot.block as usize) < self.blocks && (slot.offset as usize) < BLOCK_TOKENS;
            assert!(inside, "{slot:?} in a pool of {} blocks", self.blocks);
        }
        match kv_type {
            KvType::F32 => self.write_as::<f32>(cpu, layer, k, v, slots),
            KvType::F16 => self.write_as::<f16>(cpu, layer, k, v, slots),
            KvType::BF16 => self.write_as::<bf16>(cpu, layer, k, v, slots),
        }
    }

    /// Copies block `from` to block `to` in every layer: the copy of copy-on-write.
    ///
    /// # Panics
    /// Where a block is outside the pool.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        assert!(from < self.blocks && to < self.blocks, "blocks {from}, {to} of {}", self.blocks);
        let block = (self.keys + self.values) * self.shape.kv_type.bytes();
        for layer in 0..self.shape.layers {
            let start = layer * self.blocks;
            let source = (start + from) * block;
            self.memory.bytes_mut().copy_within(source..source + block, (start + to) * block);
        }
    }

    /// All blocks of a layer as elements: `[blocks, K | V]`.
    pub(crate) fn layer<E: Element>(&self, layer: usize) -> LayerBlocks<'_, E> {
        debug_assert_eq!(E::TYPE, self.shape.kv_type);
        let per_layer = self.blocks * (self.keys + self.values);
        let all: &[E] = bytemuck::cast_slice(self.memory.bytes());
        LayerBlocks {
            data: &all[layer * per_layer..][..per_layer],
            keys: self.keys,
            values: self.values,
            kv_heads: self.shape.kv_heads,
        }
    }

    fn write_as<E: Element>(
        &mut self,
        cpu: &Cpu,
        layer: usize,
        k: &[f32],
        v: &[f32],
        slots: &[Slot],
    ) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let (keys, block) = (self.keys, self.keys + self.values);
        let row = self.shape.value_row();
        let start = layer * self.blocks * block;
        let all: &mut [E] = bytemuck::cast_slice_mut(self.memory.bytes_mut());
        let out = ElementsPtr(all[start..].as_mut_ptr());
        let write_head = |head: usize| {
            for (i, slot) in slots.iter().enumerate() {
                let (at, offset) = (slot.block as usize * block, slot.offset as usize);
                let source = (i * kv_heads + head) * head_dim;
                // SAFETY: `write` checked every slot, so both tiles lie inside the layer; tiles of
                // different heads do not overlap, and a head belongs to one task.
                let (k_tile, v_tile) = unsafe {
                    let base = out.get().add(at);
                    let k_tile = base.add(head * head_dim * BLOCK_TOKENS);
                    let v_row = base.add(keys + (head * BLOCK_TOKENS + offset) * row);
                    (
                        std::slice::from_raw_parts_mut(k_tile, head_dim * BLOCK_TOKENS),
                        std::slice::from_raw_parts_mut(v_row, head_dim),
                    )
                };
                for (d, &k) in k[source..][..head_dim].iter().enumerate() {
                    k_tile[d * BLOCK_TOKENS + offset] = E::from_f32(k);
                }
                for (out, &v) in v_tile.iter_mut().zip(&v[source..][..head_dim]) {
                    *out = E::from_f32(v);
                }
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
pub(crate) struct LayerBlocks<'a, E> {
    data: &'a [E],
    keys: usize,
    values: usize,
    kv_heads: usize,
}

impl<'a, E: Element> LayerBlocks<'a, E> {
    /// `[head_dim, 16]`.
    pub(crate) fn keys(&self, block: u32, head: usize) -> &'a [E] {
        let tile = self.keys / self.kv_heads;
        let start = block as usize * (self.keys + self.values) + head * tile;
        &self.data[start..][..tile]
    }

    /// `[16, value_row]`.
    pub(crate) fn values(&self, block: u32, head: usize) -> &'a [E] {
        let tile = self.values / self.kv_heads;
        let start = block as usize * (self.keys + self.values) + self.keys + head * tile;
        &self.data[start..][..tile]
    }
}

/// An element of the cache.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    const TYPE: KvType;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const TYPE: KvType = KvType::F32;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const TYPE: KvType = KvType::F16;
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Element for bf16 {
    const TYPE: KvType = KvType::BF16;
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Zeroed bytes on a 64-byte boundary whose allocation may be refused.
struct Memory {
    /// The allocation: `len` bytes and room to align them.
    raw: NonNull<u8>,
    /// Bytes before the boundary.
    skip: usize,
    len: usize,
}

const ALIGN: usize = 64;

impl Memory {
    fn zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self { raw: NonNull::<[u64; 8]>::dangling().cast(), skip: 0, len });
        }
        // Small alignment: for a large one the standard allocator writes the zeros itself, while
        // here untouched pages are to cost nothing.
        // SAFETY: the size is not zero.
        let raw = NonNull::new(unsafe { alloc_zeroed(Self::layout(len)?) })?;
        Some(Self { raw, skip: raw.as_ptr().align_offset(ALIGN), len })
    }

    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len.checked_add(ALIGN)?, 8).ok()
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `skip` + `len` zeroed bytes were allocated at `raw`.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr().add(self.skip), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.raw.as_ptr().add(self.skip), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.len != 0 {
            let layout = Self::layout(self.len).expect("checked in `zeroed`");
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.raw.as_ptr(), layout) }
        }
    }
}

// SAFETY: the bytes are owned, as a `Vec<u8>`'s are.
unsafe impl Send for Memory {}
// SAFETY: shared access only reads.
unsafe impl Sync for Memory {}

struct ElementsPtr<E>(*mut E);

impl<E> ElementsPtr<E> {
    fn get(&self) -> *mut E {
        self.0
    }
}

// SAFETY: tasks write to disjoint tiles (see `write_as`).
unsafe impl<E: Send> Sync for ElementsPtr<E> {}
