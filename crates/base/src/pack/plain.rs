//! Element types that hold one value each: conversions to and from f32.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::block::{Half, Work, run_wide};

/// Values converted at a time, in buffers on the stack.
const CHUNK: usize = 256;

pub(super) fn from_f64(data: &[u8], out: &mut [f32]) {
    for (bytes, out) in data.as_chunks().0.iter().zip(out) {
        *out = f64::from_le_bytes(*bytes) as f32;
    }
}

pub(super) fn to_f64(values: &[f32], out: &mut [u8]) {
    for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
        *out = f64::from(*value).to_le_bytes();
    }
}

pub(super) fn from_f32(data: &[u8], out: &mut [f32]) {
    for (bytes, out) in data.as_chunks().0.iter().zip(out) {
        *out = f32::from_le_bytes(*bytes);
    }
}

pub(super) fn to_f32(values: &[f32], out: &mut [u8]) {
    for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
        *out = value.to_le_bytes();
    }
}

pub(super) fn from_f16(data: &[u8], out: &mut [f32]) {
    struct Halves<'a>(&'a [Half], &'a mut [f32]);
    impl Work for Halves<'_> {
        #[inline(always)]
        fn run(self) {
            for (half, out) in self.0.iter().zip(self.1) {
                *out = half.to_f32();
            }
        }
    }
    run_wide(Halves(bytemuck::cast_slice(data), out));
}

/// Rounds to nearest, ties to even, saturating at the largest half.
pub(super) fn to_f16(values: &[f32], out: &mut [u8]) {
    let mut halves = [f16::ZERO; CHUNK];
    let mut clamped = [0f32; CHUNK];
    let largest = f16::MAX.to_f32();
    for (values, out) in values.chunks(CHUNK).zip(out.chunks_mut(2 * CHUNK)) {
        let (halves, clamped) = (&mut halves[..values.len()], &mut clamped[..values.len()]);
        for (clamped, value) in clamped.iter_mut().zip(values) {
            *clamped = value.clamp(-largest, largest);
        }
        halves.convert_from_f32_slice(clamped);
        for (half, bytes) in halves.iter().zip(out.as_chunks_mut().0) {
            *bytes = half.to_le_bytes();
        }
    }
}

pub(super) fn from_bf16(data: &[u8], out: &mut [f32]) {
    struct Brains<'a>(&'a [[u8; 2]], &'a mut [f32]);
    impl Work for Brains<'_> {
        #[inline(always)]
        fn run(self) {
            for (bytes, out) in self.0.iter().zip(self.1) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
    }
    run_wide(Brains(data.as_chunks().0, out));
}

/// Rounds to nearest, ties to even, saturating at the largest brain float.
pub(super) fn to_bf16(values: &[f32], out: &mut [u8]) {
    let largest = f32::from_bits(0x7f7f_0000);
    for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
        let bits = value.clamp(-largest, largest).to_bits();
        *out = (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes();
    }
}

/// An 8-bit float: 1 sign bit, `8 - 1 - MANTISSA` exponent bits, `MANTISSA` mantissa bits.
struct F8<const MANTISSA: u32>;

impl<const MANTISSA: u32> F8<MANTISSA> {
    const BIAS: u32 = (1 << (6 - MANTISSA)) - 1;
    /// Bits of a single's mantissa that are rounded away.
    const DROPPED: u32 = 23 - MANTISSA;
    /// The smallest normal number.
    const MIN_NORMAL: f32 = f32::from_bits((128 - Self::BIAS) << 23);
    /// E4M3 gives its top exponent to numbers, all but the last mantissa; E5M2 keeps infinities.
    const MAX_CODE: u32 = if MANTISSA == 3 { 0x7e } else { 0x7b };
    const MAX: f32 =
        f32::from_bits((Self::MAX_CODE + ((127 - Self::BIAS) << MANTISSA)) << Self::DROPPED);
    const TABLE: [f32; 256] = {
        let mut table = [0.0; 256];
        let mut code = 0;
        while code < 256 {
            table[code as usize] = Self::decode(code);
            code += 1;
        }
        table
    };

    const fn decode(code: u32) -> f32 {
        let magnitude = code & 0x7f;
        let sign = (code & 0x80) << 24;
        let value = if MANTISSA == 3 && magnitude == 0x7f || magnitude > Self::MAX_CODE + 1 {
            f32::NAN
        } else if magnitude > Self::MAX_CODE {
            f32::INFINITY
        } else if magnitude >> MANTISSA == 0 {
            magnitude as f32 * Self::MIN_NORMAL / (1 << MANTISSA) as f32
        } else {
            f32::from_bits((magnitude + ((127 - Self::BIAS) << MANTISSA)) << Self::DROPPED)
        };
        f32::from_bits(value.to_bits() | sign)
    }

    fn encode(value: f32) -> u8 {
        let magnitude = value.abs().min(Self::MAX);
        let code = if magnitude < Self::MIN_NORMAL {
            (magnitude * (1 << MANTISSA) as f32 / Self::MIN_NORMAL).round_ties_even() as u32
        } else {
            let bits = magnitude.to_bits();
            let half = (1 << (Self::DROPPED - 1)) - 1 + ((bits >> Self::DROPPED) & 1);
            ((bits + half) >> Self::DROPPED) - ((127 - Self::BIAS) << MANTISSA)
        };
        code as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
    }
}

/// The number that an FP8 E4M3 code stands for.
pub fn e4m3(code: u8) -> f32 {
    let table = &const { F8::<3>::TABLE };
    table[usize::from(code)]
}

/// The FP8 E4M3 code nearest to a number, ties to even, saturating at ±448.
pub fn to_e4m3(value: f32) -> u8 {
    F8::<3>::encode(value)
}

pub(super) fn from_f8<const MANTISSA: u32>(data: &[u8], out: &mut [f32]) {
    let table = &const { F8::<MANTISSA>::TABLE };
    for (code, out) in data.iter().zip(out) {
        *out = table[usize::from(*code)];
    }
}

/// Rounds to nearest, ties to even, saturating at the largest finite number.
pub(super) fn to_f8<const MANTISSA: u32>(values: &[f32], out: &mut [u8]) {
    for (value, out) in values.iter().zip(out) {
        *out = F8::<MANTISSA>::encode(*value);
    }
}
