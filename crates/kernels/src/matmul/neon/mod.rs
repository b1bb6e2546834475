//! The kernels for AArch64: four registers hold the 16 rows of a tile, a quarter each.
//!
//! Every body exists once. The integer kernels take what the instruction sets differ in from
//! [`dot::Dot`]; all others need no more than NEON.

mod dense;
mod dot;
mod integer;
mod quantize;

pub(super) use dense::{dense_bf16, dense_f8, dense_f16, dense_f32};
pub(super) use integer::{integer, integer_dot, integer_i8mm};
pub(super) use quantize::{quantize_block, quantize_pairs};

use std::arch::aarch64::*;

use super::layout::ROWS;

/// Quarters of a tile.
const QUARTERS: usize = ROWS / 4;

/// The four rows that a register holds.
type Quarter = usize;

/// The 32-bit word `index` of `block`, in all lanes.
#[inline]
#[target_feature(enable = "neon")]
fn word(block: &[u8], index: usize) -> int32x4_t {
    vdupq_n_s32(i32::from_ne_bytes(*part(block, index * 4)))
}

/// The 16 bytes at `start`.
#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8], start: usize) -> uint8x16_t {
    let bytes: &[u8; 16] = part(bytes, start);
    // SAFETY: reads exactly the array; any address will do.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// The four singles at `start`.
#[inline]
#[target_feature(enable = "neon")]
fn single(bytes: &[u8], start: usize) -> float32x4_t {
    vreinterpretq_f32_u8(load(bytes, start))
}

/// Four halves as singles.
#[inline]
#[target_feature(enable = "neon")]
fn halves(bytes: &[u8; 8]) -> float32x4_t {
    vcvt_f32_f16(vreinterpret_f16_u8(load64(bytes)))
}

/// Four bf16 numbers as singles.
#[inline]
#[target_feature(enable = "neon")]
fn bf16s(bytes: &[u8; 8]) -> float32x4_t {
    vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(load64(bytes))))
}

#[inline]
#[target_feature(enable = "neon")]
fn load64(bytes: &[u8; 8]) -> uint8x8_t {
    // SAFETY: as in `load`.
    unsafe { vld1_u8(bytes.as_ptr()) }
}

/// The `N` elements at `start`.
#[inline(always)]
fn part<T, const N: usize>(values: &[T], start: usize) -> &[T; N] {
    values[start..].first_chunk().expect("lengths are those of the layout")
}

#[inline]
#[target_feature(enable = "neon")]
fn store(out: &mut [f32; ROWS], quarter: Quarter, value: float32x4_t) {
    let (quarters, _) = out.as_chunks_mut::<4>();
    // SAFETY: writes exactly an array of four values; any address will do.
    unsafe { vst1q_f32(quarters[quarter].as_mut_ptr(), value) }
}
