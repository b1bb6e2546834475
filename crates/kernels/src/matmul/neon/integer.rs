//! Products of integer tiles.

use std::arch::aarch64::*;
use std::array;

use super::super::activations::GROUP_BYTES;
use super::super::kernels::Sums;
use super::super::layout::{Format, QUADS, Scales};
use super::super::packed::Tile;
use super::dot::{Dot, DotProducts, MatrixProducts, Widening};
use super::{QUARTERS, Quarter, bf16s, halves, load, part, single, store, word};

/// Products of an integer tile with a block of tokens.
pub(in super::super) fn integer<F: Format>(
    tile: &Tile<'_>,
    block: &[u8],
    tokens: usize,
    sums: &mut Sums,
) {
    // SAFETY: every AArch64 processor has NEON.
    unsafe { products::<Widening, F>(tile, block, tokens, sums) }
}

/// As [`integer`], by dot products.
#[target_feature(enable = "neon,dotprod")]
pub(in super::super) fn integer_dot<F: Format>(
    tile: &Tile<'_>,
    block: &[u8],
    tokens: usize,
    sums: &mut Sums,
) {
    // SAFETY: compiled for it.
    unsafe { products::<DotProducts, F>(tile, block, tokens, sums) }
}

/// As [`integer`], by products of matrices.
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(in super::super) fn integer_i8mm<F: Format>(
    tile: &Tile<'_>,
    block: &[u8],
    tokens: usize,
    sums: &mut Sums,
) {
    // SAFETY: compiled for it.
    unsafe { products::<MatrixProducts, F>(tile, block, tokens, sums) }
}

/// # Safety
/// That of [`Dot`].
#[inline(always)]
unsafe fn products<D: Dot, F: Format>(
    tile: &Tile<'_>,
    block: &[u8],
    tokens: usize,
    sums: &mut Sums,
) {
    // SAFETY: this function's contract.
    unsafe {
        match tokens {
            8 => products_of::<D, F, 8>(tile, block, sums),
            4 => products_of::<D, F, 4>(tile, block, sums),
            2 => products_of::<D, F, 2>(tile, block, sums),
            _ => products_of::<D, F, 1>(tile, block, sums),
        }
    }
}

/// # Safety
/// That of [`Dot`].
#[inline(always)]
unsafe fn products_of<D: Dot, F: Format, const T: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    sums: &mut Sums,
) {
    // SAFETY: this function's contract.
    unsafe {
        let levels = vreinterpretq_s8_u8(veorq_u8(load(tile.levels, 0), vdupq_n_u8(0x80)));
        let mut totals = [[vdupq_n_f32(0.0); T]; QUARTERS];
        let blocks = block.chunks_exact(const { GROUP_BYTES * T });
        let planes = tile.codes.chunks_exact(const { F::CODING.group_bytes() });
        for (index, (block, planes)) in blocks.zip(planes).enumerate() {
            let group = Group {
                registers: planes.as_chunks().0,
                levels,
                scales: scales::<F>(tile, index),
                block,
            };
            for quarter in 0..QUARTERS {
                let mut parts = [vdupq_n_f32(0.0); T];
                if const { F::CODING.scales.halves() } {
                    group.add::<D, F, 0, { QUADS / 2 }, T>(quarter, &mut parts);
                    group.add::<D, F, 1, { QUADS / 2 }, T>(quarter, &mut parts);
                } else {
                    group.add::<D, F, 0, QUADS, T>(quarter, &mut parts);
                }
                for t in 0..T {
                    let scale = vreinterpretq_f32_s32(word(block, QUADS * T + t));
                    totals[quarter][t] = vfmaq_f32(totals[quarter][t], parts[t], scale);
                }
            }
        }
        for t in 0..T {
            for quarter in 0..QUARTERS {
                store(&mut sums[t], quarter, totals[quarter][t]);
            }
        }
    }
}

/// A group of a tile's columns, and the block's activations there.
struct Group<'a> {
    registers: &'a [[u8; 64]],
    /// Levels of look-up types, as signed bytes.
    levels: int8x16_t,
    /// Those of the group's halves, the first being the whole group's where halves share them.
    scales: [Scale; 2],
    block: &'a [u8],
}

/// Scales and minima (which are added) of each quarter's rows.
type Scale = [(float32x4_t, float32x4_t); QUARTERS];

impl Group<'_> {
    /// Adds the products of each token with four rows over span `SPAN` of the group, which is `Q` quads
    /// long. The first span's are the first.
    ///
    /// # Safety
    /// That of [`Dot`].
    #[inline(always)]
    unsafe fn add<D: Dot, F: Format, const SPAN: usize, const Q: usize, const T: usize>(
        &self,
        quarter: Quarter,
        parts: &mut [float32x4_t; T],
    ) {
        let coding = const { F::CODING };
        // Where -(sum of the span's codes) of the first token lies.
        let negative = (QUADS + if Q == QUADS { 1 } else { 2 + SPAN }) * T;
        // SAFETY: this function's contract.
        unsafe {
            let mut start = [vdupq_n_s32(0); T];
            // Levels around 128 are read as signed bytes, their zero already subtracted.
            if coding.zero != 0 && !coding.full_byte() {
                let shift = vdupq_n_s32(coding.zero.trailing_zeros() as i32);
                for t in 0..T {
                    start[t] = vshlq_s32(word(self.block, negative + t), shift);
                }
            }
            let levels: [_; Q] = array::from_fn(|k| self.quad::<F>(SPAN * Q + k, quarter));
            let codes = &self.block[SPAN * Q * T * 4..][..Q * T * 4];
            let dots = D::dots::<F, Q, T>(start, levels, codes);
            let (scale, min) = self.scales[SPAN][quarter];
            for t in 0..T {
                let dot = vcvtq_f32_s32(dots[t]);
                parts[t] =
                    if SPAN == 0 { vmulq_f32(dot, scale) } else { vfmaq_f32(parts[t], dot, scale) };
                if coding.scales.has_min() {
                    let negative = vcvtq_f32_s32(word(self.block, negative + t));
                    parts[t] = vfmsq_f32(parts[t], min, negative);
                }
            }
        }
    }

    /// The levels of quad `k`, of which the zero is still to be subtracted where it is not 128.
    #[inline]
    #[target_feature(enable = "neon")]
    fn quad<F: Format>(&self, k: usize, quarter: Quarter) -> int8x16_t {
        let register = |index: usize| load(&self.registers[index], quarter * 16);
        let code = match const { F::CODING.bits } {
            8 => register(k),
            6 => {
                let high = field(register(4 + k / 4), k % 4 * 2, 4, 0x30);
                vorrq_u8(field(register(k % 4), k / 4 * 4, 0, 0x0f), high)
            }
            5 => {
                let high = field(register(4), k, 4, 0x10);
                vorrq_u8(field(register(k % 4), k / 4 * 4, 0, 0x0f), high)
            }
            4 => field(register(k % 4), k / 4 * 4, 0, 0x0f),
            3 => {
                let high = field(register(2), k, 2, 0x04);
                vorrq_u8(field(register(k / 4), k % 4 * 2, 0, 0x03), high)
            }
            _ => field(register(k / 4), k % 4 * 2, 0, 0x03),
        };
        if const { F::CODING.lookup } {
            vqtbl1q_s8(self.levels, code)
        } else if const { F::CODING.full_byte() } {
            vreinterpretq_s8_u8(veorq_u8(code, vdupq_n_u8(0x80)))
        } else {
            vreinterpretq_s8_u8(code)
        }
    }
}

/// Each byte moved from bit `from` to bit `to`, then masked.
#[inline]
#[target_feature(enable = "neon")]
fn field(bytes: uint8x16_t, from: usize, to: usize, mask: u8) -> uint8x16_t {
    let moved = vshlq_u8(bytes, vdupq_n_s8(to as i8 - from as i8));
    vandq_u8(moved, vdupq_n_u8(mask))
}

/// The scales of a group.
#[inline]
#[target_feature(enable = "neon")]
fn scales<F: Format>(tile: &Tile<'_>, group: usize) -> [Scale; 2] {
    let layout = const { F::CODING.scales };
    let (start, position) = layout.locate(group, tile.span_log());
    let record = &tile.scales[start..][..const { F::CODING.scales.record().1 }];
    let none = vdupq_n_f32(0.0);
    let without_min = |scale: [float32x4_t; QUARTERS]| scale.map(|scale| (scale, none));
    let with_min = |scale: [float32x4_t; QUARTERS], min: [float32x4_t; QUARTERS]| -> Scale {
        array::from_fn(|quarter| (scale[quarter], min[quarter]))
    };
    let times = |a: [float32x4_t; QUARTERS], b: [float32x4_t; QUARTERS]| -> [_; QUARTERS] {
        array::from_fn(|quarter| vmulq_f32(a[quarter], b[quarter]))
    };
    let halves = |start: usize| -> [_; QUARTERS] {
        array::from_fn(|quarter| halves(part(record, start + quarter * 8)))
    };
    let singles = |index: usize| -> [_; QUARTERS] {
        array::from_fn(|quarter| single(record, index * 64 + quarter * 16))
    };
    match layout {
        Scales::Group | Scales::Super => [without_min(halves(0)); 2],
        Scales::GroupBf16 => {
            let scale = array::from_fn(|quarter| bf16s(part(record, quarter * 8)));
            [without_min(scale); 2]
        }
        Scales::GroupMin => [with_min(halves(0), halves(32)); 2],
        Scales::Sub32 => {
            let unit = halves(0).map(|unit| vmulq_n_f32(unit, tile.factor));
            [without_min(times(unit, bytes(load(record, 32 + position * 16)))); 2]
        }
        Scales::Sub32Min => {
            let place = 64 + position * 32;
            let scale = times(halves(0), bytes(load(record, place)));
            let min = times(halves(32), bytes(load(record, place + 16)));
            [with_min(scale, min.map(|min| vnegq_f32(min))); 2]
        }
        Scales::Sub16 => {
            let unit = halves(0).map(|unit| vmulq_n_f32(unit, tile.factor));
            [0, 1].map(|half| {
                let place = 32 + (position * 2 + half) * 16;
                without_min(times(unit, bytes(load(record, place))))
            })
        }
        Scales::Sub16Min => {
            let (unit, min_unit) = (halves(0), halves(32));
            [0, 1].map(|half| {
                let pair = load(record, 64 + (position * 2 + half) * 16);
                let scale = times(unit, bytes(vandq_u8(pair, vdupq_n_u8(15))));
                let min = times(min_unit, bytes(vshrq_n_u8::<4>(pair)));
                with_min(scale, min.map(|min| vnegq_f32(min)))
            })
        }
        Scales::Span => [without_min(singles(0)); 2],
        Scales::SpanMin => [with_min(singles(0), singles(1)); 2],
        Scales::Halves => [without_min(singles(0)), without_min(singles(1))],
        Scales::HalvesMin => [0, 2].map(|first| with_min(singles(first), singles(first + 1))),
    }
}

/// Signed bytes as numbers.
#[inline]
#[target_feature(enable = "neon")]
fn bytes(bytes: uint8x16_t) -> [float32x4_t; QUARTERS] {
    let bytes = vreinterpretq_s8_u8(bytes);
    let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    ]
}
