//! Products of dense tiles.

use std::arch::aarch64::*;
use std::array;

use super::super::kernels::Sums;
use super::super::layout::{Dense, ROWS};
use super::super::packed::Tile;
use super::{QUARTERS, Quarter, bf16s, halves, part, single, store, word};

/// Products of a dense tile with a block of tokens. Even and odd columns are summed apart, so that
/// the sum of one token does not wait for every addition.
#[target_feature(enable = "neon")]
pub(in super::super) fn dense_f32(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F32 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "neon")]
pub(in super::super) fn dense_f16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F16 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "neon")]
pub(in super::super) fn dense_bf16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::Bf16 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "neon")]
pub(in super::super) fn dense_f8(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F8 as u8 }>(tile, block, tokens, sums);
}

/// As many quarters at once as leave their sums in registers.
#[inline]
#[target_feature(enable = "neon")]
fn dense<const D: u8>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    for quarter in 0..QUARTERS {
        match (tokens, quarter) {
            (8, _) => dense_block::<D, 8, 1>(tile, block, quarter, sums),
            (4, 0 | 2) => dense_block::<D, 4, 2>(tile, block, quarter, sums),
            (2, 0) => dense_block::<D, 2, 4>(tile, block, quarter, sums),
            (1, 0) => dense_block::<D, 1, 4>(tile, block, quarter, sums),
            _ => {}
        }
    }
}

/// `N` quarters, the first of which is `first`.
#[target_feature(enable = "neon")]
fn dense_block<const D: u8, const T: usize, const N: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    first: Quarter,
    sums: &mut Sums,
) {
    let column_bytes = const { Dense::of(D).bytes() * ROWS };
    let mut totals = [[[vdupq_n_f32(0.0); 2]; N]; T];
    // Numbers without scales are one group.
    let columns = if D == Dense::F8 as u8 { tile.columns } else { usize::MAX };
    let groups = tile.codes.chunks(columns.saturating_mul(column_bytes));
    let blocks = block.chunks(columns.saturating_mul(const { T * 4 }));
    for (group, (codes, block)) in groups.zip(blocks).enumerate() {
        let scales: [_; N] = array::from_fn(|i| match D == Dense::F8 as u8 {
            // 2^8: see `numbers`.
            true => vmulq_n_f32(single(tile.scales, group * 64 + (first + i) * 16), 256.0),
            false => vdupq_n_f32(1.0),
        });
        let mut step = |column: &[u8], x: &[u8], parity: usize| {
            let mut weights: [_; N] = array::from_fn(|i| numbers::<D>(column, first + i));
            if D == Dense::F8 as u8 {
                weights = array::from_fn(|i| vmulq_f32(weights[i], scales[i]));
            }
            for t in 0..T {
                for i in 0..N {
                    totals[t][i][parity] = add_product::<T>(totals[t][i][parity], weights[i], x, t);
                }
            }
        };
        let mut columns = codes.chunks_exact(2 * column_bytes);
        let mut blocks = block.chunks_exact(const { 2 * T * 4 });
        for (pair, x) in columns.by_ref().zip(blocks.by_ref()) {
            step(&pair[..column_bytes], &x[..T * 4], 0);
            step(&pair[column_bytes..], &x[T * 4..], 1);
        }
        if !columns.remainder().is_empty() {
            step(columns.remainder(), blocks.remainder(), 0);
        }
    }
    for t in 0..T {
        for i in 0..N {
            store(&mut sums[t], first + i, vaddq_f32(totals[t][i][0], totals[t][i][1]));
        }
    }
}

/// A quarter of the numbers of a column.
#[inline]
#[target_feature(enable = "neon")]
fn numbers<const D: u8>(column: &[u8], quarter: Quarter) -> float32x4_t {
    match const { Dense::of(D) } {
        Dense::F32 => single(column, quarter * 16),
        Dense::F16 => halves(part(column, quarter * 8)),
        Dense::Bf16 => bf16s(part(column, quarter * 8)),
        Dense::F8 => {
            // As a half with the same bits the number is 2^8 times smaller: the exponents' biases are
            // 7 and 15.
            let four = u32::from_le_bytes(*part(column, quarter * 4));
            let bits = vshll_n_s8::<7>(vcreate_s8(four.into()));
            let bits = vand_s16(vget_low_s16(bits), vdup_n_s16(!0x4000));
            vcvt_f32_f16(vreinterpret_f16_s16(bits))
        }
    }
}

/// `sum` plus `weights` times token `t` of a column's `T` activations.
#[inline]
#[target_feature(enable = "neon")]
fn add_product<const T: usize>(
    sum: float32x4_t,
    weights: float32x4_t,
    x: &[u8],
    t: usize,
) -> float32x4_t {
    if T < 4 {
        return vfmaq_f32(sum, weights, vreinterpretq_f32_s32(word(x, t)));
    }
    let x = single(x, t / 4 * 16);
    match t % 4 {
        0 => vfmaq_laneq_f32::<0>(sum, weights, x),
        1 => vfmaq_laneq_f32::<1>(sum, weights, x),
        2 => vfmaq_laneq_f32::<2>(sum, weights, x),
        _ => vfmaq_laneq_f32::<3>(sum, weights, x),
    }
}
