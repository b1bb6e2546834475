//! Q8_0: 8-bit integers with one scale per 32 values.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Half, Quantize};
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

impl Quantize<32> for BlockQ8_0 {
    const LIMIT: f32 = Half::MAX * 127.0;

    /// The scale maps the largest magnitude to 127, as everybody's does; values are then rounded by
    /// the scale that is stored, not by the one before it became a half.
    #[inline(always)]
    fn quantize(x: &[f32; 32], _: &[f32; 32]) -> Self {
        let (low, high) = range(x);
        let largest = if -low > high { -low } else { high };
        if largest < Half::MIN_POSITIVE * 0.5 {
            return Self::zeroed();
        }
        let nearest = Half::round(largest / 127.0);
        // Only among subnormal halves is the nearest one so much smaller that it would clip.
        let clips = nearest * 127.5 < largest;
        let d = if clips { Half::round_scale(largest / 127.0) } else { nearest };
        let inverse = 1.0 / d;
        let mut qs = [0; 32];
        for i in 0..32 {
            // SAFETY: clamped to the range of `i8`; finite because `x` is and `d` is not zero.
            qs[i] = unsafe { round((x[i] * inverse).clamp(-128.0, 127.0)).to_int_unchecked() };
        }
        Self { d: Half::from_f32(d), qs }
    }
}
