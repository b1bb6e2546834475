//! Q4_1: 4-bit integers with a scale and a minimum per 32 values.

use bytemuck::{Pod, Zeroable};

use super::affine::fit_scale_and_minimum;
use super::block::{Block, Coded, Half};
use super::grid::Levels;

/// 32 values `d * q + m`, `q` of 4 bits: 5 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..4   m    f16
///       4..20  qs   byte i: q[i] in the low half, q[16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// The scale.
    pub d: Half,
    /// The value of code zero.
    pub m: Half,
    /// Two values a byte.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_1>() == 20);

impl Block<32> for BlockQ4_1 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        for i in 0..16 {
            out[i] = d * f32::from(self.qs[i] & 15) + m;
            out[16 + i] = d * f32::from(self.qs[i] >> 4) + m;
        }
    }
}

impl Coded<32> for BlockQ4_1 {
    const LIMIT: f32 = Half::MAX;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: 0, high: 15 };

    #[inline(always)]
    fn search(x: &[f32; 32], w: &[f32; 32]) -> (Self, [u8; 32]) {
        let (d, m, codes) = fit_scale_and_minimum::<15, 32>(x, w);
        (Self { d: Half::exactly(d), m: Half::exactly(m), qs: [0; 16] }, codes)
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        self.qs = std::array::from_fn(|i| codes[i] | codes[16 + i] << 4);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), self.m.to_f32())
    }
}
