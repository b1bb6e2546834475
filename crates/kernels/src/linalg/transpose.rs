//! Squares of 16 × 16 words turned over in registers, for packing panels: done one by one, that takes as long as
//! multiplying them with a few dozen rows.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::Isa;

/// Rows and columns of a square.
pub(super) const SIDE: usize = 16;

/// Whether [`transpose`] is there for an instruction set.
pub(super) fn is_fast(isa: Isa) -> bool {
    cfg!(target_arch = "x86_64") && matches!(isa, Isa::Avx512 | Isa::Avx512Bf16)
}

/// `out[k · out_stride + i] = from[i · stride + k]` for all `k` of a side and `i` in `0..cols`.
///
/// # Panics
/// Where the slices are too short, `cols` is more than a side, and where not [`is_fast`].
pub(super) fn transpose(
    isa: Isa,
    from: &[f32],
    stride: usize,
    cols: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    check(from, (cols - 1) * stride + SIDE, cols, out, out_stride);
    assert!(is_fast(isa), "squares of words for {isa}");
    // SAFETY: there is room by the checks above, and a `Cpu` carries an instruction set only where the processor has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::transpose(from.as_ptr(), stride, cols, out.as_mut_ptr(), out_stride);
    }
}

/// The same of pairs of bf16 numbers: word `k` of column `i` has what `from[i · stride + 2k]` and the value after it are
/// rounded to. Needs AVX-512 with BF16.
///
/// # Panics
/// Where the slices are too short, `cols` is more than a side, and without those instructions.
pub(super) fn transpose_bf16(
    from: &[f32],
    stride: usize,
    cols: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    check(from, (cols - 1) * stride + 2 * SIDE, cols, out, out_stride);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: there is room by the check above; panels are packed in bf16 only for an instruction set that has it.
    unsafe {
        x86::transpose_bf16(from.as_ptr(), stride, cols, out.as_mut_ptr(), out_stride);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("bf16 panels are for AVX-512");
}

/// Word `i` of a side has what `low[i]` and `high[i]` are rounded to. Needs AVX-512 with BF16.
///
/// # Panics
/// Where the slices are too short, and without those instructions.
pub(super) fn interleave_bf16(low: &[f32], high: &[f32], out: &mut [f32]) {
    let (low, high, out) = (&low[..SIDE], &high[..SIDE], &mut out[..SIDE]);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: sixteen words lie at each; panels are packed in bf16 only for an instruction set that has it.
    unsafe {
        x86::interleave_bf16(low.as_ptr(), high.as_ptr(), out.as_mut_ptr());
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("bf16 panels are for AVX-512: {} {} {}", low.len(), high.len(), out.len());
}

fn check(from: &[f32], needed: usize, cols: usize, out: &[f32], out_stride: usize) {
    assert!((1..=SIDE).contains(&cols) && from.len() >= needed, "words of a square");
    assert!(out.len() >= (SIDE - 1) * out_stride + cols, "room for a square");
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;

    /// # Safety
    /// [`super::transpose`]'s slices are long enough.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(
        from: *const f32,
        stride: usize,
        cols: usize,
        out: *mut f32,
        out_stride: usize,
    ) {
        let mut rows = [_mm512_setzero_ps(); SIDE];
        for (i, row) in rows.iter_mut().enumerate().take(cols) {
            // SAFETY: the caller's word.
            *row = unsafe { _mm512_loadu_ps(from.add(i * stride)) };
        }
        // SAFETY: the caller's word.
        unsafe { store(square(rows), cols, out, out_stride) };
    }

    /// # Safety
    /// [`super::transpose_bf16`]'s slices are long enough.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn transpose_bf16(
        from: *const f32,
        stride: usize,
        cols: usize,
        out: *mut f32,
        out_stride: usize,
    ) {
        let mut rows = [_mm512_setzero_ps(); SIDE];
        for (i, row) in rows.iter_mut().enumerate().take(cols) {
            // SAFETY: the caller's word; 32 bf16 numbers are 16 words.
            *row = unsafe {
                let from = from.add(i * stride);
                let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(SIDE)));
                std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low))
            };
        }
        // SAFETY: the caller's word.
        unsafe { store(square(rows), cols, out, out_stride) };
    }

    /// # Safety
    /// Sixteen words lie at each.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn interleave_bf16(low: *const f32, high: *const f32, out: *mut f32) {
        // SAFETY: the caller's word; the halves of a register of bf16 numbers are integers of 16 bits.
        unsafe {
            let round = |values: *const f32| {
                let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(rounded))
            };
            let words = _mm512_or_si512(round(low), _mm512_slli_epi32::<16>(round(high)));
            _mm512_storeu_ps(out, _mm512_castsi512_ps(words));
        }
    }

    /// Word `i` of register `k` becomes word `k` of register `i`.
    #[target_feature(enable = "avx512f")]
    fn square(mut r: [__m512; SIDE]) -> [__m512; SIDE] {
        // Within squares of 4 × 4 words, in each quarter of the registers.
        for four in r.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *four;
            let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let (low2, high2) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let pairs = |x, y| (_mm512_castps_pd(x), _mm512_castps_pd(y));
            let (x, y) = pairs(low, low2);
            let (z, w) = pairs(high, high2);
            *four = [
                _mm512_unpacklo_pd(x, y),
                _mm512_unpackhi_pd(x, y),
                _mm512_unpacklo_pd(z, w),
                _mm512_unpackhi_pd(z, w),
            ]
            .map(|pairs| _mm512_castpd_ps(pairs));
        }
        // And these squares among themselves.
        let mut out = r;
        for i in 0..4 {
            let (a, b, c, d) = (r[i], r[4 + i], r[8 + i], r[12 + i]);
            let even = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
            let odd = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
            out[i] = _mm512_shuffle_f32x4::<0x88>(even.0, even.1);
            out[4 + i] = _mm512_shuffle_f32x4::<0x88>(odd.0, odd.1);
            out[8 + i] = _mm512_shuffle_f32x4::<0xdd>(even.0, even.1);
            out[12 + i] = _mm512_shuffle_f32x4::<0xdd>(odd.0, odd.1);
        }
        out
    }

    /// # Safety
    /// There is room for `cols` words of each.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(lines: [__m512; SIDE], cols: usize, out: *mut f32, out_stride: usize) {
        let mask = u16::MAX >> (SIDE - cols);
        for (k, line) in lines.into_iter().enumerate() {
            // SAFETY: the caller's word.
            unsafe { _mm512_mask_storeu_ps(out.add(k * out_stride), mask, line) };
        }
    }
}
