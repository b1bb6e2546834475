//! Q6_K: 6-bit integers in super-blocks, 8-bit scales per 16 values.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::levels::{Integers, code};
use super::q2_k::pack_two_bits;
use super::symmetric::fit_super_block;

/// 256 values `d * scales[j] * (q - 32)`, `q` of 6 bits, `j` the group of 16: 6.5625 bits a value.
///
/// ```text
/// byte   0..128  ql      byte 64c + i: bits 0..4 of q[128c + i] in the low half, of
///                        q[128c + 64 + i] in the high half
///      128..192  qh      value 128c + 32s + i: bits 2s..2s+2 of byte 32c + i are bits 4..6 of q
///      192..208  scales  i8 each
///      208..210  d       f16
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// The low four bits, two values a byte.
    pub ql: [u8; 128],
    /// The high two bits, four values a byte.
    pub qh: [u8; 64],
    /// The integer scales of the groups of 16 values.
    pub scales: [i8; 16],
    /// The scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<BlockQ6K>() == 210);

impl Block<256> for BlockQ6K {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        let d: [f32; 16] = std::array::from_fn(|j| d * f32::from(self.scales[j]));
        for r in 0..8 {
            // Run r: values 32r..32r + 32.
            let (ql, low) = (r / 4 * 64 + r % 2 * 32, r % 4 / 2 * 4);
            let (qh, high) = (r / 4 * 32, r % 4 * 2);
            for i in 0..32 {
                let q = (self.ql[ql + i] >> low) & 15 | ((self.qh[qh + i] >> high) & 3) << 4;
                out[32 * r + i] = d[2 * r + i / 16] * (i32::from(q) - 32) as f32;
            }
        }
    }
}

impl Coded<256> for BlockQ6K {
    const LIMIT: f32 = Half::MAX * 4096.0;
    const GROUP: usize = 16;
    const LEVELS: Levels = Levels::Integers { low: -32, high: 31 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let fit = fit_super_block::<Integers<-32, 31>, Integers<-128, 127>, 16, 16>(x, w);
        let scales = fit.scales.map(|s| s as i8);
        let block = Self { scales, d: Half::exactly(fit.d), ..Self::zeroed() };
        (block, fit.levels.map(|q| code(q + 32.0)))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        self.ql = std::array::from_fn(|b| {
            let at = b / 64 * 128 + b % 64;
            codes[at] & 15 | codes[at + 64] << 4
        });
        self.qh = pack_two_bits(&codes.map(|q| q >> 4));
    }

    #[inline(always)]
    fn group(&self, j: usize) -> (f32, f32) {
        (self.d.to_f32() * f32::from(self.scales[j]), NO_OFFSET)
    }
}
