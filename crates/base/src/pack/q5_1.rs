//! Q5_1: 5-bit integers with a scale and a minimum per 32 values.

use bytemuck::{Pod, Zeroable};

use super::affine::fit_scale_and_minimum;
use super::block::{Block, Coded, Half};
use super::grid::Levels;
use super::q5_0::{join, split};

/// 32 values `d * q + m`, `q` of 5 bits: 6 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..4   m    f16
///       4..8   qh   u32, bit i: bit 4 of q[i]
///       8..24  qs   byte i: bits 0..4 of q[i] in the low half, of q[16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// The scale.
    pub d: Half,
    /// The value of code zero.
    pub m: Half,
    /// The fifth bits, little-endian.
    pub qh: [u8; 4],
    /// The low four bits, two values a byte.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24);

impl Block<32> for BlockQ5_1 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let q = join(&self.qs, self.qh);
        for i in 0..32 {
            out[i] = d * f32::from(q[i]) + m;
        }
    }
}

impl Coded<32> for BlockQ5_1 {
    const LIMIT: f32 = Half::MAX;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: 0, high: 31 };

    #[inline(always)]
    fn search(x: &[f32; 32], w: &[f32; 32]) -> (Self, [u8; 32]) {
        let (d, m, codes) = fit_scale_and_minimum::<31, 32>(x, w);
        (Self { d: Half::exactly(d), m: Half::exactly(m), ..Self::zeroed() }, codes)
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        (self.qs, self.qh) = split(codes);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), self.m.to_f32())
    }
}
