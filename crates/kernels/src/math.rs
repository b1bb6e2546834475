//! Elementary functions without branches or tables, so that loops over them vectorise, and without
//! fused operations, so that every instruction set gives the same bits.
//!
//! Each function states its error against the exact value; the tests measure it.

/// Partial sums and maxima are kept in this many lanes, whatever the instruction set.
pub(crate) const LANES: usize = 16;

/// 1.5·2²³: adding it leaves the nearest integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; products of the first with |n| ≤ 128 are exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// The polynomial of [`exp`] above 1 + r, highest power first.
const EXP_TERMS: [f32; 5] =
    [0.001_381_461_3, 0.008_368_71, 0.041_668_39, 0.166_665_21, 0.499_999_94];
/// Below it results would be subnormal.
const LEAST_EXPONENT: f32 = -87.336_54;

/// eˣ within 2 units in the last place; 0 below −87.33, where the result would be subnormal, and
/// infinite above 88.72.
///
/// eˣ = 2ⁿ·eʳ with n = round(x / ln 2) and |r| ≤ ln 2 / 2; eʳ is a minimax polynomial (3e-9).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = EXP_TERMS[1..].iter().fold(EXP_TERMS[0], |p, &term| p * r + term);
    let p = p * (r * r) + r + 1.0;
    let y = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    let y = if x > 88.722_83 { f32::INFINITY } else { y };
    let y = if x < LEAST_EXPONENT { 0.0 } else { y };
    if x.is_nan() { x } else { y }
}

/// [`exp`] for x up to zero by fused operations, within 2 units in the last place: for loops that are
/// compiled for instruction sets that have them, where it takes two thirds of the time.
#[inline(always)]
pub(crate) fn exp_fused(x: f32) -> f32 {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = EXP_TERMS[1..].iter().fold(EXP_TERMS[0], |p, &term| p.mul_add(r, term));
    let p = p.mul_add(r * r, r) + 1.0;
    let y = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    let y = if x < LEAST_EXPONENT { 0.0 } else { y };
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
    let p = p * t + 0.282_243_3;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every float between `low` and `high` whose bits are a multiple of a prime, both signs.
    fn floats(low: f32, high: f32) -> impl Iterator<Item = f32> {
        (low.to_bits()..=high.to_bits()).step_by(997).map(f32::from_bits).flat_map(|x| [x, -x])
    }

    /// The distance in units in the last place of the exact value.
    fn units(value: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        let unit = f64::from(nearest.abs().next_up()) - f64::from(nearest.abs());
        (f64::from(value) - exact).abs() / unit
    }

    #[track_caller]
    fn check(name: &str, bound: f64, errors: impl Iterator<Item = f64>) {
        let worst = errors.fold(0.0, f64::max);
        assert!(worst <= bound, "{name} is off by {worst} units in the last place");
        assert!(worst > bound / 4.0, "{name} is better than stated: {worst}");
    }

    #[test]
    fn exp_is_within_two_units() {
        let inside = floats(1e-10, 88.7).filter(|&x| x > -87.3);
        check("exp", 2.0, inside.map(|x| units(exp(x), f64::from(x).exp())));
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!((exp(-88.0), exp(-1e30), exp(f32::NEG_INFINITY)), (0.0, 0.0, 0.0));
        assert_eq!((exp(88.8), exp(1e30)), (f32::INFINITY, f32::INFINITY));
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        for bits in [0x7fc0_0000, 0xffc0_0001, 0x7fff_ffff, 0x7f80_0001] {
            assert!(exp(f32::from_bits(bits)).is_nan());
        }
    }

    #[test]
    fn fused_exp_is_within_two_units_up_to_zero() {
        let inside = floats(1e-10, 87.3).filter(|&x| x <= 0.0);
        check("exp_fused", 2.0, inside.map(|x| units(exp_fused(x), f64::from(x).exp())));
        assert_eq!((exp_fused(0.0), exp_fused(-0.0)), (1.0, 1.0));
        assert_eq!((exp_fused(-88.0), exp_fused(-1e30)), (0.0, 0.0));
        assert_eq!(exp_fused(f32::NEG_INFINITY), 0.0);
        assert!(exp_fused(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_is_within_four_units() {
        let exact = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
        check("sigmoid", 4.0, floats(1e-10, 87.0).map(|x| units(sigmoid(x), exact(x))));
    }

    #[test]
    fn tanh_is_within_four_units() {
        check("tanh", 4.0, floats(1e-30, 100.0).map(|x| units(tanh(x), f64::from(x).tanh())));
        assert_eq!(tanh(0.0).to_bits(), 0.0f32.to_bits());
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits());
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn lanes_are_reduced_whole() {
        let lanes: [f32; LANES] = std::array::from_fn(|i| (1 << i) as f32);
        assert_eq!(sum_lanes(lanes), 65_535.0);
        for i in 0..LANES {
            let mut lanes = [-1.0; LANES];
            lanes[i] = 3.0;
            assert_eq!(max_lanes(lanes), 3.0);
        }
    }
}
