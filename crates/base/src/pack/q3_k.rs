//! Q3_K: 3-bit integers in super-blocks, 6-bit scales per 16 values.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::levels::{Integers, code};
use super::q2_k::{pack_two_bits, two_bits};
use super::symmetric::fit_super_block;

/// 256 values `d * (sc[j] - 32) * (q - 4)`, `q` of 3 bits, `j` the group of 16: 3.4375 bits a value.
///
/// ```text
/// byte   0..32   hmask   value 32b + i: bit b of byte i is bit 2 of q
///       32..96   qs      value 128c + 32s + i: bits 2s..2s+2 of byte 32c + i are bits 0..2 of q
///       96..104  scales  byte k: low 4 bits of sc[k] in the low half, of sc[8 + k] in the high half
///      104..108          byte k: high 2 bits of sc[k], sc[4 + k], sc[8 + k], sc[12 + k], lowest first
///      108..110  d       f16
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// The third bits.
    pub hmask: [u8; 32],
    /// The low two bits, four values a byte.
    pub qs: [u8; 64],
    /// 6-bit scales; see [`BlockQ3K::scales`].
    pub packed_scales: [u8; 12],
    /// The scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<BlockQ3K>() == 110);

impl BlockQ3K {
    /// The integer scales of the groups of 16 values, each -32 to 31.
    #[inline(always)]
    pub fn scales(&self) -> [i8; 16] {
        std::array::from_fn(|j| {
            let low = (self.packed_scales[j % 8] >> (j / 8 * 4)) & 15;
            let high = (self.packed_scales[8 + j % 4] >> (j / 4 * 2)) & 3;
            (low | high << 4) as i8 - 32
        })
    }

    /// Value `i`'s integer, -4 to 3.
    #[inline(always)]
    pub fn code(&self, i: usize) -> i8 {
        let high = (self.hmask[i % 32] >> (i / 32)) & 1;
        (two_bits(&self.qs, i) | high << 2) as i8 - 4
    }
}

impl Block<256> for BlockQ3K {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        let scales = self.scales();
        for j in 0..16 {
            let d = d * f32::from(scales[j]);
            for i in 16 * j..16 * (j + 1) {
                out[i] = d * f32::from(self.code(i));
            }
        }
    }
}

impl Coded<256> for BlockQ3K {
    const LIMIT: f32 = Half::MAX * 128.0;
    const GROUP: usize = 16;
    const LEVELS: Levels = Levels::Integers { low: -4, high: 3 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let fit = fit_super_block::<Integers<-4, 3>, Integers<-32, 31>, 16, 16>(x, w);
        let scales = fit.scales.map(|s| (s + 32.0) as u8);
        let mut packed_scales = [0; 12];
        for j in 0..16 {
            packed_scales[j % 8] |= (scales[j] & 15) << (j / 8 * 4);
            packed_scales[8 + j % 4] |= scales[j] >> 4 << (j / 4 * 2);
        }
        let block = Self { packed_scales, d: Half::exactly(fit.d), ..Self::zeroed() };
        (block, fit.levels.map(|q| code(q + 4.0)))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        self.hmask = [0; 32];
        for i in 0..256 {
            self.hmask[i % 32] |= codes[i] >> 2 << (i / 32);
        }
        self.qs = pack_two_bits(&codes.map(|q| q & 3));
    }

    #[inline(always)]
    fn group(&self, j: usize) -> (f32, f32) {
        (self.d.to_f32() * f32::from(self.scales()[j]), NO_OFFSET)
    }
}
