//! What packing panels does in registers: squares of 16 × 16 words are turned over, and numbers are rounded to bf16, two in
//! a word. Done one by one, that takes as long as multiplying them with a few dozen rows.

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

/// Pairs of neighbours, rounded to bf16, as words; the last word has a zero where its second is missing. Needs AVX-512 with
/// BF16.
///
/// # Panics
/// Where `words` has another length than `values` needs, and without those instructions.
pub(super) fn round_bf16(values: &[f32], words: &mut [f32]) {
    assert_eq!(words.len(), values.len().div_ceil(2), "a word for two values");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the lengths fit by the check above; words of bf16 are made only for an instruction set that has it.
    unsafe {
        x86::round_bf16(values, words);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("bf16 panels are for AVX-512");
}

/// A panel's part of rows of numbers: word `i` of its line `k` has number `i` of the rows `2k` and `2k + 1`, zero where there
/// is none. `there` of `width` columns are there.
struct Woven<'a> {
    rows: usize,
    there: usize,
    out: &'a mut [f32],
    width: usize,
}

impl Woven<'_> {
    fn check(&self) {
        assert!(self.there <= self.width, "columns of the panel");
        assert_eq!(self.out.len(), self.rows.div_ceil(2) * self.width, "words of two rows each");
    }
}

/// Rows that begin `stride` numbers apart, rounded to bf16, two in a line. Needs AVX-512 with BF16.
///
/// # Panics
/// Where the lengths do not fit, and without those instructions.
pub(super) fn interleave(
    from: &[f32],
    stride: usize,
    rows: usize,
    there: usize,
    out: &mut [f32],
    width: usize,
) {
    let woven = Woven { rows, there, out, width };
    woven.check();
    assert!(rows == 0 || (rows - 1) * stride + there <= from.len(), "columns of the rows");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the lengths fit by the checks above; panels of bf16 are packed only for an instruction set that has it.
    unsafe {
        x86::interleave(from, stride, woven);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("bf16 panels are for AVX-512: {}", woven.out.len());
}

/// The same of the columns from `first` on of lines that are rounded already, of `stride` words each.
///
/// # Panics
/// Where the lengths do not fit, and without those instructions.
pub(super) fn interleave_rounded(
    lines: &[f32],
    stride: usize,
    first: usize,
    there: usize,
    out: &mut [f32],
    width: usize,
) {
    let woven = Woven { rows: lines.len() / stride, there, out, width };
    woven.check();
    assert!(first + there <= 2 * stride, "columns of the lines");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the lengths fit by the checks above; panels of bf16 are packed only for an instruction set that has it.
    unsafe {
        x86::interleave_rounded(lines, stride, first, woven);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("bf16 panels are for AVX-512: {}", woven.out.len());
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
    /// The processor has the instructions, and there is a word for two values.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn round_bf16(values: &[f32], words: &mut [f32]) {
        let (whole, rest) = values.as_chunks::<{ 2 * SIDE }>();
        for (values, words) in whole.iter().zip(words.as_chunks_mut::<SIDE>().0) {
            // SAFETY: 32 values, which are 16 words.
            unsafe {
                let (low, high) =
                    (_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values[SIDE..].as_ptr()));
                let pairs = _mm512_cvtne2ps_pbh(high, low);
                _mm512_storeu_ps(
                    words.as_mut_ptr(),
                    std::mem::transmute::<__m512bh, __m512>(pairs),
                );
            }
        }
        let bits = |value: &f32| u32::from(half::bf16::from_f32(*value).to_bits());
        for (pair, word) in rest.chunks(2).zip(&mut words[whole.len() * SIDE..]) {
            *word = f32::from_bits(bits(&pair[0]) | pair.get(1).map_or(0, bits) << 16);
        }
    }

    /// # Safety
    /// The processor has the instructions; [`super::interleave`] checked the lengths.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn interleave(from: &[f32], stride: usize, woven: Woven<'_>) {
        let numbers = |row: usize, col: usize, mask: u16| {
            // SAFETY: the numbers that the mask has are inside the row.
            let values = unsafe {
                _mm512_maskz_loadu_ps(mask, from.as_ptr().wrapping_add(row * stride + col))
            };
            let rounded = _mm512_cvtneps_pbh(values);
            // SAFETY: bf16 numbers are integers of 16 bits here.
            unsafe { _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(rounded)) }
        };
        // SAFETY: the processor has the instructions.
        unsafe { weave(woven, numbers) };
    }

    /// # Safety
    /// The processor has the instructions; [`super::interleave_rounded`] checked the lengths.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn interleave_rounded(
        lines: &[f32],
        stride: usize,
        first: usize,
        woven: Woven<'_>,
    ) {
        let numbers = |row: usize, col: usize, mask: u16| {
            let from = lines.as_ptr().cast::<i16>().wrapping_add(2 * row * stride + first + col);
            // SAFETY: the numbers that the mask has are inside the line.
            unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)) }
        };
        // SAFETY: the processor has the instructions.
        unsafe { weave(woven, numbers) };
    }

    /// # Safety
    /// The processor has the instructions.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn weave(woven: Woven<'_>, numbers: impl Fn(usize, usize, u16) -> __m512i) {
        let Woven { rows, there, out, width } = woven;
        for (k, line) in out.chunks_exact_mut(width).enumerate() {
            for (col, words) in (0..).step_by(SIDE).zip(line.chunks_mut(SIDE)) {
                let mask = first_lanes(there.saturating_sub(col).min(SIDE));
                let mut both = numbers(2 * k, col, mask);
                if 2 * k + 1 < rows {
                    let high = numbers(2 * k + 1, col, mask);
                    both = _mm512_or_si512(both, _mm512_slli_epi32::<16>(high));
                }
                let both = _mm512_castsi512_ps(both);
                // SAFETY: the mask has as many words as there are.
                unsafe {
                    _mm512_mask_storeu_ps(words.as_mut_ptr(), first_lanes(words.len()), both);
                }
            }
        }
    }

    /// So many of a register's lanes.
    fn first_lanes(count: usize) -> u16 {
        ((1u32 << count) - 1) as u16
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
        let mask = first_lanes(cols);
        for (k, line) in lines.into_iter().enumerate() {
            // SAFETY: the caller's word.
            unsafe { _mm512_mask_storeu_ps(out.add(k * out_stride), mask, line) };
        }
    }
}
