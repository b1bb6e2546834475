//! Products of dense and float tiles.

use std::arch::aarch64::*;
use std::array;

use super::super::kernels::Sums;
use super::super::layout::{Dense, Float, ROWS, RUN};
use super::super::packed::Tile;
use super::{QUARTERS, Quarter, bf16s, halves, load, part, single, store, word};

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
    let column_bytes = const { if D == Dense::F32 as u8 { 64 } else { 32 } };
    let mut totals = [[[vdupq_n_f32(0.0); 2]; N]; T];
    let mut step = |column: &[u8], x: &[u8], parity: usize| {
        let weights: [_; N] = array::from_fn(|i| {
            let quarter = first + i;
            if D == Dense::F32 as u8 {
                single(column, quarter * 16)
            } else if D == Dense::F16 as u8 {
                halves(part(column, quarter * 8))
            } else {
                bf16s(part(column, quarter * 8))
            }
        });
        for t in 0..T {
            for i in 0..N {
                totals[t][i][parity] = add_product::<T>(totals[t][i][parity], weights[i], x, t);
            }
        }
    };
    let mut columns = tile.codes.chunks_exact(2 * column_bytes);
    let mut blocks = block.chunks_exact(const { 2 * T * 4 });
    for (pair, x) in columns.by_ref().zip(blocks.by_ref()) {
        step(&pair[..column_bytes], &x[..T * 4], 0);
        step(&pair[column_bytes..], &x[T * 4..], 1);
    }
    if !columns.remainder().is_empty() {
        step(columns.remainder(), blocks.remainder(), 0);
    }
    for t in 0..T {
        for i in 0..N {
            store(&mut sums[t], first + i, vaddq_f32(totals[t][i][0], totals[t][i][1]));
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

/// Products of a tile of 4-bit level numbers with a block of tokens.
#[target_feature(enable = "neon")]
pub(in super::super) fn levels(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    float::<{ Float::Levels as u8 }>(tile, block, tokens, sums);
}

/// Products of a tile of F8_E4M3 codes with a block of tokens.
#[target_feature(enable = "neon")]
pub(in super::super) fn float8(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    float::<{ Float::Float8 as u8 }>(tile, block, tokens, sums);
}

/// As many quarters at once as leave their sums in registers.
#[inline]
#[target_feature(enable = "neon")]
fn float<const F: u8>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    for quarter in 0..QUARTERS {
        match (tokens, quarter) {
            (8, _) => float_block::<F, 8, 1>(tile, block, quarter, sums),
            (4, _) => float_block::<F, 4, 1>(tile, block, quarter, sums),
            (2, 0 | 2) => float_block::<F, 2, 2>(tile, block, quarter, sums),
            (1, 0 | 2) => float_block::<F, 1, 2>(tile, block, quarter, sums),
            _ => {}
        }
    }
}

/// `N` quarters, the first of which is `first`. Even and odd columns are summed apart, as in a dense
/// tile.
#[target_feature(enable = "neon")]
fn float_block<const F: u8, const T: usize, const N: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    first: Quarter,
    sums: &mut Sums,
) {
    let run_bytes = const { Float::of(F).run_bytes() };
    let table = table(tile.table);
    let mut totals = [[vdupq_n_f32(0.0); N]; T];
    let groups = tile.codes.chunks(tile.columns / RUN * run_bytes);
    let blocks = block.chunks(tile.columns * T * 4);
    for ((codes, block), scales) in groups.zip(blocks).zip(tile.scales.chunks_exact(ROWS * 4)) {
        let mut parts = [[[vdupq_n_f32(0.0); 2]; N]; T];
        let runs = codes.chunks_exact(run_bytes);
        for (run, x) in runs.zip(block.chunks_exact(const { RUN * T * 4 })) {
            // The loop over pairs stays short: sums whose place is not known when it is compiled
            // would not be kept in registers.
            for pair in 0..RUN / 2 {
                for parity in 0..2 {
                    let j = 2 * pair + parity;
                    let x = &x[j * T * 4..][..T * 4];
                    let weights: [_; N] =
                        array::from_fn(|i| float_column::<F>(run, j, first + i, table));
                    for t in 0..T {
                        for i in 0..N {
                            let part = parts[t][i][parity];
                            parts[t][i][parity] = add_product::<T>(part, weights[i], x, t);
                        }
                    }
                }
            }
        }
        for i in 0..N {
            let mut scale = single(scales, (first + i) * 16);
            if F == Float::Float8 as u8 {
                scale = vmulq_n_f32(scale, 256.0);
            }
            for t in 0..T {
                let sum = vaddq_f32(parts[t][i][0], parts[t][i][1]);
                totals[t][i] = vfmaq_f32(totals[t][i], sum, scale);
            }
        }
    }
    for t in 0..T {
        for i in 0..N {
            store(&mut sums[t], first + i, totals[t][i]);
        }
    }
}

/// The bytes of the levels.
#[inline]
#[target_feature(enable = "neon")]
fn table(levels: &[f32; 16]) -> uint8x16x4_t {
    let bytes: &[u8] = bytemuck::cast_slice(levels);
    uint8x16x4_t(load(bytes, 0), load(bytes, 16), load(bytes, 32), load(bytes, 48))
}

/// A quarter of column `j` of a run.
#[inline]
#[target_feature(enable = "neon")]
fn float_column<const F: u8>(
    run: &[u8],
    j: usize,
    quarter: Quarter,
    table: uint8x16x4_t,
) -> float32x4_t {
    if F == Float::Levels as u8 {
        // A lane's low four bits choose the level, whose four bytes are looked up one by one.
        let numbers = vreinterpretq_u32_u8(load(run, quarter * 16));
        let moved = vshlq_u32(numbers, vdupq_n_s32(-4 * j as i32));
        let number = vandq_u32(moved, vdupq_n_u32(15));
        let places = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), number, 0x0404_0404);
        vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)))
    } else {
        // As a half with the same bits the number is 2^8 times smaller: the exponents' biases are
        // 7 and 15.
        let four = u32::from_le_bytes(*part(run, j * ROWS + quarter * 4));
        let bits = vshll_n_s8::<7>(vcreate_s8(four.into()));
        let bits = vand_s16(vget_low_s16(bits), vdup_n_s16(!0x4000));
        vcvt_f32_f16(vreinterpret_f16_s16(bits))
    }
}
