//! MXFP4: the Open Compute microscaling format, 4-bit floats (E2M1) with a power of two per 32.

use bytemuck::{Pod, Zeroable};

use super::block::{Block, Coded};
use super::grid::{Levels, NO_OFFSET};
use super::lanes::{least, range};
use super::levels::{E2m1, Levels as _};
use super::symmetric::scale_errors;

/// 32 values `2^(e - 128) * MXFP4_LEVELS[q]`, `q` of 4 bits: 4.25 bits a value.
///
/// ```text
/// byte  0      e    u8
///       1..17  qs   byte i: q[i] in the low half, q[16 + i] in the high half
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMXFP4 {
    /// The exponent of the scale, biased by 127; see [`BlockMXFP4::scale`].
    pub e: u8,
    /// Two values a byte.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockMXFP4>() == 17);

/// The values of the 16 codes, doubled to make them integers. Bit 3 of a code is the sign.
pub const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// [`MXFP4_LEVELS`] in ascending order, zero once.
static MXFP4_ASCENDING: [f32; 15] =
    [-12., -8., -6., -4., -3., -2., -1., 0., 1., 2., 3., 4., 6., 8., 12.];

impl BlockMXFP4 {
    /// The factor of [`MXFP4_LEVELS`]: half the scale, 2^(e - 128).
    #[inline(always)]
    pub fn scale(&self) -> f32 {
        let e = u32::from(self.e);
        f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
    }
}

impl Block<32> for BlockMXFP4 {
    #[inline(always)]
    fn dequantize(&self, out: &mut [f32; 32]) {
        let d = self.scale();
        for i in 0..16 {
            out[i] = d * f32::from(MXFP4_LEVELS[usize::from(self.qs[i] & 15)]);
            out[16 + i] = d * f32::from(MXFP4_LEVELS[usize::from(self.qs[i] >> 4)]);
        }
    }
}

impl Coded<32> for BlockMXFP4 {
    /// The greatest exponent whose levels are all finite is 252.
    const LIMIT: f32 = 12.0 * power_of_two(124);
    const GROUP: usize = 32;
    const LEVELS: Levels = Levels::Table(&MXFP4_ASCENDING);

    /// Tries the exponent that puts the largest magnitude among the top levels and its neighbours.
    #[inline(always)]
    fn search(x: &[f32; 32], w: &[f32; 32]) -> (Self, [u8; 32]) {
        let (low, high) = range(x);
        let largest = if -low > high { -low } else { high };
        if largest == 0.0 {
            return (Self::zeroed(), [7; 32]);
        }
        // The search runs on y = x * 2^-k with k about log2 of the largest magnitude, so that no
        // square leaves the range of f32. Two factors, because 2^-k itself may leave it.
        let k = exponent(largest);
        let y = x.map(|v| v * power_of_two(-k / 2) * power_of_two(-k - -k / 2));
        const CANDIDATES: usize = 4;
        let e: [i32; CANDIDATES] = std::array::from_fn(|l| (k - 3 + l as i32 + 127).clamp(0, 252));
        let scales = e.map(|e| power_of_two((e - 128 - k).clamp(-126, 127)));
        let errors = scale_errors::<E2m1, CANDIDATES>(&y, w, &scales);
        let best = least(&errors);
        let inverse = 1.0 / scales[best];
        let mut codes = [0; 32];
        for i in 0..32 {
            let level = E2m1::snap(y[i] * inverse);
            let magnitude = level.abs() as u8;
            let steps =
                if magnitude < 5 { magnitude } else { [5, 6, 7][usize::from(magnitude) / 4 - 1] };
            codes[i] = if level < 0.0 { 7 - steps } else { 7 + steps };
        }
        (Self { e: e[best] as u8, qs: [0; 16] }, codes)
    }

    #[inline(always)]
    fn put_codes(&mut self, codes: &[u8; 32]) {
        let field = |code: u8| if code < 7 { 15 - code } else { code - 7 };
        self.qs = std::array::from_fn(|i| field(codes[i]) | field(codes[16 + i]) << 4);
    }

    #[inline(always)]
    fn group(&self, _: usize) -> (f32, f32) {
        (self.scale(), NO_OFFSET)
    }
}

/// The exponent of a positive number: `floor(log2(value))` where it is normal, -127 below.
#[inline(always)]
fn exponent(value: f32) -> i32 {
    (value.to_bits() >> 23) as i32 - 127
}

/// 2 to a power within the normal range.
#[inline(always)]
const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}
