//! IQ2_XXS, IQ2_XS and IQ2_S: eight magnitudes at a time from a codebook, signs beside them.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Half, Quantize};
use super::codebook::{Codebook, Run, count_runs, fit_super_block, runs};
use super::grids::{
    IQ2_LEVELS, IQ2_S, IQ2_S_CODES, IQ2_XS, IQ2_XS_CODES, IQ2_XXS, IQ2_XXS_CODES, SIGNS,
};

/// 256 values in 8 groups of 32, `d * (0.5 + sc) / 4 * ±entry`: 2.0625 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..66  qs   8 groups of 8 bytes:
///                   byte 0..4  entry[k] of `grids::IQ2_XXS`, for values 8k..8k + 8 of the group
///                   byte 4..8  u32: bits 7k..7k + 7 index `grids::SIGNS`, bits 28..32 are sc
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ2XXS {
    /// The scale of the scales.
    pub d: Half,
    /// Entries, signs and scale of each group of 32 values.
    pub qs: [[u8; 8]; 8],
}

const _: () = assert!(size_of::<BlockIQ2XXS>() == 66);

/// 256 values, `d * (0.5 + sc[j]) / 4 * ±entry`, `j` the group of 16: 2.3125 bits a value.
///
/// ```text
/// byte  0..2   d       f16
///       2..66  qs      32 u16, for values 8k..8k + 8: bits 0..9 index `grids::IQ2_XS`,
///                      bits 9..16 index `grids::SIGNS`
///      66..74  scales  byte k: sc[2k] in the low half, sc[2k + 1] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ2XS {
    /// The scale of the scales.
    pub d: Half,
    /// Entry and signs of each group of 8 values, little-endian.
    pub qs: [[u8; 2]; 32],
    /// 4-bit scales of the groups of 16 values.
    pub scales: [u8; 8],
}

const _: () = assert!(size_of::<BlockIQ2XS>() == 74);

/// 256 values, `d * (0.5 + sc[j]) / 4 * ±entry`, `j` the group of 16: 2.5625 bits a value.
///
/// ```text
/// byte  0..2   d       f16
///       2..34  qs      byte k: bits 0..8 of the index into `grids::IQ2_S` for values 8k..8k + 8
///      34..66  signs   byte k, bit i: value 8k + i is negative
///      66..74  qh      byte k: bits 8..10 of the indices 4k..4k + 4, lowest first
///      74..82  scales  byte k: sc[2k] in the low half, sc[2k + 1] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ2S {
    /// The scale of the scales.
    pub d: Half,
    /// The low eight bits of the indices.
    pub qs: [u8; 32],
    /// A bit a value.
    pub signs: [u8; 32],
    /// The high two bits of the indices.
    pub qh: [u8; 8],
    /// 4-bit scales of the groups of 16 values.
    pub scales: [u8; 8],
}

const _: () = assert!(size_of::<BlockIQ2S>() == 82);

impl Block<256> for BlockIQ2XXS {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        for (qs, out) in self.qs.iter().zip(out.as_chunks_mut::<32>().0) {
            let word = u32::from_le_bytes([qs[4], qs[5], qs[6], qs[7]]);
            let d = d * (0.5 + (word >> 28) as f32) * 0.25;
            for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let signs = SIGNS[(word >> (7 * k)) as usize & 127];
                signed(d, &IQ2_XXS[usize::from(qs[k])], signs, out);
            }
        }
    }
}

impl Block<256> for BlockIQ2XS {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        for (k, (q, out)) in self.qs.iter().zip(out.as_chunks_mut().0).enumerate() {
            let q = usize::from(u16::from_le_bytes(*q));
            signed(scaled(d, &self.scales, k / 2), &IQ2_XS[q & 511], SIGNS[q >> 9], out);
        }
    }
}

impl BlockIQ2S {
    /// The index into [`IQ2_S`] of the entry for values `8k..8k + 8`.
    #[inline(always)]
    pub fn index(&self, k: usize) -> usize {
        usize::from(self.qs[k]) | (usize::from(self.qh[k / 4]) >> (k % 4 * 2) & 3) << 8
    }
}

impl Block<256> for BlockIQ2S {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let d = scaled(d, &self.scales, k / 2);
            signed(d, &IQ2_S[self.index(k)], self.signs[k], out);
        }
    }
}

/// The scale of group `j` of 16 values.
#[inline(always)]
fn scaled(d: f32, scales: &[u8; 8], j: usize) -> f32 {
    d * (0.5 + f32::from((scales[j / 2] >> (j % 2 * 4)) & 15)) * 0.25
}

#[inline(always)]
fn signed(d: f32, entry: &[u8; 8], signs: u8, out: &mut [f32; 8]) {
    for i in 0..8 {
        let value = d * f32::from(entry[i]);
        out[i] = if signs >> i & 1 == 0 { value } else { -value };
    }
}

/// The codebook of IQ2_XXS.
pub(super) struct Xxs;

impl Codebook<8> for Xxs {
    const RUNS: &'static [Run] = &runs::<{ count_runs(&IQ2_XXS_CODES, 2) }>(&IQ2_XXS_CODES, 2);
    const ENTRIES: &'static [[u8; 8]] = &IQ2_XXS;
    const LEVELS: &'static [u8] = &IQ2_LEVELS;
    const GROUP: usize = 32;
    const UNIT: f32 = 0.125;
    const EVEN: bool = true;
}

/// The codebook of IQ2_XS.
pub(super) struct Xs;

impl Codebook<8> for Xs {
    const RUNS: &'static [Run] = &runs::<{ count_runs(&IQ2_XS_CODES, 2) }>(&IQ2_XS_CODES, 2);
    const ENTRIES: &'static [[u8; 8]] = &IQ2_XS;
    const LEVELS: &'static [u8] = &IQ2_LEVELS;
    const GROUP: usize = 16;
    const UNIT: f32 = 0.125;
    const EVEN: bool = true;
}

/// The codebook of IQ2_S.
pub(super) struct S;

impl Codebook<8> for S {
    const RUNS: &'static [Run] = &runs::<{ count_runs(&IQ2_S_CODES, 2) }>(&IQ2_S_CODES, 2);
    const ENTRIES: &'static [[u8; 8]] = &IQ2_S;
    const LEVELS: &'static [u8] = &IQ2_LEVELS;
    const GROUP: usize = 16;
    const UNIT: f32 = 0.125;
    const EVEN: bool = false;
}

/// The largest magnitude of an IQ2 layout.
const LIMIT: f32 = Half::MAX * 31.0 / 8.0 * 43.0;

impl Quantize<256> for BlockIQ2XXS {
    const LIMIT: f32 = LIMIT;

    #[inline(always)]
    fn quantize(x: &[f32; 256], w: &[f32; 256]) -> Self {
        let fit = fit_super_block::<Xxs, 8, 32>(x, w);
        let mut block = Self { d: Half::exactly(fit.d), qs: [[0; 8]; 8] };
        for j in 0..8 {
            let mut word = u32::from(fit.scales[j]) << 28;
            for k in 0..4 {
                block.qs[j][k] = fit.entries[4 * j + k] as u8;
                word |= u32::from(fit.signs[4 * j + k] & 127) << (7 * k);
            }
            block.qs[j][4..].copy_from_slice(&word.to_le_bytes());
        }
        block
    }
}

/// Sixteen 4-bit scales, two a byte.
#[inline(always)]
fn pack_scales(scales: &[u8; 16]) -> [u8; 8] {
    std::array::from_fn(|k| scales[2 * k] | scales[2 * k + 1] << 4)
}

impl Quantize<256> for BlockIQ2XS {
    const LIMIT: f32 = LIMIT;

    #[inline(always)]
    fn quantize(x: &[f32; 256], w: &[f32; 256]) -> Self {
        let fit = fit_super_block::<Xs, 8, 32>(x, w);
        let field = |k: usize| fit.entries[k] | u16::from(fit.signs[k] & 127) << 9;
        Self {
            d: Half::exactly(fit.d),
            qs: std::array::from_fn(|k| field(k).to_le_bytes()),
            scales: pack_scales(&fit.scales),
        }
    }
}

impl Quantize<256> for BlockIQ2S {
    const LIMIT: f32 = LIMIT;

    #[inline(always)]
    fn quantize(x: &[f32; 256], w: &[f32; 256]) -> Self {
        let fit = fit_super_block::<S, 8, 32>(x, w);
        let mut qh = [0; 8];
        for k in 0..32 {
            qh[k / 4] |= ((fit.entries[k] >> 8) as u8) << (k % 4 * 2);
        }
        Self {
            d: Half::exactly(fit.d),
            qs: fit.entries.map(|entry| entry as u8),
            signs: fit.signs,
            qh,
            scales: pack_scales(&fit.scales),
        }
    }
}
