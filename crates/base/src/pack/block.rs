use bytemuck::{Pod, Zeroable};

use super::grid::Levels;
use super::lanes::{each, range};

/// A packed block of `N` values as it lies in a file. Blocks are made of bytes, so that any address
/// in a mapping will do, and integers and halves are little-endian on every machine.
pub trait Block<const N: usize>: Pod {
    /// Unpacks the block's values.
    fn dequantize(&self, out: &mut [f32; N]);
}

/// A block that plain values can be rounded into.
pub trait Quantize<const N: usize>: Block<N> {
    /// The largest magnitude the layout represents; larger values are clamped to it.
    const LIMIT: f32;

    /// Rounds `x` into a block, searching the scales that make the least `Σ w (x - x̂)²`.
    ///
    /// Values are finite and within [`Quantize::LIMIT`]; weights are positive, the largest one 1.
    fn quantize(x: &[f32; N], w: &[f32; N]) -> Self;
}

/// A block of codes, each of which picks a level of its group's grid: `step * level + offset`.
///
/// Packing is two acts here, choosing the scales and choosing the codes, so that somebody else may
/// choose the codes; see [`Grid`](super::grid::Grid).
pub trait Coded<const N: usize>: Block<N> {
    /// [`Quantize::LIMIT`].
    const LIMIT: f32;
    /// Values that share a step and an offset.
    const GROUP: usize;
    /// What codes stand for.
    const LEVELS: Levels;

    /// The scales that make the least `Σ w (x - x̂)²`, in a block whose codes are zero, and the
    /// codes that do. Arguments as in [`Quantize::quantize`].
    fn search(x: &[f32; N], w: &[f32; N]) -> (Self, [u8; N]);

    /// Replaces the block's codes.
    fn put_codes(&mut self, codes: &[u8; N]);

    /// The step and the offset of group `j`.
    fn group(&self, j: usize) -> (f32, f32);
}

impl<B: Coded<N>, const N: usize> Quantize<N> for B {
    const LIMIT: f32 = B::LIMIT;

    #[inline(always)]
    fn quantize(x: &[f32; N], w: &[f32; N]) -> Self {
        let (mut block, codes) = B::search(x, w);
        block.put_codes(&codes);
        block
    }
}

/// A little-endian half-precision number at any address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Half([u8; 2]);

impl Half {
    /// The largest finite half.
    pub const MAX: f32 = 65504.0;
    /// The smallest positive half, 2⁻²⁴.
    pub const MIN_POSITIVE: f32 = 5.960_464_5e-8;

    /// The smallest half in full precision, 2⁻¹⁴. Below it halves are [`Half::MIN_POSITIVE`] apart.
    pub const MIN_NORMAL: f32 = 6.103_515_6e-5;

    /// The bits, sign first.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits.to_le_bytes())
    }

    /// The bits, sign first.
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// The number, exactly. NaNs stay NaNs.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let sign = (bits & 0x8000) << 16;
        // A half's exponent and mantissa, read as a single's, are too small by 2^(127 - 15); the
        // product is exact and normalizes subnormals.
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
        let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(magnitude.to_bits() | special | sign)
    }

    /// The nearest half, ties to even, saturating at ±[`Half::MAX`].
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        Self::from_bits(half::f16::from_f32(value.clamp(-Self::MAX, Self::MAX)).to_bits())
    }

    /// The half that is `value`, which [`Half::round`] or [`Half::round_scale`] made.
    #[inline(always)]
    pub(crate) fn exactly(value: f32) -> Self {
        let sign = value.to_bits() >> 16 & 0x8000;
        // The inverse of `to_f32`: 2^(127 - 15) smaller, a half's exponent is a single's.
        let magnitude = value.abs() * f32::from_bits(0x0780_0000);
        Self::from_bits((sign | magnitude.to_bits() >> 13) as u16)
    }

    /// The value of [`Half::from_f32`] as a single, in arithmetic that compiles to vectors.
    #[inline(always)]
    pub(crate) fn round(value: f32) -> f32 {
        let value = value.clamp(-Self::MAX, Self::MAX);
        let bits = value.to_bits();
        let normal = f32::from_bits((bits + 0xfff + ((bits >> 13) & 1)) & !0x1fff);
        // Singles around 0.75 are 2⁻²⁴ apart, as subnormal halves are.
        let subnormal = (value + 0.75) - 0.75;
        if value.abs() < Self::MIN_NORMAL { subnormal } else { normal }
    }

    /// As [`Half::round`] where halves are normal; among the subnormal ones the next one away from
    /// zero. There the nearest half may be a much smaller scale, and values would be clipped.
    #[inline(always)]
    pub(crate) fn round_scale(value: f32) -> f32 {
        let rounded = Self::round(value);
        if rounded.abs() < value.abs() && value.abs() < Self::MIN_NORMAL {
            rounded + Self::MIN_POSITIVE.copysign(value)
        } else {
            rounded
        }
    }
}

/// A loop that is worth compiling for wider vectors than every processor has.
///
/// Implementations mark `run` `#[inline(always)]`, and so everything it calls: what is inlined into
/// a function with a target feature is compiled for it. Operations and their order do not change
/// with the width, and neither do results.
pub(crate) trait Work {
    fn run(self);
}

/// Runs `work` in the widest vectors this processor has.
pub(crate) fn run_wide(work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has the features, checked just above.
            return unsafe { run_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature, checked just above.
            return unsafe { run_avx2(work) };
        }
    }
    work.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2(work: impl Work) {
    work.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512(work: impl Work) {
    work.run();
}

/// Unpacks whole blocks; the lengths were checked.
pub(crate) fn unpack<B: Block<N>, const N: usize>(data: &[u8], out: &mut [f32]) {
    run_wide(Unpack::<B, N>(bytemuck::cast_slice(data), out));
}

struct Unpack<'a, B, const N: usize>(&'a [B], &'a mut [f32]);

impl<B: Block<N>, const N: usize> Work for Unpack<'_, B, N> {
    #[inline(always)]
    fn run(self) {
        let (out, _) = self.1.as_chunks_mut();
        for (block, out) in self.0.iter().zip(out) {
            block.dequantize(out);
        }
    }
}

/// Packs whole blocks; the lengths, the values and the importance were checked.
pub(crate) fn pack<B: Quantize<N>, const N: usize>(
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    run_wide(Pack::<B, N>(values, importance, bytemuck::cast_slice_mut(out)));
}

struct Pack<'a, B, const N: usize>(&'a [f32], Option<&'a [f32]>, &'a mut [B]);

impl<B: Quantize<N>, const N: usize> Work for Pack<'_, B, N> {
    #[inline(always)]
    fn run(self) {
        let (values, _) = self.0.as_chunks::<N>();
        for (i, (x, block)) in values.iter().zip(self.2).enumerate() {
            let (x, w) = prepare(x, self.1.map(|w| &w[i * N..][..N]), B::LIMIT);
            *block = B::quantize(&x, &w);
        }
    }
}

/// A block's values and weights as [`Quantize::quantize`] wants them.
#[inline(always)]
pub(super) fn prepare<const N: usize>(
    x: &[f32; N],
    importance: Option<&[f32]>,
    limit: f32,
) -> ([f32; N], [f32; N]) {
    (each(|j| x[j].clamp(-limit, limit)), importance.map_or([1.0; N], weights))
}

/// What a value of no importance weighs: little enough to change nothing else, enough to be rounded
/// well where nothing around it matters either.
const LEAST_WEIGHT: f32 = 1e-8;

/// A block's importance scaled so that the largest weight is 1. Where nothing matters, everything
/// matters equally.
#[inline(always)]
fn weights<const N: usize>(importance: &[f32]) -> [f32; N] {
    let (_, largest) = range(importance);
    if largest == 0.0 {
        return [1.0; N];
    }
    each(|i| {
        let w = importance[i] / largest;
        if w > LEAST_WEIGHT { w } else { LEAST_WEIGHT }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{iq2, iq3, iq4, mxfp4, q3_k, q4_0, q4_1, q4_k, q6_k, q8_0, tq};

    /// Blocks are the same to the byte in vectors of every width.
    #[track_caller]
    fn check<B: Quantize<N> + PartialEq + std::fmt::Debug, const N: usize>() {
        let x: Vec<f32> = (0..2048u32)
            .map(|i| {
                let t = (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
                t * t * t * 0.3
            })
            .collect();
        let w: Vec<f32> = x.iter().rev().map(|v| v.abs() + 0.01).collect();
        for importance in [None, Some(&w[..])] {
            let blank = vec![B::zeroed(); x.len() / N];
            let (mut narrow, mut wide) = (blank.clone(), blank.clone());
            Pack(&x, importance, &mut narrow).run();
            run_wide(Pack(&x, importance, &mut wide));
            assert_eq!(narrow, wide);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                let mut middle = blank;
                // SAFETY: the processor has the feature, checked just above.
                unsafe { run_avx2(Pack(&x, importance, &mut middle)) };
                assert_eq!(narrow, middle);
            }
        }
    }

    #[test]
    fn blocks_do_not_depend_on_the_processor() {
        check::<q4_0::BlockQ4_0, 32>();
        check::<q4_1::BlockQ4_1, 32>();
        check::<q8_0::BlockQ8_0, 32>();
        check::<q3_k::BlockQ3K, 256>();
        check::<q4_k::BlockQ4K, 256>();
        check::<q6_k::BlockQ6K, 256>();
        check::<iq4::BlockIQ4NL, 32>();
        check::<iq4::BlockIQ4XS, 256>();
        check::<tq::BlockTQ1_0, 256>();
        check::<mxfp4::BlockMXFP4, 32>();
        check::<iq2::BlockIQ2XXS, 256>();
        check::<iq2::BlockIQ2S, 256>();
        check::<iq3::BlockIQ3S, 256>();
    }
}
