//! The kernels for AVX2: two registers hold the 16 rows of a tile.
//!
//! With a few tokens the tile's numbers are unpacked as they are multiplied. With more, a stretch of the
//! tile is unpacked once, to what the multiplication takes, and multiplied with one block of tokens after
//! the other; it stays in the first-level cache meanwhile.

mod dense;
mod integer;
mod quantize;
mod scales;

use std::arch::x86_64::*;

use super::layout::ROWS;

pub(super) use dense::{dense_bf16, dense_f8, dense_f16, dense_f32};
pub(super) use integer::integer;
pub(super) use quantize::quantize_block;

/// The eight rows that a register holds: the first or the last of a tile.
type Half = usize;

/// How far ahead codes are asked for.
const AHEAD: usize = 8 << 10;

/// Half of the list of 16 singles `index` of a record.
#[inline]
#[target_feature(enable = "avx2")]
fn singles(record: &[u8], index: usize, half: Half) -> __m256 {
    _mm256_castsi256_ps(load(part(record, index * 64), half))
}

/// The 32-bit word `index` of `block`, in all lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn word(block: &[u8], index: usize) -> __m256i {
    _mm256_set1_epi32(i32::from_ne_bytes(*part(block, index * 4)))
}

/// The `N` elements at `start`.
#[inline(always)]
fn part<T, const N: usize>(values: &[T], start: usize) -> &[T; N] {
    values[start..].first_chunk().expect("lengths are those of the layout")
}

/// Half of a tile's register.
#[inline]
#[target_feature(enable = "avx2")]
fn load(register: &[u8; 64], half: Half) -> __m256i {
    let (halves, _) = register.as_chunks::<32>();
    // SAFETY: reads exactly an array of 32 bytes; any address will do.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: as in `load`.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load64(bytes: &[u8; 8]) -> __m128i {
    _mm_set_epi64x(0, i64::from_le_bytes(*bytes))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(values: &[f32; 8]) -> __m256 {
    // SAFETY: as in `load`.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_codes(out: &mut [i8; 32], codes: __m256i) {
    // SAFETY: writes exactly the array; any address will do.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) }
}

/// Half of a list of 16 singles.
#[inline]
#[target_feature(enable = "avx2")]
fn load_single(values: &[f32; ROWS], half: Half) -> __m256 {
    let (halves, _) = values.as_chunks::<8>();
    load_f32(&halves[half])
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(out: &mut [f32; ROWS], value: [__m256; 2]) {
    let (halves, _) = out.as_chunks_mut::<8>();
    for half in 0..2 {
        // SAFETY: writes exactly an array of eight values; any address will do.
        unsafe { _mm256_storeu_ps(halves[half].as_mut_ptr(), value[half]) };
    }
}
