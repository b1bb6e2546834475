//! TQ1_0 and TQ2_0: ternary values with one scale per 256, for models trained to be ternary
//! (BitNet b1.58, arXiv 2402.17764).

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::levels::{Integers, code};
use super::q2_k::{pack_two_bits, two_bits};
use super::symmetric::fit_scale;

/// 256 values `d * (t - 1)`, `t` a trit, five of them a byte: 1.6875 bits a value.
///
/// A byte stands for the fraction `b / 256` whose base-3 digits are the trits, first trit first:
/// multiply by 3, and the carry out of the byte is the next trit.
///
/// ```text
/// byte  0..32   qs   byte i: values i, 32 + i, 64 + i, 96 + i, 128 + i
///      32..48        byte i: values 160 + i, 176 + i, 192 + i, 208 + i, 224 + i
///      48..52   qh   byte i: values 240 + i, 244 + i, 248 + i, 252 + i
///      52..54   d    f16
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ1_0 {
    /// Five trits a byte.
    pub qs: [u8; 48],
    /// The last sixteen trits, four a byte.
    pub qh: [u8; 4],
    /// The scale.
    pub d: Half,
}

const _: () = assert!(size_of::<BlockTQ1_0>() == 54);

/// 256 values `d * (q - 1)`, `q` of 2 bits: 2.0625 bits a value.
///
/// ```text
/// byte  0..64  qs   value 128c + 32s + i: bits 2s..2s+2 of byte 32c + i
///      64..66  d    f16
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ2_0 {
    /// Four values a byte.
    pub qs: [u8; 64],
    /// The scale.
    pub d: Half,
}

const _: () = assert!(size_of::<BlockTQ2_0>() == 66);

const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

impl BlockTQ1_0 {
    /// Calls `visit(value, byte, digit)` for each value: its trit is base-3 digit `digit` of `byte`
    /// in the 52 bytes of `qs` and `qh`.
    #[inline(always)]
    fn each_trit(mut visit: impl FnMut(usize, usize, usize)) {
        for (first, byte, width, digits) in [(0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4)] {
            for digit in 0..digits {
                for i in 0..width {
                    visit(first + width * digit + i, byte + i, digit);
                }
            }
        }
    }

    /// The 256 trits, each -1, 0 or 1.
    #[inline(always)]
    pub fn trits(&self) -> [i8; 256] {
        let mut bytes = [0u8; 52];
        bytes[..48].copy_from_slice(&self.qs);
        bytes[48..].copy_from_slice(&self.qh);
        let mut trits = [0; 256];
        Self::each_trit(|value, byte, digit| {
            let fraction = u16::from(bytes[byte].wrapping_mul(POWERS[digit]));
            trits[value] = ((fraction * 3) >> 8) as i8 - 1;
        });
        trits
    }
}

impl Block<256> for BlockTQ1_0 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        let trits = self.trits();
        for i in 0..256 {
            out[i] = d * f32::from(trits[i]);
        }
    }
}

impl Block<256> for BlockTQ2_0 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 256]) {
        let d = self.d.to_f32();
        for i in 0..256 {
            out[i] = d * f32::from(two_bits(&self.qs, i) as i8 - 1);
        }
    }
}

impl Coded<256> for BlockTQ1_0 {
    const LIMIT: f32 = Half::MAX;
    const GROUP: usize = 256;
    const LEVELS: Levels = Levels::Integers { low: -1, high: 1 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let (d, q) = fit_scale::<Integers<-1, 1>, 256>(x, w);
        (Self { d: Half::exactly(d), ..Self::zeroed() }, q.map(|q| code(q + 1.0)))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        // The number whose digits are the trits, as the least byte `b` with `b / 256` not below
        // `number / 3⁵`, so that the carries come out as written.
        let mut numbers = [0u16; 52];
        Self::each_trit(|value, byte, digit| {
            numbers[byte] += u16::from(codes[value]) * u16::from(POWERS[4 - digit]);
        });
        let bytes = numbers.map(|n| (n * 256).div_ceil(243) as u8);
        self.qs.copy_from_slice(&bytes[..48]);
        self.qh.copy_from_slice(&bytes[48..]);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), NO_OFFSET)
    }
}

impl Coded<256> for BlockTQ2_0 {
    const LIMIT: f32 = Half::MAX;
    const GROUP: usize = 256;
    const LEVELS: Levels = Levels::Integers { low: -1, high: 1 };

    #[inline(always)]
    fn search(x: &[f32; 256], w: &[f32; 256]) -> (Self, [u8; 256]) {
        let (d, q) = fit_scale::<Integers<-1, 1>, 256>(x, w);
        (Self { d: Half::exactly(d), ..Self::zeroed() }, q.map(|q| code(q + 1.0)))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 256]) {
        self.qs = pack_two_bits(codes);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), NO_OFFSET)
    }
}
