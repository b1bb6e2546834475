//! Elementary functions without branches or tables, so that loops over them vectorise, and without
//! fused operations, so that every instruction set gives the same bits.
//!
//! Each function states its error against the exact value; the tests measure it.

/// Partial sums and maxima are kept in this many lanes, whatever the instruction set.
pub(crate) const LANES: usize = 16;

/// eˣ within 2 units in the last place; 0 below −87.33, where the result would be subnormal, and
/// infinite above 88.72.
///
/// eˣ = 2ⁿ·eʳ with n = round(x / ln 2) and |r| ≤ ln 2 / 2; eʳ is a minimax polynomial (3e-9).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5·2²³: adding it leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; products of the first with |n| ≤ 128 are exact.
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = 0.001_381_461_3;
    let p = p * r + 0.008_368_71;
    let p = p * r + 0.041_668_39;
    let p = p * r + 0.166_665_21;
    let p = p * r + 0.499_999_94;
    let p = p * (r * r) + r + 1.0;
    let y = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    let y = if x > 88.722_83 { f32::INFINITY } else { y };
    let y = if x < -87.336_54 { 0.0 } else { y };
    if x.is_nan() { x } else { y }
}

/// 1 / (1 + e⁻ˣ) within 4 units in the last place while it is normal.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh x within 4 units in the last place.
///
/// Near zero x + x³·P(x²), a minimax polynomial; beyond 0.625, where 1 − 2 / (e²ˣ + 1) loses
/// nothing by cancellation, that.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = a * a;
    let p = -0.005_717_042_4;
    let p = p * z + 0.020_650_585;
    let p = p * z - 0.053_743_497;
    let p = p * z + 0.133_314_91;
    let p = p * z - 0.333_332_84;
    let near = p * z * a + a;
    let far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    (if a < 0.625 { near } else { far }).copysign(x)
}

/// The normal distribution function Φ(x) = erfc(−x / √2) / 2, within 3e-7 of itself for
/// x ≥ −4 and within 1e-6 · x² of itself below.
///
/// erfc(y) = t · e^(−y²) · P(t) with t = 1 / (1 + y / 2) for y ≥ 0, and erfc(−y) = 2 − erfc(y).
#[inline(always)]
pub(crate) fn normal_cdf(x: f32) -> f32 {
    let y = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * y);
    let p = -0.057_256_207;
    let p = p * t + 0.276_111_96;
    let p = p * t - 0.470_535_64;
    let p = p * t + 0.260_068_15;
    let p = p * t - 0.015_016_835;
    let p = p * t + 0.198_131_31;
    let p = p * t + 0.244_160_73;
    let p = p * t + 0.282_243_31;
    let p = p * t + 0.282_093_2;
    let tail = 0.5 * t * exp(-y * y) * p;
    let tail = if x.is_nan() { x } else { tail };
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// The sum of `LANES` partial sums, always in the same order.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger of two, or the second where the first is not a number.
#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest of `LANES` values.
#[inline(always)]
pub(crate) fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] = max(lanes[j], lanes[j + width]);
        }
        width /= 2;
    }
    lanes[0]
}
