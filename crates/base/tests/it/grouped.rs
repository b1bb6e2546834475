//! Quantizers into codes with a scale for each group, where a paper says what must come out.

use bevel_base::grouped::nf4::{
    DoubleQuantized, FP4_LEVELS, Levels, NF4_LEVELS, dynamic_map, quantize,
};
use bevel_base::grouped::{Coding, float4, float8, mlx};
use bevel_base::{DType, Error};

/// The probability that a standard normal number is below `x`: Simpson's rule from 0.
fn normal_below(x: f64) -> f64 {
    const STEPS: usize = 1000;
    let h = x / STEPS as f64;
    let density = |x: f64| (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let weight = |i| if i == 0 || i == STEPS { 1.0 } else { [2.0, 4.0][i % 2] };
    0.5 + h / 3.0 * (0..=STEPS).map(|i| weight(i) * density(i as f64 * h)).sum::<f64>()
}

/// The number below which a standard normal one lies with probability `p`, from 0.5 on.
fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (0.0, 10.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if normal_below(middle) < p { low = middle } else { high = middle }
    }
    low
}

/// QLoRA, arXiv 2305.14314, section 3: quantiles of the positive half for 2^3 + 1 levels and of the
/// negative half for 2^3, of which both have zero; probabilities end halfway between those that
/// either half alone would end at, 1 - 1/(2·15) and 1 - 1/(2·16). The largest becomes 1.
#[test]
fn nf4_is_the_quantiles_of_a_normal_distribution() {
    let last = ((1.0 - 1.0 / 30.0) + (1.0 - 1.0 / 32.0)) / 2.0;
    let half = |levels: usize| {
        let p = move |i: usize| 0.5 + (last - 0.5) * i as f64 / levels as f64;
        (1..=levels).map(move |i| normal_quantile(p(i)) / normal_quantile(last))
    };
    let negative = half(7).map(|level| -level).collect::<Vec<_>>().into_iter().rev();
    let levels: Vec<f64> = negative.chain([0.0]).chain(half(8)).collect();
    assert_eq!(levels.len(), 16);
    for (level, expected) in NF4_LEVELS.iter().zip(levels) {
        assert!((f64::from(*level) - expected).abs() < 2e-7, "{level} should be {expected}");
    }
}

#[test]
fn fp4_is_a_float_of_two_exponent_bits() {
    // Exponents 3 to 1 are those of 4 to 12 and back; the exponent 0 has zero and a sixty-fourth of 4.
    for (code, value) in [(1, 0.0625), (2, 8.0), (3, 12.0), (4, 4.0), (5, 6.0), (6, 2.0), (7, 3.0)]
    {
        assert_eq!(FP4_LEVELS[code], value / 12.0);
        assert_eq!(FP4_LEVELS[code + 8], -value / 12.0);
    }
}

#[test]
fn every_weight_has_the_nearest_level() {
    let values: Vec<f32> = (0..640).map(|i| ((i * 37 % 101) as f32 - 47.0) / 50.0).collect();
    for levels in [Levels::Nf4, Levels::Fp4] {
        // Blocks of 64 run across rows of 80: groups are of 16.
        let matrix = quantize(&values, 8, 80, levels, 64).unwrap().checked().unwrap();
        assert_eq!(matrix.group_size, 16);
        for (i, (value, found)) in values.iter().zip(matrix.dequantize()).enumerate() {
            let block = &values[i / 64 * 64..][..64];
            let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            let error = |level: &f32| (level * largest - value).abs();
            let least = levels.table().iter().map(error).fold(f32::INFINITY, f32::min);
            assert!((found - value).abs() <= least + 1e-6, "{value} became {found}");
        }
    }
}

#[test]
fn doubly_quantized_scales_are_near() {
    let map = dynamic_map();
    assert!(map.is_sorted() && map[255] == 1.0 && map.contains(&0.0));
    let scales: Vec<f32> = (0..1000).map(|i| 0.02 + (i * 7 % 500) as f32 * 1e-4).collect();
    let quantized = DoubleQuantized::new(&scales);
    assert_eq!(quantized.maxima.len(), 4);
    for (found, scale) in quantized.scales().iter().zip(&scales) {
        // Levels of the outermost decade are 0.9 / 64 apart.
        assert!((found - scale).abs() <= 0.025 * 0.9 / 128.0 + 1e-6, "{scale} became {found}");
    }
    assert_eq!(DoubleQuantized::new(&[0.25; 3]).scales(), [0.25; 3]);
    assert!(DoubleQuantized::new(&[]).scales().is_empty());
}

#[test]
fn rounding_of_4_bit_floats_is_to_the_nearest_level() {
    for i in -1400..=1400 {
        let value = i as f32 / 200.0;
        let found = float4::E2M1_LEVELS[usize::from(float4::to_e2m1(value))];
        let error = |level: &f32| (level - value).abs();
        let least = float4::E2M1_LEVELS.iter().map(error).fold(f32::INFINITY, f32::min);
        assert_eq!((found - value).abs(), least, "{value} became {found}");
    }
    for code in 0..255 {
        assert_eq!(float4::to_e8m0(float4::e8m0(code)), Some(code));
    }
    assert!(float4::e8m0(255).is_nan());
    assert_eq!(float4::to_e8m0(3.0), None);
}

#[test]
fn scales_of_nvfp4_can_be_taken_apart() {
    let mut scales: Vec<f32> = (0..300).map(|i| (i * 31 % 97) as f32 * 1.7e-3).collect();
    assert_eq!(float4::split_nvfp4(&scales), None);
    float4::round_nvfp4(&mut scales).unwrap();
    let (global, codes) = float4::split_nvfp4(&scales).unwrap();
    for (scale, code) in scales.iter().zip(codes) {
        assert_eq!(bevel_base::pack::e4m3(code) / global, *scale);
    }
    assert!(matches!(float4::round_nvfp4(&mut [1.0, -1.0]), Err(Error::Grouped(_))));
    let mut zeros = [0.0; 3];
    float4::round_nvfp4(&mut zeros).unwrap();
    assert!(float4::split_nvfp4(&zeros).is_some());
}

#[test]
fn affine_groups_hold_their_larger_edge_and_zero_exactly() {
    let values: Vec<f32> = (0..256).map(|i| ((i * 29 % 83) as f32 - 30.0) / 64.0).collect();
    let matrix = mlx::quantize(&values, 4, 64, 4, 32, DType::F32).unwrap().checked().unwrap();
    let Coding::Affine { minima, .. } = &matrix.coding else { unreachable!() };
    for (group, (scale, minimum)) in matrix.scales.iter().zip(minima).enumerate() {
        let values = &values[32 * group..][..32];
        let edge = values.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        assert_eq!(*minimum, edge);
        let zero = -minimum / scale;
        assert!((zero - zero.round()).abs() < 1e-4, "zero is code {zero}");
    }
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    let grouped = |result: bevel_base::Result<_>| matches!(result, Err(Error::Grouped(_)));
    let values = [0.5; 64];
    assert!(grouped(quantize(&values, 2, 33, Levels::Nf4, 64)));
    assert!(grouped(quantize(&values, 2, 32, Levels::Nf4, 0)));
    assert!(grouped(mlx::quantize(&values, 2, 32, 4, 24, DType::F16)));
    assert!(grouped(mlx::quantize(&values, 2, 32, 9, 32, DType::F16)));
    assert!(grouped(float4::quantize_nvfp4(&values, 8, 8)));
    assert!(grouped(float4::quantize_mxfp4(&values, 4, 16)));
    assert!(grouped(float8::quantize(&values, 64, 2, DType::F32)));
    let mut values = values;
    values[37] = f32::NAN;
    let refused = float8::quantize(&values, 2, 32, DType::F32);
    assert!(matches!(refused, Err(Error::NotFinite { index: 5, .. })));
}
