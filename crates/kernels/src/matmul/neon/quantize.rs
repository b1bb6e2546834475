//! Activations rounded to bytes.

use std::arch::aarch64::*;

use super::super::activations::{Rounded, factor_and_scale, put_rounded};
use super::super::layout::GROUP;

/// Rounds the `tokens` rows of `x` to int8 groups, into one block.
#[target_feature(enable = "neon")]
pub(in super::super) fn quantize_block(x: &[f32], tokens: usize, out: &mut [u8]) {
    put_rounded::<1>(x, tokens, out, |group| round(group));
}

/// As [`quantize_block`], with pairs of a token's quads together, as products of matrices take them.
#[target_feature(enable = "neon")]
pub(in super::super) fn quantize_pairs(x: &[f32], tokens: usize, out: &mut [u8]) {
    put_rounded::<2>(x, tokens, out, |group| round(group));
}

#[inline]
#[target_feature(enable = "neon")]
fn round(group: &[f32; GROUP]) -> Rounded {
    let (quarters, _) = group.as_chunks::<4>();
    // SAFETY: reads exactly an array of four values.
    let x: [_; GROUP / 4] = std::array::from_fn(|i| unsafe { vld1q_f32(quarters[i].as_ptr()) });
    let most = x.map(|v| vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fff_ffff)));
    let most = most.into_iter().fold(vdupq_n_u32(0), |most, v| vmaxq_u32(most, v));
    let (factor, scale) = factor_and_scale(vmaxvq_u32(most));
    // Converting rounds to nearest, ties to even.
    let q = x.map(|v| vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v, factor))));
    let mut codes = [0; GROUP];
    let mut negative_sums = [0; 3];
    for half in 0..2 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| q[half * 4 + i]);
        let bytes = vcombine_s8(vmovn_s16(vcombine_s16(a, b)), vmovn_s16(vcombine_s16(c, d)));
        let (halves, _) = codes.as_chunks_mut::<16>();
        // SAFETY: writes exactly an array of 16 bytes.
        unsafe { vst1q_s8(halves[half].as_mut_ptr(), bytes) };
        negative_sums[1 + half] = -i32::from(vaddlvq_s8(bytes));
    }
    negative_sums[0] = negative_sums[1] + negative_sums[2];
    Rounded { codes, scale, negative_sums }
}
