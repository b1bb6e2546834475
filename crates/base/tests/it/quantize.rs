//! Packing, against the errors that the quantizers of the `gguf` package and of llama.cpp leave.

use bevel_base::{DType, Error, pack};
use serde_json::Value;

const ROWS: &[u8] = include_bytes!("../goldens/pack/rows.f32");
const WEIGHTS: &[u8] = include_bytes!("../goldens/pack/weights.f32");
const RIVALS: &str = include_str!("../goldens/pack/rivals.json");

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

pub(crate) fn there_and_back(dtype: DType, x: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
    let mut packed = vec![0; dtype.row_bytes(x.len()).unwrap()];
    pack::quantize(dtype, x, importance, &mut packed).unwrap();
    let mut values = vec![0f32; x.len()];
    pack::dequantize(dtype, &packed, &mut values).unwrap();
    values
}

pub(crate) fn squared_error(x: &[f32], found: &[f32], importance: Option<&[f32]>) -> f64 {
    (0..x.len())
        .map(|i| {
            let w = importance.map_or(1.0, |w| f64::from(w[i]));
            w * (f64::from(x[i]) - f64::from(found[i])).powi(2)
        })
        .sum()
}

/// On every set of rows, with and without importance, the error is no larger than the smallest of
/// the rivals'.
#[track_caller]
fn check(dtype: DType) {
    let rivals: Value = serde_json::from_str(RIVALS).unwrap();
    let names = rivals["sets"].as_array().unwrap();
    let (rows, weights) = (floats(ROWS), floats(WEIGHTS));
    let set = rows.len() / names.len();
    let columns = weights.len() / names.len();
    let mut worse = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let x = &rows[i * set..][..set];
        let importance = weights[i * columns..][..columns].repeat(set / columns);
        let bars = &rivals["errors"][dtype.name()][name.as_str().unwrap()];
        for (kind, importance) in [("plain", None), ("weighted", Some(&importance[..]))] {
            let error = squared_error(x, &there_and_back(dtype, x, importance), importance);
            let bar = bars[kind].as_f64().unwrap();
            if error > bar * (1.0 + 1e-6) {
                worse.push(format!("{name}, {kind}: {error:e} where a rival leaves {bar:e}"));
            }
        }
    }
    assert!(worse.is_empty(), "{dtype}:\n{}", worse.join("\n"));
}

macro_rules! no_worse_than_rivals {
    ($($test:ident $dtype:ident,)*) => {$(
        #[test]
        fn $test() {
            check(DType::$dtype);
        }
    )*};
}

no_worse_than_rivals! {
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
    iq4_nl IQ4_NL,
    iq4_xs IQ4_XS,
    tq1_0 TQ1_0,
    tq2_0 TQ2_0,
    mxfp4 MXFP4,
    iq2_xxs IQ2_XXS,
    iq2_xs IQ2_XS,
    iq2_s IQ2_S,
    iq3_xxs IQ3_XXS,
    iq3_s IQ3_S,
}

#[test]
fn numbers_that_are_none_are_refused() {
    for dtype in DType::all().filter(|t| t.is_weight()) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.25; 512];
            x[301] = bad;
            let mut out = vec![0; dtype.row_bytes(512).unwrap()];
            let found = pack::quantize(dtype, &x, None, &mut out);
            assert!(
                matches!(found, Err(Error::NotFinite { index: 301, .. })),
                "{dtype}: {found:?}"
            );
        }
    }
}

#[test]
fn importance_that_weighs_nothing_is_refused() {
    let x = [0.25; 256];
    let mut out = vec![0; DType::Q4_K.block_bytes()];
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let mut importance = [1.0; 256];
        importance[77] = bad;
        let found = pack::quantize(DType::Q4_K, &x, Some(&importance), &mut out);
        assert!(matches!(found, Err(Error::Importance { index: 77, .. })), "{found:?}");
    }
    let found = pack::quantize(DType::Q4_K, &x, Some(&[1.0; 255]), &mut out);
    assert!(matches!(found, Err(Error::ByteLength { .. })), "{found:?}");
}

/// Where nothing matters, everything matters equally; and only ratios matter.
#[test]
fn importance_is_relative() {
    let x: Vec<f32> = (0..256).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
    let w: Vec<f32> = (0..256).map(|i| (i % 7) as f32).collect();
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q3_K, DType::Q4_K, DType::IQ4_XS, DType::TQ2_0] {
        let plain = there_and_back(dtype, &x, None);
        assert_eq!(plain, there_and_back(dtype, &x, Some(&[0.0; 256])), "{dtype}");
        assert_eq!(plain, there_and_back(dtype, &x, Some(&[3e-38; 256])), "{dtype}");
        let large: Vec<f32> = w.iter().map(|w| w * 2f32.powi(120)).collect();
        let weighted = there_and_back(dtype, &x, Some(&w));
        assert_eq!(weighted, there_and_back(dtype, &x, Some(&large)), "{dtype}");
        assert!(
            squared_error(&x, &weighted, Some(&w)) <= squared_error(&x, &plain, Some(&w)),
            "{dtype}: importance does not help what is important"
        );
    }
}
