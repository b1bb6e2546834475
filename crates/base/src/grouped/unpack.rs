//! Codes of a group as weights, in the widest vectors there are.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::pack::{Work, run_wide};

/// `out[i] = weight(codes[i])`
pub(super) fn each(codes: &[u8], out: &mut [f32], weight: impl Fn(u8) -> f32) {
    struct Each<'a, W>(&'a [u8], &'a mut [f32], W);
    impl<W: Fn(u8) -> f32> Work for Each<'_, W> {
        #[inline(always)]
        fn run(self) {
            for (out, &code) in self.1.iter_mut().zip(self.0) {
                *out = (self.2)(code);
            }
        }
    }
    // Columns that were quantized in another order come one by one, and fill no vector.
    match (codes, &mut *out) {
        ([code], [out]) => *out = weight(*code),
        _ => run_wide(Each(codes, out, weight)),
    }
}

/// `out[i] = table[codes[i]]`, for codes of 4 bits: the table is one register, which no compiler finds out.
pub(super) fn levels(codes: &[u8], out: &mut [f32], table: &[f32; 16]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the feature, checked just above.
        return unsafe { levels_avx512(codes, out, table) };
    }
    each(codes, out, |code| table[usize::from(code & 15)]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn levels_avx512(codes: &[u8], out: &mut [f32], table: &[f32; 16]) {
    let (whole, rest) = codes.as_chunks::<16>();
    let (out, last) = out.split_at_mut(16 * whole.len());
    // SAFETY: sixteen values or codes lie at each address.
    unsafe {
        let table = _mm512_loadu_ps(table.as_ptr());
        for (codes, out) in whole.iter().zip(out.as_chunks_mut::<16>().0) {
            // The upper bits of an index are not looked at.
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(index, table));
        }
    }
    for (out, &code) in last.iter_mut().zip(rest) {
        *out = table[usize::from(code & 15)];
    }
}
