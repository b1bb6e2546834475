//! Q2_K: 2-bit integers in super-blocks, 4-bit scales and minima per 16 values.

use bytemuck::{Pod, Zeroable};

use super::affine::fit_super_block;
use super::block::{Block, Coded, Half};
use super::grid::Levels;

/// 256 values `d * sc[j] * q - dmin * m[j]`, `q` of 2 bits, `j` the group of 16: 2.625 bits a value.
///
/// ```text
/// byte  0..16  scales  byte j: sc[j] in the low half, m[j] in the high half
///      16..80  qs      value 128c + 32s + i: bits 2s..2s+2 of byte 32c + i
///      80..82  d       f16
///      82..84  dmin    f16
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// 4-bit scales and minima; see [`BlockQ2K::scale_min`].
    pub scales: [u8; 16],
    /// Four values a byte.
    pub qs: [u8; 64],
    /// The scale of the scales.
    pub d: Half,
    /// The scale of the minima.
    pub dmin: Half,
}

const _: () = assert!(size_of::<BlockQ2K>() == 84);

/// The 2-bit field of value `i` in a plane of 64 bytes.
#[inline(always)]
pub(super) fn two_bits(qs: &[u8; 64], i: usize) -> u8 {
    (qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3
}

/// Packs 2-bit codes into a plane of 64 bytes.
#[inline(always)]
pub(super) fn pack_two_bits(codes: &[u8; 256]) -> [u8; 64] {
    std::array::from_fn(|b| {
        let at = b / 32 * 128 + b % 32;
        codes[at] | codes[at + 32] << 2 | codes[at + 64] << 4 | codes[at + 96] << 6
    })
}

impl BlockQ2K {
    /// The integer scale and minimum of group `j` of 16 values, each 0 to 15.
    #[inline(always)]
    pub fn scale_min(&self, j: usize) -> (u8, u8) {
        (self.scales[j] & 15, self.scales[j] >> 4)
    }
}

impl Block<256> for BlockQ2K {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for j in 0..16 {
            let (sc, m) = self.scale_min(j);
            let (d, m) = (d * f32::from(sc), dmin * f32::from(m));
            for i in 16 * j..16 * (j + 1) {
                out[i] = d * f32::from(two_bits(&self.qs, i)) - m;
            }
        }
    }
}

impl Coded<256> for BlockQ2K {
    const LIMIT: f32 = Half::MAX * 15.0;
    const GROUP: usize = 16;
    const LEVELS: Levels = Levels::Integers { low: 0, high: 3 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let fit = fit_super_block::<3, 15, 16, 16>(x, w);
        let block = Self {
            scales: std::array::from_fn(|j| fit.scales[j] | fit.minima[j] << 4),
            qs: [0; 64],
            d: Half::exactly(fit.d),
            dmin: Half::exactly(fit.dmin),
        };
        (block, fit.codes)
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        self.qs = pack_two_bits(codes);
    }

    #[inline(always)]
    fn group(&self, j: usize) -> (f32, f32) {
        let (sc, m) = self.scale_min(j);
        (self.d.to_f32() * f32::from(sc), -(self.dmin.to_f32() * f32::from(m)))
    }
}
