//! IQ3_XXS and IQ3_S: four magnitudes at a time from a codebook, signs beside them.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Half, Quantize};
use super::codebook::{Codebook, Run, count_runs, fit_super_block, runs};
use super::grids::{
    IQ3_S, IQ3_S_CODES, IQ3_S_LEVELS, IQ3_XXS, IQ3_XXS_CODES, IQ3_XXS_LEVELS, SIGNS,
};

/// 256 values in 8 groups of 32, `d * (0.5 + sc[j]) / 2 * ±entry`: 3.0625 bits a value.
///
/// ```text
/// byte  0..2   d      f16
///       2..66  qs     byte k: entry of `grids::IQ3_XXS` for values 4k..4k + 4
///      66..98  signs  8 u32, one a group: bits 7k..7k + 7 index `grids::SIGNS` for values
///                     8k..8k + 8 of the group, bits 28..32 are sc
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ3XXS {
    /// The scale of the scales.
    pub d: Half,
    /// Entries of the codebook.
    pub qs: [u8; 64],
    /// Signs and scale of each group of 32 values, little-endian.
    pub signs: [[u8; 4]; 8],
}

const _: () = assert!(size_of::<BlockIQ3XXS>() == 98);

/// 256 values in 8 groups of 32, `d * (1 + 2 sc[j]) * ±entry`: 3.4375 bits a value.
///
/// ```text
/// byte   0..2    d       f16
///        2..66   qs      byte k: bits 0..8 of the index into `grids::IQ3_S` for values 4k..4k + 4
///       66..74   qh      byte k / 8, bit k % 8: bit 8 of the index
///       74..106  signs   byte k, bit i: value 8k + i is negative
///      106..110  scales  byte k: sc[2k] in the low half, sc[2k + 1] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ3S {
    /// The scale of the scales.
    pub d: Half,
    /// The low eight bits of the indices.
    pub qs: [u8; 64],
    /// The ninth bits of the indices.
    pub qh: [u8; 8],
    /// A bit a value.
    pub signs: [u8; 32],
    /// 4-bit scales of the groups of 32 values.
    pub scales: [u8; 4],
}

const _: () = assert!(size_of::<BlockIQ3S>() == 110);

impl Block<256> for BlockIQ3XXS {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let word = u32::from_le_bytes(self.signs[k / 8]);
            let d = d * (0.5 + (word >> 28) as f32) * 0.5;
            let signs = SIGNS[(word >> (k / 2 % 4 * 7)) as usize & 127] >> (k % 2 * 4);
            signed(d, &IQ3_XXS[usize::from(self.qs[k])], signs, out);
        }
    }
}

impl BlockIQ3S {
    /// The index into [`IQ3_S`] of the entry for values `4k..4k + 4`.
    #[inline(always)]
    pub fn index(&self, k: usize) -> usize {
        usize::from(self.qs[k]) | (usize::from(self.qh[k / 8]) >> (k % 8) & 1) << 8
    }
}

impl Block<256> for BlockIQ3S {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let scale = (self.scales[k / 16] >> (k / 8 % 2 * 4)) & 15;
            let signs = self.signs[k / 2] >> (k % 2 * 4);
            signed(d * f32::from(1 + 2 * scale), &IQ3_S[self.index(k)], signs, out);
        }
    }
}

#[inline(always)]
fn signed(d: f32, entry: &[u8; 4], signs: u8, out: &mut [f32; 4]) {
    for i in 0..4 {
        let value = d * f32::from(entry[i]);
        out[i] = if signs >> i & 1 == 0 { value } else { -value };
    }
}

/// The codebook of IQ3_XXS.
pub(super) struct Xxs;

impl Codebook<4> for Xxs {
    const RUNS: &'static [Run] = &runs::<{ count_runs(&IQ3_XXS_CODES, 4) }>(&IQ3_XXS_CODES, 4);
    const ENTRIES: &'static [[u8; 4]] = &IQ3_XXS;
    const LEVELS: &'static [u8] = &IQ3_XXS_LEVELS;
    const GROUP: usize = 32;
    const UNIT: f32 = 0.25;
    const EVEN: bool = true;
}

/// The codebook of IQ3_S.
pub(super) struct S;

impl Codebook<4> for S {
    const RUNS: &'static [Run] = &runs::<{ count_runs(&IQ3_S_CODES, 4) }>(&IQ3_S_CODES, 4);
    const ENTRIES: &'static [[u8; 4]] = &IQ3_S;
    const LEVELS: &'static [u8] = &IQ3_S_LEVELS;
    const GROUP: usize = 32;
    const UNIT: f32 = 1.0;
    const EVEN: bool = false;
}

impl Quantize<256> for BlockIQ3XXS {
    const LIMIT: f32 = Half::MAX * 31.0 / 4.0 * 62.0;

    #[inline(always)]
    fn quantize(x: &[f32; 256], w: &[f32; 256]) -> Self {
        let fit = fit_super_block::<Xxs, 4, 64>(x, w);
        let mut signs = [[0; 4]; 8];
        for j in 0..8 {
            let mut word = u32::from(fit.scales[j]) << 28;
            for k in 0..4 {
                word |= u32::from(fit.signs[4 * j + k] & 127) << (7 * k);
            }
            signs[j] = word.to_le_bytes();
        }
        Self { d: Half::exactly(fit.d), qs: fit.entries.map(|entry| entry as u8), signs }
    }
}

impl Quantize<256> for BlockIQ3S {
    const LIMIT: f32 = Half::MAX * 31.0 * 15.0;

    #[inline(always)]
    fn quantize(x: &[f32; 256], w: &[f32; 256]) -> Self {
        let fit = fit_super_block::<S, 4, 64>(x, w);
        let mut qh = [0; 8];
        for k in 0..64 {
            qh[k / 8] |= ((fit.entries[k] >> 8) as u8) << (k % 8);
        }
        Self {
            d: Half::exactly(fit.d),
            qs: fit.entries.map(|entry| entry as u8),
            qh,
            signs: fit.signs,
            scales: std::array::from_fn(|k| fit.scales[2 * k] | fit.scales[2 * k + 1] << 4),
        }
    }
}
