//! How the keys and the values of one head lie in a block: element types.

use half::{bf16, f16};

use super::BLOCK_TOKENS;
use crate::Isa;

/// A layout of one head's keys, and of its values, in a block of 16 tokens: a *tile* each.
///
/// Unpacked, keys are `[head_dim, 16]` and values `[16, value_row]`, `value_row` being `head_dim`
/// rounded up to 16; what a value's excess holds is arbitrary but finite where the values are.
pub(crate) trait Store: Copy + Send + Sync + 'static {
    /// Bytes of a tile of keys, `None` where they overflow.
    fn key_bytes(head_dim: usize) -> Option<usize>;
    /// Bytes of a tile of values.
    fn value_bytes(head_dim: usize) -> Option<usize>;
    /// Stores a token's key and value, `[head_dim]` each.
    fn put(isa: Isa, keys: &mut [u8], values: &mut [u8], token: usize, k: &[f32], v: &[f32]);
    /// Unpacks keys, exactly.
    fn keys(tile: &[u8], out: &mut [f32]);
    /// Unpacks values, exactly.
    fn values(tile: &[u8], out: &mut [f32]);
}

/// Elements one by one: keys `[head_dim, 16]`, values `[16, value_row]`, the excess zero.
#[derive(Clone, Copy)]
pub(crate) struct Plain<E>(std::marker::PhantomData<E>);

impl<E: Element> Store for Plain<E> {
    fn key_bytes(head_dim: usize) -> Option<usize> {
        head_dim.checked_mul(BLOCK_TOKENS)?.checked_mul(size_of::<E>())
    }

    fn value_bytes(head_dim: usize) -> Option<usize> {
        Self::key_bytes(head_dim.checked_next_multiple_of(BLOCK_TOKENS)?)
    }

    fn put(_: Isa, keys: &mut [u8], values: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
        let keys: &mut [E] = bytemuck::cast_slice_mut(keys);
        for (d, &k) in k.iter().enumerate() {
            keys[d * BLOCK_TOKENS + token] = E::from_f32(k);
        }
        let values: &mut [E] = bytemuck::cast_slice_mut(values);
        let row = values.len() / BLOCK_TOKENS;
        for (value, &v) in values[token * row..].iter_mut().zip(v) {
            *value = E::from_f32(v);
        }
    }

    fn keys(tile: &[u8], out: &mut [f32]) {
        for (out, element) in out.iter_mut().zip(bytemuck::cast_slice::<u8, E>(tile)) {
            *out = element.to_f32();
        }
    }

    fn values(tile: &[u8], out: &mut [f32]) {
        Self::keys(tile, out);
    }
}

/// An element of the cache.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Element for bf16 {
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}
