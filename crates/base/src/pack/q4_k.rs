//! Q4_K: 4-bit integers in super-blocks, 6-bit scales and minima per 32 values.

use bytemuck::{Pod, Zeroable};

use super::affine::fit_super_block;
use super::block::{Block, Coded, Half};
use super::grid::Levels;

/// 256 values `d * sc[j] * q - dmin * m[j]`, `q` of 4 bits, `j` the group of 32: 4.5 bits a value.
///
/// ```text
/// byte   0..2    d       f16
///        2..4    dmin    f16
///        4..16   scales  see `ScalesMins`
///       16..144  qs      byte 32c + i: q[64c + i] in the low half, q[64c + 32 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// The scale of the scales.
    pub d: Half,
    /// The scale of the minima.
    pub dmin: Half,
    /// Eight 6-bit scales and minima.
    pub scales: ScalesMins,
    /// Two values a byte.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144);

/// Eight pairs of 6-bit scale `sc` and minimum `m`, shared by Q4_K and Q5_K.
///
/// ```text
/// byte  0..4   byte k: sc[k] in bits 0..6, bits 4..6 of sc[4 + k] in bits 6..8
///       4..8   byte k: m[k]  in bits 0..6, bits 4..6 of m[4 + k]  in bits 6..8
///       8..12  byte k: bits 0..4 of sc[4 + k] in the low half, of m[4 + k] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct ScalesMins(pub [u8; 12]);

impl ScalesMins {
    /// Packs eight scales and eight minima, each 0 to 63.
    #[inline(always)]
    pub fn new(scales: [u8; 8], minima: [u8; 8]) -> Self {
        let mut bytes = [0; 12];
        for k in 0..4 {
            bytes[k] = scales[k] & 63 | scales[4 + k] >> 4 << 6;
            bytes[4 + k] = minima[k] & 63 | minima[4 + k] >> 4 << 6;
            bytes[8 + k] = scales[4 + k] & 15 | minima[4 + k] << 4;
        }
        Self(bytes)
    }

    /// The integer scale and minimum of group `j` of 32 values.
    #[inline(always)]
    pub fn scale_min(&self, j: usize) -> (u8, u8) {
        let b = &self.0;
        if j < 4 {
            (b[j] & 63, b[4 + j] & 63)
        } else {
            (b[4 + j] & 15 | b[j - 4] >> 6 << 4, b[4 + j] >> 4 | b[j] >> 6 << 4)
        }
    }
}

impl Block<256> for BlockQ4K {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for j in 0..8 {
            let (sc, m) = self.scales.scale_min(j);
            let (d, m) = (d * f32::from(sc), dmin * f32::from(m));
            let shift = j % 2 * 4;
            for i in 0..32 {
                let q = (self.qs[j / 2 * 32 + i] >> shift) & 15;
                out[32 * j + i] = d * f32::from(q) - m;
            }
        }
    }
}

impl Coded<256> for BlockQ4K {
    const LIMIT: f32 = Half::MAX * 63.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: 0, high: 15 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let fit = fit_super_block::<15, 63, 32, 8>(x, w);
        let block = Self {
            d: Half::exactly(fit.d),
            dmin: Half::exactly(fit.dmin),
            scales: ScalesMins::new(fit.scales, fit.minima),
            ..Self::zeroed()
        };
        (block, fit.codes)
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        self.qs = std::array::from_fn(|b| {
            let at = b / 32 * 64 + b % 32;
            codes[at] | codes[at + 32] << 4
        });
    }

    #[inline(always)]
    fn group(&self, j: usize) -> (f32, f32) {
        let (sc, m) = self.scales.scale_min(j);
        (self.d.to_f32() * f32::from(sc), -(self.dmin.to_f32() * f32::from(m)))
    }
}
