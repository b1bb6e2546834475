//! How the instruction sets with NEON multiply bytes: all that their integer kernels differ in.
//!
//! A register of weights holds a quad of columns of four rows.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::layout::{Coding, Format};
use super::load;
use crate::neon::{sdot, smmla};

/// Products of four rows with the tokens of a block.
///
/// # Safety
/// Functions may be called only where the processor has the instruction set, and inline into a caller
/// compiled for it.
pub(super) trait Dot {
    /// `start` plus Σ level · code over `Q` quads, for each token: a lane is a row. `codes` are those of
    /// the quads, as the instruction set's activations lie (`quantize_block`).
    unsafe fn dots<F: Format, const Q: usize, const T: usize>(
        start: [int32x4_t; T],
        levels: [int8x16_t; Q],
        codes: &[u8],
    ) -> [int32x4_t; T];
}

/// A loop that is written out: registers have no numbers that a loop could count.
macro_rules! each_of_eight {
    ($k:ident => $body:expr) => {
        each_of_eight!($k => $body; 0 1 2 3 4 5 6 7)
    };
    ($k:ident => $body:expr; $($number:literal)*) => {
        $({
            let $k = $number;
            $body
        })*
    };
}

/// Products widened to 16 bits, some of them added up there.
pub(super) enum Widening {}

impl Dot for Widening {
    #[inline(always)]
    unsafe fn dots<F: Format, const Q: usize, const T: usize>(
        mut start: [int32x4_t; T],
        levels: [int8x16_t; Q],
        codes: &[u8],
    ) -> [int32x4_t; T] {
        let run = const { if run_length(F::CODING) < Q { run_length(F::CODING) } else { Q } };
        // SAFETY: every AArch64 processor has NEON.
        unsafe {
            let levels = levels.map(|levels| opaque(levels));
            for t in 0..T {
                // Two lanes a row: of the first and last two rows.
                let mut sums = [vdupq_n_s32(0); 2];
                for first in (0..Q).step_by(run) {
                    let code = code::<T>(codes, first, t);
                    let mut low = vmull_s8(vget_low_s8(levels[first]), vget_low_s8(code));
                    let mut high = vmull_high_s8(levels[first], code);
                    for k in first + 1..first + run {
                        let code = self::code::<T>(codes, k, t);
                        low = vmlal_s8(low, vget_low_s8(levels[k]), vget_low_s8(code));
                        high = vmlal_high_s8(high, levels[k], code);
                    }
                    sums = [vpadalq_s16(sums[0], low), vpadalq_s16(sums[1], high)];
                }
                start[t] = vaddq_s32(start[t], vpaddq_s32(sums[0], sums[1]));
            }
        }
        start
    }
}

/// The same register, of which the compiler knows nothing: where it knows that no level is negative,
/// it widens before it multiplies, in more instructions.
#[inline]
#[target_feature(enable = "neon")]
fn opaque(mut levels: int8x16_t) -> int8x16_t {
    // SAFETY: there is no instruction.
    unsafe {
        asm!("/* {0:v} */", inout(vreg) levels, options(pure, nomem, nostack, preserves_flags))
    };
    levels
}

/// How many quads' products fit together in 16 bits.
const fn run_length(coding: Coding) -> usize {
    let level = if coding.full_byte() { 128 } else { (1 << coding.bits) - 1 };
    match i16::MAX / (127 * level) {
        8.. => 8,
        4.. => 4,
        _ => 2,
    }
}

/// Quad `k` of token `t`, in all lanes.
#[inline]
#[target_feature(enable = "neon")]
fn code<const T: usize>(codes: &[u8], k: usize, t: usize) -> int8x16_t {
    vreinterpretq_s8_s32(super::word(codes, k * T + t))
}

/// The dot product of four bytes in each lane.
pub(super) enum DotProducts {}

impl Dot for DotProducts {
    #[inline(always)]
    unsafe fn dots<F: Format, const Q: usize, const T: usize>(
        mut start: [int32x4_t; T],
        levels: [int8x16_t; Q],
        codes: &[u8],
    ) -> [int32x4_t; T] {
        each_of_eight!(k => if k < Q {
            for t in 0..T {
                let word = k * T + t;
                // SAFETY: the contract of `Dot`.
                start[t] = unsafe {
                    let codes = vreinterpretq_s8_u8(load(codes, word / 4 * 16));
                    match word % 4 {
                        0 => sdot::<0>(start[t], levels[k], codes),
                        1 => sdot::<1>(start[t], levels[k], codes),
                        2 => sdot::<2>(start[t], levels[k], codes),
                        _ => sdot::<3>(start[t], levels[k], codes),
                    }
                };
            }
        });
        start
    }
}

/// The product of two rows of eight bytes with two tokens' eight bytes. Pairs of quads of a token lie
/// together.
pub(super) enum MatrixProducts {}

impl Dot for MatrixProducts {
    #[inline(always)]
    unsafe fn dots<F: Format, const Q: usize, const T: usize>(
        mut start: [int32x4_t; T],
        levels: [int8x16_t; Q],
        codes: &[u8],
    ) -> [int32x4_t; T] {
        if T == 1 {
            // The codes of one token lie as they do for dot products.
            // SAFETY: the contract of `Dot`.
            return unsafe { DotProducts::dots::<F, Q, T>(start, levels, codes) };
        }
        // SAFETY: the contract of `Dot`.
        unsafe {
            // Of the first two rows and of the last two, with each of two tokens: [row][token].
            let mut sums = [[vdupq_n_s32(0); 2]; T];
            each_of_eight!(pair => if pair < Q / 2 {
                let first = vreinterpretq_s32_s8(levels[2 * pair]);
                let second = vreinterpretq_s32_s8(levels[2 * pair + 1]);
                let rows = [vzip1q_s32(first, second), vzip2q_s32(first, second)];
                for t in (0..T).step_by(2) {
                    let codes = vreinterpretq_s8_u8(load(codes, (pair * T + t) * 8));
                    for half in 0..2 {
                        let rows = vreinterpretq_s8_s32(rows[half]);
                        sums[t][half] = smmla(sums[t][half], rows, codes);
                    }
                }
            });
            for t in (0..T).step_by(2) {
                let [first, last] = sums[t];
                start[t] = vaddq_s32(start[t], vuzp1q_s32(first, last));
                start[t + 1] = vaddq_s32(start[t + 1], vuzp2q_s32(first, last));
            }
        }
        start
    }
}
