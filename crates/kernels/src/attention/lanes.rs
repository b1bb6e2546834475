//! Vectors of f32, as few operations on them as attention needs.

use half::{bf16, f16};

/// A vector register of an instruction set.
///
/// # Safety
/// Every function may be called only where the processor has the instruction set, and inlines into a
/// caller compiled for it. Pointers are to [`Lanes::COUNT`] elements, aligned or not.
pub(super) trait Lanes {
    /// Values in a register.
    const COUNT: usize;
    /// Rows of a micro tile.
    const ROWS: usize;
    /// Registers that hold sums in an inner loop.
    const SUMS: usize;
    type Vector: Copy;

    unsafe fn splat(value: f32) -> Self::Vector;
    unsafe fn load(from: *const f32) -> Self::Vector;
    unsafe fn load_f16(from: *const f16) -> Self::Vector;
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector;
    unsafe fn load_i8(from: *const i8) -> Self::Vector;
    /// The low four bits of each byte, less 8.
    unsafe fn load_low(from: *const u8) -> Self::Vector;
    /// The high four bits of each byte, less 8.
    unsafe fn load_high(from: *const u8) -> Self::Vector;
    unsafe fn store(to: *mut f32, value: Self::Vector);
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The larger of each two numbers.
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a · b + c, rounded once.
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, bf16, f16};

    pub(in super::super) enum Avx2 {}

    impl Lanes for Avx2 {
        const COUNT: usize = 8;
        const ROWS: usize = 6;
        const SUMS: usize = 12;
        type Vector = __m256;

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m256 {
            // SAFETY: the contract of `Lanes`, here and below.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_low(from: *const u8) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe {
                let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
                let codes = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
                _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)))
            }
        }
        #[inline(always)]
        unsafe fn load_high(from: *const u8) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe {
                let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
                let codes = _mm256_srli_epi32::<4>(bytes);
                _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)))
            }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, value: __m256) {
            // SAFETY: as in `splat`.
            unsafe { _mm256_storeu_ps(to, value) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: as in `splat`.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
    }

    /// What codes of four bits stand for.
    const LEVELS: [f32; 16] =
        [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

    pub(in super::super) enum Avx512 {}

    impl Lanes for Avx512 {
        const COUNT: usize = 16;
        const ROWS: usize = 8;
        const SUMS: usize = 16;
        type Vector = __m512;

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            // SAFETY: the contract of `Lanes`, here and below.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_low(from: *const u8) -> __m512 {
            // The permutation looks at the low four bits of an index alone.
            // SAFETY: as in `splat`.
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                _mm512_permutexvar_ps(bytes, _mm512_loadu_ps(LEVELS.as_ptr()))
            }
        }
        #[inline(always)]
        unsafe fn load_high(from: *const u8) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                let codes = _mm512_srli_epi32::<4>(bytes);
                _mm512_permutexvar_ps(codes, _mm512_loadu_ps(LEVELS.as_ptr()))
            }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, value: __m512) {
            // SAFETY: as in `splat`.
            unsafe { _mm512_storeu_ps(to, value) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::aarch64::*;

    use super::{Lanes, bf16, f16};

    /// Codes of four bits less 8.
    #[inline(always)]
    fn centred(codes: uint8x8_t) -> [float32x4_t; 2] {
        // SAFETY: every AArch64 processor has NEON.
        unsafe { widened(vsub_s8(vreinterpret_s8_u8(codes), vdup_n_s8(8))) }
    }

    #[inline(always)]
    fn widened(bytes: int8x8_t) -> [float32x4_t; 2] {
        // SAFETY: as in `centred`.
        unsafe {
            let wide = vmovl_s8(bytes);
            [vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide)].map(|v| vcvtq_f32_s32(v))
        }
    }

    /// Pairs of registers, so that a single row has as many sums as it takes for none to wait.
    pub(in super::super) enum Neon {}

    impl Lanes for Neon {
        const COUNT: usize = 8;
        const ROWS: usize = 4;
        const SUMS: usize = 8;
        type Vector = [float32x4_t; 2];

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self::Vector {
            // SAFETY: the contract of `Lanes`, here and below.
            unsafe { [vdupq_n_f32(value); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe {
                let bits = vreinterpretq_f16_u16(vld1q_u16(from.cast()));
                [vcvt_f32_f16(vget_low_f16(bits)), vcvt_high_f32_f16(bits)]
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe {
                let bits = vld1q_u16(from.cast());
                let wide = [vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits)];
                [vreinterpretq_f32_u32(wide[0]), vreinterpretq_f32_u32(wide[1])]
            }
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { widened(vld1_s8(from)) }
        }
        #[inline(always)]
        unsafe fn load_low(from: *const u8) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { centred(vand_u8(vld1_u8(from), vdup_n_u8(15))) }
        }
        #[inline(always)]
        unsafe fn load_high(from: *const u8) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { centred(vshr_n_u8::<4>(vld1_u8(from))) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, value: Self::Vector) {
            // SAFETY: as in `splat`.
            unsafe {
                vst1q_f32(to, value[0]);
                vst1q_f32(to.add(4), value[1]);
            }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { [vmaxnmq_f32(a[0], b[0]), vmaxnmq_f32(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
            // SAFETY: as in `splat`.
            unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use aarch64::Neon;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};
