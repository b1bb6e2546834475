//! Q8_0: 8-bit integers with one scale per 32 values.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded, Half};
use super::grid::{Levels, NO_OFFSET};
use super::lanes::range;
use super::levels::round;

/// 32 values `d * q`, `q` of 8 bits: 8.5 bits a value.
///
/// ```text
/// byte  0..2   d    f16
///       2..34  qs   i8 each
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// The scale.
    pub d: Half,
    /// The values.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34);

impl Block<32> for BlockQ8_0 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        let d = self.d.to_f32();
        for i in 0..32 {
            out[i] = f32::from(self.qs[i]) * d;
        }
    }
}

impl Coded<32> for BlockQ8_0 {
    const LIMIT: f32 = Half::MAX * 127.0;
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Integers { low: -128, high: 127 };

    /// The scale maps the largest magnitude to 127, as everybody's does; values are then rounded by
    /// the scale that is stored, not by the one before it became a half.
    #[inline(always)]
    fn search(x: &[f32; 32], _: &[f32; 32]) -> (Self, [u8; 32]) {
        let (low, high) = range(x);
        let largest = if -low > high { -low } else { high };
        if largest < Half::MIN_POSITIVE * 0.5 {
            return (Self::zeroed(), [128; 32]);
        }
        let nearest = Half::round(largest / 127.0);
        // Only among subnormal halves is the nearest one so much smaller that it would clip.
        let clips = nearest * 127.5 < largest;
        let d = if clips { Half::round_scale(largest / 127.0) } else { nearest };
        let inverse = 1.0 / d;
        let mut codes = [0; 32];
        for i in 0..32 {
            // SAFETY: clamped to the range of `i8`; finite because `x` is and `d` is not zero.
            let q: i8 = unsafe { round((x[i] * inverse).clamp(-128.0, 127.0)).to_int_unchecked() };
            codes[i] = q as u8 ^ 0x80;
        }
        (Self { d: Half::exactly(d), qs: [0; 32] }, codes)
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        self.qs = codes.map(|code| (code ^ 0x80) as i8);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.d.to_f32(), NO_OFFSET)
    }
}
