//! Rounding activations to bytes.

use std::arch::x86_64::*;

use super::super::activations::{Rounded, factor_and_scale, put_rounded};
use super::super::bytes::Bytes;
use super::{load_f32, part, store_codes};

/// Rounds the `tokens` rows of `x` to int8 groups, into one block.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn quantize_block<B: Bytes>(x: &[f32], tokens: usize, out: &mut [u8]) {
    put_rounded::<1>(x, tokens, out, |group| {
        let x = [0, 1, 2, 3].map(|i| load_f32(part(group, i * 8)));
        let magnitudes =
            x.map(|v| _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff_ffff)));
        let most = _mm256_max_epu32(
            _mm256_max_epu32(magnitudes[0], magnitudes[1]),
            _mm256_max_epu32(magnitudes[2], magnitudes[3]),
        );
        let most = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
        let most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0b01_00_11_10));
        let most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0b10_11_00_01));
        let (factor, scale) = factor_and_scale(_mm_cvtsi128_si32(most) as u32);
        // Converting rounds to nearest, ties to even.
        let q = x.map(|v| _mm256_cvtps_epi32(_mm256_mul_ps(v, _mm256_set1_ps(factor))));
        // Packing works on each half of a register: the four-byte runs end in the order
        // 0, 2, 4, 6, 1, 3, 5, 7.
        let words = [_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])];
        let bytes = _mm256_permutevar8x32_epi32(
            _mm256_packs_epi16(words[0], words[1]),
            _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7),
        );
        let mut codes = [0; 32];
        store_codes(&mut codes, bytes);
        // In each lane of 32 bits the sums of four codes, or of two and two.
        let mut sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        if B::FOURS {
            sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        }
        let add = |a: __m256i, b: __m256i| match B::FOURS {
            true => _mm256_add_epi32(a, b),
            false => _mm256_add_epi16(a, b),
        };
        let sums = add(sums, _mm256_shuffle_epi32(sums, 0b01_00_11_10));
        let sums = add(sums, _mm256_shuffle_epi32(sums, 0b10_11_00_01));
        let zero = _mm256_setzero_si256();
        let sums =
            if B::FOURS { _mm256_sub_epi32(zero, sums) } else { _mm256_sub_epi16(zero, sums) };
        let all = add(sums, _mm256_permute4x64_epi64(sums, 0b01_00_11_10));
        let negative_sums = [
            _mm256_extract_epi32::<0>(all),
            _mm256_extract_epi32::<0>(sums),
            _mm256_extract_epi32::<4>(sums),
        ];
        Rounded { codes, scale, negative_sums }
    });
}
