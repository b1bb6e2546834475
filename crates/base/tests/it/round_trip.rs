//! What packing may cost at most, whatever the values.

use bevel_base::{DType, pack};
use proptest::prelude::*;

use crate::quantize::{squared_error, there_and_back};

/// Layouts that can be written, half the widest gap between two neighbouring levels (a little more
/// where scales are rounded too), and the levels' extent.
const BOUNDS: [(DType, f64, f64); 20] = [
    (DType::Q4_0, 0.5, 7.0),
    (DType::Q4_1, 0.5, 15.0),
    (DType::Q5_0, 0.5, 15.0),
    (DType::Q5_1, 0.5, 31.0),
    (DType::Q8_0, 0.5, 127.0),
    (DType::Q2_K, 0.5, 3.0),
    (DType::Q3_K, 0.5, 3.0),
    (DType::Q4_K, 0.55, 15.0),
    (DType::Q5_K, 0.6, 31.0),
    (DType::Q6_K, 0.55, 31.0),
    (DType::IQ4_NL, 12.0, 113.0),
    (DType::IQ4_XS, 12.0, 113.0),
    (DType::TQ1_0, 0.5, 1.0),
    (DType::TQ2_0, 0.5, 1.0),
    (DType::MXFP4, 2.0, 12.0),
    (DType::IQ2_XXS, 9.0, 43.0),
    (DType::IQ2_XS, 9.0, 43.0),
    (DType::IQ2_S, 9.0, 43.0),
    (DType::IQ3_XXS, 5.0, 62.0),
    (DType::IQ3_S, 1.0, 15.0),
];

/// What a block's errors are measured by.
fn extent(dtype: DType, x: &[f32]) -> f32 {
    let (low, high) = x.iter().fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
    match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::Q2_K | DType::Q4_K | DType::Q5_K => high - low,
        _ => high.max(-low),
    }
}

fn check(x: &[f32], importance: Option<&[f32]>) -> Result<(), TestCaseError> {
    for (dtype, half_gap, levels) in BOUNDS {
        let found = there_and_back(dtype, x, importance);
        prop_assert!(found.iter().all(|v| v.is_finite()), "{dtype}");
        if importance.is_some() {
            continue;
        }
        for (x, found) in x.chunks(dtype.block_len()).zip(found.chunks(dtype.block_len())) {
            let rms = (squared_error(x, found, None) / x.len() as f64).sqrt();
            // Scales are rounded; where halves are subnormal, by as much as 2⁻²⁴, and minima as well.
            let step = 1.01 * f64::from(extent(dtype, x)) / levels + 2f64.powi(-24);
            let allowed = half_gap * step + 2f64.powi(-23);
            prop_assert!(rms <= allowed, "{dtype}: {rms:e} is more than {allowed:e}");
        }
    }
    Ok(())
}

/// Values of all sizes, one size a case, some cases far from zero.
fn values() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![8 => -1f32..1f32, 1 => Just(0f32), 1 => -30f32..30f32];
    (-9f32..3.3, -1f32..1f32, proptest::collection::vec(value, 256)).prop_map(
        |(scale, offset, v)| {
            let offset = if offset > 0.5 { offset } else { 0.0 };
            v.iter().map(|v| (v + offset) * 10f32.powf(scale)).collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn errors_are_bounded_by_the_step(x in values()) {
        check(&x, None)?;
    }

    /// Any finite numbers at all pack, and come back finite.
    #[test]
    fn anything_finite_stays_finite(
        x in proptest::collection::vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), 256),
        w in proptest::collection::vec((0u32..0x7f80_0000).prop_map(f32::from_bits), 256),
    ) {
        check(&x, Some(&w))?;
        for (dtype, ..) in BOUNDS {
            let found = there_and_back(dtype, &x, None);
            prop_assert!(found.iter().all(|v| v.is_finite()), "{dtype}");
        }
    }

    /// What a block can hold exactly, packing finds: a block's own values come back.
    #[test]
    fn packing_finds_the_block_again(
        bytes in proptest::collection::vec(any::<u8>(), 34),
        scale in 1e-3f32..10.0,
        minimum in -10f32..10.0,
    ) {
        let [scale, minimum] = [scale, minimum].map(|v| half::f16::from_f32(v).to_le_bytes());
        // The byte of the first code and its partner gets the extreme levels.
        for (dtype, minimum_at, extremes_at) in [
            (DType::Q4_0, None, 2),
            (DType::Q4_1, Some(2), 4),
            (DType::Q5_0, None, 6),
            (DType::Q5_1, Some(2), 8),
            (DType::IQ4_NL, None, 2),
        ] {
            let mut block = bytes[..dtype.block_bytes()].to_vec();
            block[..2].copy_from_slice(&scale);
            if let Some(at) = minimum_at {
                block[at..at + 2].copy_from_slice(&minimum);
            }
            if extremes_at > 4 {
                block[extremes_at - 4..extremes_at].copy_from_slice(&[0xa6, 0x51, 0x93, 0xc8]);
            }
            block[extremes_at] = 0xf0;
            let mut x = [0f32; 32];
            pack::dequantize(dtype, &block, &mut x).unwrap();
            let again = there_and_back(dtype, &x, None);
            let allowed = 1e-3 * f64::from(extent(dtype, &x));
            let rms = (squared_error(&x, &again, None) / 32.0).sqrt();
            prop_assert!(rms <= allowed, "{dtype}: {rms:e} is more than {allowed:e}");
        }
    }
}

/// Values beyond every scale are clamped to the largest that the layout represents.
#[test]
fn overflow_saturates() {
    for (dtype, ..) in BOUNDS {
        for huge in [1e7f32, 1e12, f32::MAX] {
            let mut x = [0f32; 256];
            for i in 0..256 {
                x[i] = if i % 4 < 2 { huge } else { -huge };
            }
            let found = there_and_back(dtype, &x, None);
            for (x, found) in x.iter().zip(found) {
                assert!(found.is_finite() && found.abs() >= 6e4, "{dtype}: {x:e} became {found:e}");
                assert_eq!(x.signum(), found.signum(), "{dtype}");
            }
        }
    }
}

/// Models trained to be ternary lose nothing but the half-precision rounding of their scale.
#[test]
fn ternary_weights_are_exact() {
    let scale = 45.0 / 1024.0; // A half-precision number.
    let x: Vec<f32> = (0..512).map(|i| ((i * i + i / 7) % 3) as f32 * scale - scale).collect();
    for dtype in [DType::TQ1_0, DType::TQ2_0] {
        assert_eq!(there_and_back(dtype, &x, None), x, "{dtype}");
    }
}

#[test]
fn zeros_stay_zeros() {
    for (dtype, ..) in BOUNDS {
        assert!(there_and_back(dtype, &[0.0; 512], None).iter().all(|v| *v == 0.0), "{dtype}");
    }
}
