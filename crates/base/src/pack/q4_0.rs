//! Q4_0: 4-bit integers with one scale per 32 values.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::levels::{Integers, code};
use super::symmetric::fit_scale;

/// 32 values `d * (q - 8)`, `q` of 4 bits: 4.5 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..18  qs   byte i: q[i] in the low half, q[16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// The scale. Its sign is free.
    pub d: Half,
    /// Two values a byte, offset by 8.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18);

impl Block<32> for BlockQ4_0 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        let d = self.d.to_f32();
        for i in 0..16 {
            out[i] = d * (i32::from(self.qs[i] & 15) - 8) as f32;
            out[16 + i] = d * (i32::from(self.qs[i] >> 4) - 8) as f32;
        }
    }
}

impl Coded<32> for BlockQ4_0 {
    const LIMIT: f32 = Half::MAX * 8.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: -8, high: 7 };

    #[inline(always)]
    fn search(x: &[f32; 32], w: &[f32; 32]) -> (Self, [u8; 32]) {
        let (d, q) = fit_scale::<Integers<-8, 7>, 32>(x, w);
        (Self { d: Half::exactly(d), qs: [0; 16] }, q.map(|q| code(q + 8.0)))
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        self.qs = std::array::from_fn(|i| codes[i] | codes[16 + i] << 4);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), NO_OFFSET)
    }
}
