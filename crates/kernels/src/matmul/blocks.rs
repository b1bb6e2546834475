//! The blocks of packed file types, taken apart into codes and scales.

use bevel_base::DType;
use bevel_base::pack::iq2::{BlockIQ2S, BlockIQ2XS, BlockIQ2XXS};
use bevel_base::pack::iq3::{BlockIQ3S, BlockIQ3XXS};
use bevel_base::pack::iq4::{BlockIQ4NL, BlockIQ4XS};
use bevel_base::pack::mxfp4::BlockMXFP4;
use bevel_base::pack::q2_k::BlockQ2K;
use bevel_base::pack::q3_k::BlockQ3K;
use bevel_base::pack::q4_0::BlockQ4_0;
use bevel_base::pack::q4_1::BlockQ4_1;
use bevel_base::pack::q4_k::{BlockQ4K, ScalesMins};
use bevel_base::pack::q5_0::BlockQ5_0;
use bevel_base::pack::q5_1::BlockQ5_1;
use bevel_base::pack::q5_k::BlockQ5K;
use bevel_base::pack::q6_k::BlockQ6K;
use bevel_base::pack::q8_0::BlockQ8_0;
use bevel_base::pack::tq::{BlockTQ1_0, BlockTQ2_0};
use bevel_base::pack::{Block, Half};

use super::layout;

/// A block's parts, in the terms of the tile layouts.
pub(super) struct Parts {
    /// Unsigned codes, one a value.
    pub(super) codes: [u8; 256],
    /// The block's scale: the bits of an f16 (of a bf16 for MXFP4).
    pub(super) scale: u16,
    /// The block's minimum, or what sub-minima are multiplied with: the bits of an f16.
    pub(super) min: u16,
    /// Scales of the runs of 16 or 32 values.
    pub(super) sub_scales: [i8; 16],
    /// Minima of the runs of 16 or 32 values.
    pub(super) sub_mins: [u8; 16],
}

/// Calls `visit(index, parts)` for each block of a row of the packed type `dtype`.
pub(super) fn each_block(dtype: DType, row: &[u8], visit: &mut dyn FnMut(usize, &Parts)) {
    fn each<B: TakeApart>(row: &[u8], visit: &mut dyn FnMut(usize, &Parts)) {
        let mut parts =
            Parts { codes: [0; 256], scale: 0, min: 0, sub_scales: [0; 16], sub_mins: [0; 16] };
        for (index, block) in bytemuck::cast_slice::<u8, B>(row).iter().enumerate() {
            block.take_apart(&mut parts);
            visit(index, &parts);
        }
    }
    match dtype {
        DType::Q4_0 => each::<BlockQ4_0>(row, visit),
        DType::Q4_1 => each::<BlockQ4_1>(row, visit),
        DType::Q5_0 => each::<BlockQ5_0>(row, visit),
        DType::Q5_1 => each::<BlockQ5_1>(row, visit),
        DType::Q8_0 => each::<BlockQ8_0>(row, visit),
        DType::Q2_K => each::<BlockQ2K>(row, visit),
        DType::Q3_K => each::<BlockQ3K>(row, visit),
        DType::Q4_K => each::<BlockQ4K>(row, visit),
        DType::Q5_K => each::<BlockQ5K>(row, visit),
        DType::Q6_K => each::<BlockQ6K>(row, visit),
        DType::IQ2_XXS => each::<BlockIQ2XXS>(row, visit),
        DType::IQ2_XS => each::<BlockIQ2XS>(row, visit),
        DType::IQ2_S => each::<BlockIQ2S>(row, visit),
        DType::IQ3_XXS => each::<BlockIQ3XXS>(row, visit),
        DType::IQ3_S => each::<BlockIQ3S>(row, visit),
        DType::IQ4_NL => each::<BlockIQ4NL>(row, visit),
        DType::IQ4_XS => each::<BlockIQ4XS>(row, visit),
        DType::TQ1_0 => each::<BlockTQ1_0>(row, visit),
        DType::TQ2_0 => each::<BlockTQ2_0>(row, visit),
        DType::MXFP4 => each::<BlockMXFP4>(row, visit),
        plain => unreachable!("{plain} has no blocks"),
    }
}

/// A file's block that has codes and scales.
trait TakeApart: bytemuck::Pod {
    /// Writes the block's parts; those that the type does not have stay as they are.
    fn take_apart(&self, parts: &mut Parts);
}

impl TakeApart for BlockQ4_0 {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        nibbles(&self.qs, &mut parts.codes);
    }
}

impl TakeApart for BlockQ4_1 {
    fn take_apart(&self, parts: &mut Parts) {
        (parts.scale, parts.min) = (self.d.to_bits(), self.m.to_bits());
        nibbles(&self.qs, &mut parts.codes);
    }
}

impl TakeApart for BlockQ5_0 {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        nibbles(&self.qs, &mut parts.codes);
        fifth_bits(self.qh, &mut parts.codes[..32]);
    }
}

impl TakeApart for BlockQ5_1 {
    fn take_apart(&self, parts: &mut Parts) {
        (parts.scale, parts.min) = (self.d.to_bits(), self.m.to_bits());
        nibbles(&self.qs, &mut parts.codes);
        fifth_bits(self.qh, &mut parts.codes[..32]);
    }
}

impl TakeApart for BlockQ8_0 {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        for (code, &q) in parts.codes.iter_mut().zip(&self.qs) {
            *code = q as u8 ^ 0x80;
        }
    }
}

impl TakeApart for BlockIQ4NL {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        nibbles(&self.qs, &mut parts.codes);
    }
}

impl TakeApart for BlockMXFP4 {
    fn take_apart(&self, parts: &mut Parts) {
        // A power of two, which a bf16 holds exactly down to the smallest of E8M0.
        parts.scale = (self.scale().to_bits() >> 16) as u16;
        nibbles(&self.qs, &mut parts.codes);
    }
}

impl TakeApart for BlockQ2K {
    fn take_apart(&self, parts: &mut Parts) {
        (parts.scale, parts.min) = (self.d.to_bits(), self.dmin.to_bits());
        for j in 0..16 {
            let (scale, min) = self.scale_min(j);
            (parts.sub_scales[j], parts.sub_mins[j]) = (scale as i8, min);
        }
        pairs(&self.qs, &mut parts.codes);
    }
}

impl TakeApart for BlockQ3K {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        parts.sub_scales = self.scales();
        pairs(&self.qs, &mut parts.codes);
        for (b, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
            for (code, &mask) in codes.iter_mut().zip(&self.hmask) {
                *code |= (mask >> b & 1) << 2;
            }
        }
    }
}

impl TakeApart for BlockQ4K {
    fn take_apart(&self, parts: &mut Parts) {
        (parts.scale, parts.min) = (self.d.to_bits(), self.dmin.to_bits());
        scales_mins(&self.scales, parts);
        for (qs, codes) in self.qs.chunks_exact(32).zip(parts.codes.chunks_exact_mut(64)) {
            nibbles(qs, codes);
        }
    }
}

impl TakeApart for BlockQ5K {
    fn take_apart(&self, parts: &mut Parts) {
        (parts.scale, parts.min) = (self.d.to_bits(), self.dmin.to_bits());
        scales_mins(&self.scales, parts);
        for (qs, codes) in self.qs.chunks_exact(32).zip(parts.codes.chunks_exact_mut(64)) {
            nibbles(qs, codes);
        }
        for (j, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
            for (code, &high) in codes.iter_mut().zip(&self.qh) {
                *code |= (high >> j & 1) << 4;
            }
        }
    }
}

impl TakeApart for BlockQ6K {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        parts.sub_scales = self.scales;
        let mut high = [0; 256];
        pairs(&self.qh, &mut high);
        for (ql, codes) in self.ql.chunks_exact(64).zip(parts.codes.chunks_exact_mut(128)) {
            nibbles(ql, codes);
        }
        for (code, high) in parts.codes.iter_mut().zip(high) {
            *code |= high << 4;
        }
    }
}

impl TakeApart for BlockIQ4XS {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        for j in 0..8 {
            parts.sub_scales[j] = self.scale(j);
        }
        for (qs, codes) in self.qs.chunks_exact(16).zip(parts.codes.chunks_exact_mut(32)) {
            nibbles(qs, codes);
        }
    }
}

impl TakeApart for BlockTQ1_0 {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        parts.codes = self.trits().map(|trit| (trit + 1) as u8);
    }
}

impl TakeApart for BlockTQ2_0 {
    fn take_apart(&self, parts: &mut Parts) {
        parts.scale = self.d.to_bits();
        pairs(&self.qs, &mut parts.codes);
    }
}

impl TakeApart for BlockIQ2XXS {
    fn take_apart(&self, parts: &mut Parts) {
        let sub_scales: [u8; 8] = self.qs.map(|group| group[7] >> 4);
        codebook(DType::IQ2_XXS, &Self { d: ONE, ..*self }, self.d, &sub_scales, parts);
    }
}

impl TakeApart for BlockIQ2XS {
    fn take_apart(&self, parts: &mut Parts) {
        let sub_scales = each_nibble::<16>(&self.scales);
        codebook(DType::IQ2_XS, &Self { d: ONE, ..*self }, self.d, &sub_scales, parts);
    }
}

impl TakeApart for BlockIQ2S {
    fn take_apart(&self, parts: &mut Parts) {
        let sub_scales = each_nibble::<16>(&self.scales);
        codebook(DType::IQ2_S, &Self { d: ONE, ..*self }, self.d, &sub_scales, parts);
    }
}

impl TakeApart for BlockIQ3XXS {
    fn take_apart(&self, parts: &mut Parts) {
        let sub_scales: [u8; 8] = self.signs.map(|group| group[3] >> 4);
        codebook(DType::IQ3_XXS, &Self { d: ONE, ..*self }, self.d, &sub_scales, parts);
    }
}

impl TakeApart for BlockIQ3S {
    fn take_apart(&self, parts: &mut Parts) {
        let sub_scales = each_nibble::<8>(&self.scales);
        codebook(DType::IQ3_S, &Self { d: ONE, ..*self }, self.d, &sub_scales, parts);
    }
}

const ONE: Half = Half::from_bits(0x3c00);

/// The codebook types: a value is the block's scale times an odd sub-scale (1 + 2 · four bits) times
/// one of a few magnitudes with a sign. The tile keeps the number of the magnitude and sign.
/// `unit` is the block with a scale of 1, so that its values are sub-scales times levels, exactly.
fn codebook(
    dtype: DType,
    unit: &impl Block<256>,
    scale: Half,
    sub_scales: &[u8],
    parts: &mut Parts,
) {
    parts.scale = scale.to_bits();
    let (levels, factor) = layout::levels(dtype);
    // Which code a level has, by level + 64. Of equal levels the first counts.
    let mut code_of = [0; 128];
    for (code, &level) in (0..16u8).zip(levels).rev() {
        code_of[(level + 64) as usize] = code;
    }
    let mut values = [0.0; 256];
    unit.dequantize(&mut values);
    let run = 256 / sub_scales.len();
    let runs = parts.codes.chunks_exact_mut(run).zip(values.chunks_exact(run));
    for (j, (codes, values)) in runs.enumerate() {
        parts.sub_scales[j] = (1 + 2 * sub_scales[j]) as i8;
        let unit = factor * f32::from(parts.sub_scales[j]);
        for (code, value) in codes.iter_mut().zip(values) {
            *code = code_of[((value / unit) as i8 + 64) as usize];
        }
    }
}

/// Low nibbles are the first values, high nibbles the ones after these.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// All nibbles in their order.
fn each_nibble<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i / 2] >> (i % 2 * 4) & 15)
}

/// Bit i of the four bytes is the fifth bit of value i.
fn fifth_bits(bits: [u8; 4], codes: &mut [u8]) {
    let bits = u32::from_le_bytes(bits);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> i & 1) as u8) << 4;
    }
}

/// Two bits a value, 32 bytes for each 128 values: value 32s + i has bits 2s, 2s + 1 of byte i.
fn pairs(bytes: &[u8; 64], codes: &mut [u8; 256]) {
    for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, &byte) in codes.iter_mut().zip(&bytes[j / 4 * 32..]) {
            *code = byte >> (j % 4 * 2) & 3;
        }
    }
}

/// The 6-bit scales and minima of Q4_K and Q5_K.
fn scales_mins(packed: &ScalesMins, parts: &mut Parts) {
    for j in 0..8 {
        let (scale, min) = packed.scale_min(j);
        (parts.sub_scales[j], parts.sub_mins[j]) = (scale as i8, min);
    }
}
