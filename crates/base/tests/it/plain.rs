//! Types of one value each: rounding to nearest, ties to even, saturating.

use bevel_base::{DType, pack};
use proptest::prelude::*;

fn there(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(values.len()).unwrap()];
    pack::quantize(dtype, values, None, &mut bytes).unwrap();
    bytes
}

fn back(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0f32; bytes.len() / dtype.block_bytes()];
    pack::dequantize(dtype, bytes, &mut values).unwrap();
    values
}

#[track_caller]
fn check(dtype: DType, value: f32, expected: f32) {
    let found = back(dtype, &there(dtype, &[value]))[0];
    assert_eq!(found.to_bits(), expected.to_bits(), "{dtype}: {value} became {found}");
}

#[test]
fn ties_go_to_even() {
    check(DType::BF16, 1.0 + 1.0 / 256.0, 1.0);
    check(DType::BF16, 1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0);
    check(DType::F16, 1.0 + 1.0 / 2048.0, 1.0);
    check(DType::F16, 1.0 + 3.0 / 2048.0, 1.0 + 4.0 / 2048.0);
    check(DType::F8_E4M3, 17.0, 16.0);
    check(DType::F8_E4M3, 19.0, 20.0);
    check(DType::F8_E4M3, -0.5 / 512.0, -0.0);
    check(DType::F8_E4M3, 1.5 / 512.0, 2.0 / 512.0);
    check(DType::F8_E4M3, 7.75 / 512.0, 8.0 / 512.0);
    check(DType::F8_E5M2, 9.0, 8.0);
    check(DType::F8_E5M2, 11.0, 12.0);
    check(DType::F8_E5M2, 0.5 / 65536.0, 0.0);
}

#[test]
fn too_large_becomes_the_largest() {
    check(DType::F16, 1e6, 65504.0);
    check(DType::F16, -65519.9, -65504.0);
    check(DType::BF16, f32::MAX, f32::from_bits(0x7f7f_0000));
    check(DType::F8_E4M3, 1e30, 448.0);
    check(DType::F8_E5M2, -1e30, -57344.0);
    check(DType::F32, f32::MAX, f32::MAX);
    check(DType::F64, f32::MIN_POSITIVE / 4.0, f32::MIN_POSITIVE / 4.0);
}

/// The values of the OCP 8-bit floating point specification's tables.
#[test]
fn eight_bit_floats_read_as_specified() {
    let e4m3 = back(DType::F8_E4M3, &[0x00, 0x01, 0x07, 0x08, 0x38, 0x7e, 0xfe, 0x80]);
    let smallest = 2f32.powi(-9);
    let expected = [0.0, smallest, 7.0 * smallest, 2f32.powi(-6), 1.0, 448.0, -448.0, -0.0];
    assert_eq!(e4m3.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), expected.map(f32::to_bits));
    assert!(back(DType::F8_E4M3, &[0x7f, 0xff]).iter().all(|v| v.is_nan()));
    let e5m2 = back(DType::F8_E5M2, &[0x00, 0x01, 0x03, 0x04, 0x3c, 0x7b, 0x7c, 0xfc]);
    let smallest = 2f32.powi(-16);
    let infinity = f32::INFINITY;
    let expected =
        [0.0, smallest, 3.0 * smallest, 2f32.powi(-14), 1.0, 57344.0, infinity, -infinity];
    assert_eq!(e5m2, expected);
    assert!(back(DType::F8_E5M2, &[0x7d, 0x7f, 0xfd]).iter().all(|v| v.is_nan()));
}

#[test]
fn every_finite_code_comes_back() {
    for dtype in [DType::F8_E4M3, DType::F8_E5M2] {
        for code in 0..=255 {
            let value = back(dtype, &[code])[0];
            if value.is_finite() {
                assert_eq!(there(dtype, &[value]), [code], "{dtype}: {value}");
            }
        }
    }
    for dtype in [DType::F16, DType::BF16] {
        for code in 0..=u16::MAX {
            let value = back(dtype, &code.to_le_bytes())[0];
            if value.is_finite() {
                assert_eq!(there(dtype, &[value]), code.to_le_bytes(), "{dtype}: {value}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The error is at most half a step, in calls of any length.
    #[test]
    fn the_nearest_value_is_chosen(values in proptest::collection::vec(-70000f32..70000f32, 1..600)) {
        for (dtype, ulp) in [
            (DType::F16, 2f32.powi(-11)),
            (DType::BF16, 2f32.powi(-8)),
            (DType::F8_E4M3, 2f32.powi(-4)),
            (DType::F8_E5M2, 2f32.powi(-3)),
            (DType::F32, 0.0),
            (DType::F64, 0.0),
        ] {
            let largest = match dtype {
                DType::F16 => 65504.0,
                DType::F8_E4M3 => 448.0,
                DType::F8_E5M2 => 57344.0,
                _ => f32::MAX,
            };
            let found = back(dtype, &there(dtype, &values));
            for (value, found) in values.iter().zip(found) {
                let value = value.clamp(-largest, largest);
                // Below 2⁻⁶, the smallest normal number of E4M3, its steps stay as they are.
                let size = if dtype == DType::F8_E4M3 { value.abs().max(2f32.powi(-6)) } else { value.abs() };
                prop_assert!((value - found).abs() <= size.max(2f32.powi(-14)) * ulp, "{dtype}: {value}");
            }
        }
    }
}
