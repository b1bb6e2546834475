//! Unpacking, against the `gguf` package's answers and against bytes that nobody packed.

use bevel_base::pack::{self, Half, grids};
use bevel_base::{DType, Error};
use proptest::prelude::*;

/// `golden` holds packed blocks and then the values the `gguf` package makes of them.
#[track_caller]
fn check(dtype: DType, golden: &[u8]) {
    let per_block = dtype.block_bytes() + 4 * dtype.block_len();
    assert_eq!(golden.len() % per_block, 0);
    let blocks = golden.len() / per_block;
    assert!(blocks > 0);
    let (data, expected) = golden.split_at(blocks * dtype.block_bytes());
    let mut values = vec![0f32; blocks * dtype.block_len()];
    pack::dequantize(dtype, data, &mut values).unwrap();
    for (i, (value, expected)) in values.iter().zip(expected.as_chunks().0).enumerate() {
        let expected = f32::from_le_bytes(*expected);
        assert_eq!(value.to_bits(), expected.to_bits(), "{dtype} {i}: {value} is not {expected}");
    }
    // A mapping may hold blocks at any address.
    let mut shifted = vec![0];
    shifted.extend_from_slice(data);
    let mut again = vec![0f32; values.len()];
    pack::dequantize(dtype, &shifted[1..], &mut again).unwrap();
    assert_eq!(values, again);
}

macro_rules! goldens {
    ($($test:ident $dtype:ident,)*) => {$(
        #[test]
        fn $test() {
            let golden = include_bytes!(concat!("../goldens/pack/", stringify!($dtype), ".bin"));
            check(DType::$dtype, golden);
        }
    )*};
}

goldens! {
    f16 F16,
    bf16 BF16,
    q4_0 Q4_0,
    q4_1 Q4_1,
    q5_0 Q5_0,
    q5_1 Q5_1,
    q8_0 Q8_0,
    q2_k Q2_K,
    q3_k Q3_K,
    q4_k Q4_K,
    q5_k Q5_K,
    q6_k Q6_K,
    iq2_xxs IQ2_XXS,
    iq2_xs IQ2_XS,
    iq2_s IQ2_S,
    iq3_xxs IQ3_XXS,
    iq3_s IQ3_S,
    iq4_nl IQ4_NL,
    iq4_xs IQ4_XS,
    tq1_0 TQ1_0,
    tq2_0 TQ2_0,
    mxfp4 MXFP4,
}

#[test]
fn every_half_reads_as_the_half_crate_reads_it() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (Half::from_bits(bits).to_f32(), half::f16::from_bits(bits).to_f32());
        assert!(
            ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
            "{bits:#x}"
        );
    }
}

#[test]
fn codebook_entries_differ() {
    fn check<const N: usize>(grid: &[[u8; N]]) {
        let distinct: std::collections::HashSet<_> = grid.iter().collect();
        assert_eq!(distinct.len(), grid.len());
    }
    check(&grids::IQ2_XXS);
    check(&grids::IQ2_XS);
    check(&grids::IQ2_S);
    check(&grids::IQ3_XXS);
    check(&grids::IQ3_S);
}

/// Integers and booleans are not weights, in either direction.
#[test]
fn integers_are_refused() {
    for dtype in DType::all().filter(|t| !t.is_weight()) {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..dtype.block_bytes()];
        let found = pack::dequantize(dtype, bytes, &mut [0.0]);
        assert!(matches!(found, Err(Error::NotWeight(t)) if t == dtype), "{dtype}: {found:?}");
        let found = pack::quantize(dtype, &[0.0], None, bytes);
        assert!(matches!(found, Err(Error::NotWeight(t)) if t == dtype), "{dtype}: {found:?}");
    }
}

#[test]
fn wrong_lengths_are_refused() {
    for dtype in DType::all().filter(|t| t.is_weight()) {
        let (len, bytes) = (dtype.block_len(), dtype.block_bytes());
        let mut out = vec![0f32; 2 * len];
        for wrong in [0, bytes - 1, bytes, 2 * bytes - 1, 2 * bytes + 1] {
            let mut data = vec![0; wrong];
            let read = pack::dequantize(dtype, &data, &mut out);
            assert!(matches!(read, Err(Error::ByteLength { found, .. }) if found == wrong));
            let written = pack::quantize(dtype, &out, None, &mut data);
            assert!(matches!(written, Err(Error::ByteLength { found, .. }) if found == wrong));
        }
        if len > 1 {
            let data = vec![0; bytes];
            let read = pack::dequantize(dtype, &data, &mut out[..len - 1]);
            assert!(matches!(read, Err(Error::RowLength { .. })));
        }
        assert!(pack::dequantize(dtype, &[], &mut []).is_ok());
    }
}

/// A scale that is a NaN makes values that are, and nothing worse.
#[test]
fn nan_scales_make_nan_values() {
    let nan = half::f16::NAN.to_le_bytes();
    for (dtype, at) in [
        (DType::Q4_0, 0),
        (DType::Q8_0, 0),
        (DType::Q2_K, 80),
        (DType::Q4_K, 0),
        (DType::Q6_K, 208),
        (DType::IQ2_XXS, 0),
        (DType::IQ3_S, 0),
        (DType::IQ4_XS, 0),
        (DType::TQ1_0, 52),
    ] {
        let mut block = vec![1; dtype.block_bytes()];
        block[at..at + 2].copy_from_slice(&nan);
        let mut out = vec![0f32; dtype.block_len()];
        pack::dequantize(dtype, &block, &mut out).unwrap();
        assert!(out.iter().all(|v| v.is_nan()), "{dtype}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes unpack, and blocks unpack alike alone and in company.
    #[test]
    fn any_bytes_unpack(bytes in proptest::collection::vec(any::<u8>(), 3 * 256)) {
        for dtype in DType::all().filter(|t| t.is_weight()) {
            let (len, size) = (dtype.block_len(), dtype.block_bytes());
            let mut all = vec![0f32; 3 * len];
            pack::dequantize(dtype, &bytes[..3 * size], &mut all).unwrap();
            for b in 0..3 {
                let mut one = vec![0f32; len];
                pack::dequantize(dtype, &bytes[b * size..][..size], &mut one).unwrap();
                for (a, b) in one.iter().zip(&all[b * len..]) {
                    prop_assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
                }
            }
        }
    }
}
