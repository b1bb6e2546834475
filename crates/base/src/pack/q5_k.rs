//! Q5_K: 5-bit integers in super-blocks, 6-bit scales and minima per 32 values.

use bytemuck::{Pod, Zeroable};

use super::affine::fit_super_block;
use super::block::{Block, Coded, Half};
use super::grid::Levels;
use super::q4_k::ScalesMins;

/// 256 values `d * sc[j] * q - dmin * m[j]`, `q` of 5 bits, `j` the group of 32: 5.5 bits a value.
///
/// ```text
/// byte   0..2    d       f16
///        2..4    dmin    f16
///        4..16   scales  see `ScalesMins`
///       16..48   qh      byte i: bit j is bit 4 of q[32j + i]
///       48..176  qs      byte 32c + i: bits 0..4 of q[64c + i] in the low half, of
///                        q[64c + 32 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// The scale of the scales.
    pub d: Half,
    /// The scale of the minima.
    pub dmin: Half,
    /// Eight 6-bit scales and minima.
    pub scales: ScalesMins,
    /// The fifth bits.
    pub qh: [u8; 32],
    /// The low four bits, two values a byte.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176);

impl Block<256> for BlockQ5K {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for j in 0..8 {
            let (sc, m) = self.scales.scale_min(j);
            let (d, m) = (d * f32::from(sc), dmin * f32::from(m));
            let shift = j % 2 * 4;
            for i in 0..32 {
                let low = (self.qs[j / 2 * 32 + i] >> shift) & 15;
                let high = (self.qh[i] >> j) & 1;
                out[32 * j + i] = d * f32::from(low | high << 4) - m;
            }
        }
    }
}

impl Coded<256> for BlockQ5K {
    const LIMIT: f32 = Half::MAX * 63.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: 0, high: 31 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let fit = fit_super_block::<31, 63, 32, 8>(x, w);
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
        self.qh = [0; 32];
        for j in 0..8 {
            for i in 0..32 {
                self.qh[i] |= codes[32 * j + i] >> 4 << j;
            }
        }
        self.qs = std::array::from_fn(|b| {
            let at = b / 32 * 64 + b % 32;
            codes[at] & 15 | codes[at + 32] << 4
        });
    }

    #[inline(always)]
    fn group(&self, j: usize) -> (f32, f32) {
        let (sc, m) = self.scales.scale_min(j);
        (self.d.to_f32() * f32::from(sc), -(self.dmin.to_f32() * f32::from(m)))
    }
}
