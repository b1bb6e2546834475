//! Grids: scales first, then codes by somebody else's choice.

use bevel_base::pack::{self, grid::Grid};
use bevel_base::{DType, Error};

use crate::quantize::{squared_error, there_and_back};

/// Values of many magnitudes, a group of zeros among them.
fn values() -> Vec<f32> {
    (0..1024u32)
        .map(|i| {
            let t = (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
            if i / 32 == 7 { 0.0 } else { t * t * t * (0.02 + (i / 256) as f32) }
        })
        .collect()
}

/// Fitted scales, the nearest codes put in: values are `step · level + offset` to the bit, and as
/// near as [`pack::quantize`] comes. Any other codes are found again as well.
#[track_caller]
fn check(dtype: DType) {
    let grid = Grid::of(dtype).unwrap();
    let (x, levels) = (values(), grid.levels());
    let weights: Vec<f32> = x.iter().rev().map(|v| v.abs() + 0.01).collect();
    let groups = x.len() / grid.group_len();
    for importance in [None, Some(&weights[..])] {
        let mut blocks = vec![0xff; dtype.row_bytes(x.len()).unwrap()];
        let (mut steps, mut offsets) = (vec![f32::NAN; groups], vec![f32::NAN; groups]);
        grid.fit(&x, importance, &mut blocks, &mut steps, &mut offsets).unwrap();
        let group = |i: usize| i / grid.group_len();
        let nearest: Vec<u8> = (0..x.len())
            .map(|i| {
                let (step, offset) = (steps[group(i)], offsets[group(i)]);
                levels.nearest(if step == 0.0 { 0.0 } else { (x[i] - offset) / step })
            })
            .collect();
        let others: Vec<u8> = (0..x.len()).map(|i| (i * 7 % levels.count()) as u8).collect();
        let mut found = vec![0f32; x.len()];
        for codes in [&others, &nearest] {
            grid.put_codes(codes, &mut blocks);
            pack::dequantize(dtype, &blocks, &mut found).unwrap();
            for i in 0..x.len() {
                let expected = steps[group(i)] * levels.level(codes[i]) + offsets[group(i)];
                assert_eq!(found[i].to_bits(), expected.to_bits(), "{dtype}, value {i}");
            }
        }
        let error = squared_error(&x, &found, importance);
        let bar = squared_error(&x, &there_and_back(dtype, &x, importance), importance);
        assert!((error / bar - 1.0).abs() < 1e-6, "{dtype}: {error} beside {bar}");
    }
}

#[test]
fn scales_first_codes_later() {
    let grids: Vec<DType> = DType::all().filter(|&dtype| Grid::of(dtype).is_some()).collect();
    assert_eq!(grids.len(), 15);
    grids.into_iter().for_each(check);
}

#[test]
fn levels_ascend_and_are_their_own_nearest() {
    for grid in DType::all().filter_map(Grid::of) {
        let levels = grid.levels();
        let all: Vec<f32> = (0..levels.count()).map(|code| levels.level(code as u8)).collect();
        assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
        for (code, &level) in all.iter().enumerate() {
            assert_eq!(usize::from(levels.nearest(level)), code);
        }
        assert_eq!(usize::from(levels.nearest(-1e9)), 0);
        assert_eq!(usize::from(levels.nearest(1e9)), all.len() - 1);
    }
}

#[test]
fn lengths_must_agree() {
    let grid = Grid::of(DType::Q4_K).unwrap();
    let mut blocks = vec![0; 144];
    let (mut steps, mut offsets) = ([0.0; 8], [0.0; 7]);
    let found = grid.fit(&[0.5; 256], None, &mut blocks, &mut steps, &mut offsets);
    assert!(matches!(found, Err(Error::ByteLength { expected: 32, found: 28, .. })), "{found:?}");
    let found = grid.fit(&[f32::NAN; 256], None, &mut blocks, &mut steps, &mut [0.0; 8]);
    assert!(matches!(found, Err(Error::NotFinite { index: 0, .. })), "{found:?}");
}
