//! Products of bytes in registers of 256 bits.

use std::arch::x86_64::__m256i;

/// How unsigned bytes are multiplied with signed ones, and neighbours' products added up.
pub(crate) trait Bytes {
    /// True where four products are added to a sum of 32 bits at once, see [`Bytes::fours`]. Without
    /// that two are added up in 16 bits first, and saturate there.
    const FOURS: bool;

    /// `sums` + the sum of four products in each lane.
    ///
    /// # Safety
    /// The processor has AVX2 and the instruction that the type stands for.
    unsafe fn fours(sums: __m256i, weights: __m256i, codes: __m256i) -> __m256i;
}

/// The instructions of AVX2.
pub(crate) enum Twos {}

impl Bytes for Twos {
    const FOURS: bool = false;

    unsafe fn fours(_: __m256i, _: __m256i, _: __m256i) -> __m256i {
        unreachable!("AVX2 adds up two products")
    }
}

/// Implements [`Bytes`] by the VNNI instruction in one of its encodings. Its intrinsics would have every
/// function around them compiled for that encoding's instruction set alone.
macro_rules! vnni {
    ($(#[$attribute:meta])* $name:ident, $instruction:literal) => {
        $(#[$attribute])*
        pub(crate) enum $name {}

        impl Bytes for $name {
            const FOURS: bool = true;

            #[inline]
            #[target_feature(enable = "avx2")]
            unsafe fn fours(mut sums: __m256i, weights: __m256i, codes: __m256i) -> __m256i {
                // SAFETY: the caller vouches for the instruction, which touches its operands only.
                unsafe {
                    std::arch::asm!(
                        concat!($instruction, " {sums}, {weights}, {codes}"),
                        sums = inout(ymm_reg) sums,
                        weights = in(ymm_reg) weights,
                        codes = in(ymm_reg) codes,
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
                sums
            }
        }
    };
}

vnni!(
    /// AVX-VNNI's.
    Vex,
    "{{vex}} vpdpbusd"
);
vnni!(
    /// That of AVX-512 VNNI with VL.
    Evex,
    "{{evex}} vpdpbusd"
);
