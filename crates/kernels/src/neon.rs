//! Instructions on bytes that have no stable intrinsics.

use std::arch::aarch64::{int8x16_t, int32x4_t};
use std::arch::asm;

/// `sum` plus the dot product of each lane's four bytes with those of lane `LANE` of `b`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn sdot<const LANE: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes these registers only.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `sum` plus a · bᵀ, where `a` and `b` are two rows of eight bytes and `sum` is two rows of two.
#[inline]
#[target_feature(enable = "neon,i8mm")]
pub(crate) fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes these registers only.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
