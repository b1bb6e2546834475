//! Products of dense and float tiles, in single precision.
//!
//! Even and odd columns are summed apart, so that the sums of one token do not wait for every addition.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::kernels::{PANEL_TOKENS, Panel, Sums};
use super::super::layout::ROWS;
use super::super::packed::Tile;
use super::super::prefetch::fetch_ahead;
use super::{AHEAD, load, load_single, load64, load128, part, singles, store, word};

/// Products of a tile of f32 numbers with the tokens of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dense_f32(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<Singles>(tile, panel, sums);
}

/// Products of a tile of f16 numbers with the tokens of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dense_f16(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<Halves>(tile, panel, sums);
}

/// Products of a tile of bf16 numbers with the tokens of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dense_bf16(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<Bf16s>(tile, panel, sums);
}

/// Products of a tile of F8_E4M3 codes with the tokens of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dense_f8(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<Float8s>(tile, panel, sums);
}

/// How numbers lie in a tile.
///
/// # Safety
/// Functions may be called where the processor has AVX2, FMA and F16C, and inline into a caller
/// compiled for them.
trait Numbers {
    /// Bytes of a column.
    const COLUMN: usize;
    /// Fewest tokens for which a tile is unpacked before it is multiplied.
    const UNPACK_TOKENS: usize;

    /// What the numbers of the columns that share a record of scales are multiplied with; `None` where
    /// they are the weights.
    unsafe fn scale(scales: &[u8], record: usize) -> Option<[__m256; 2]>;

    /// A column's numbers, rows 0 to 7 and 8 to 15.
    unsafe fn column(column: &[u8]) -> [__m256; 2];
}

struct Singles;
struct Halves;
struct Bf16s;
struct Float8s;

impl Numbers for Singles {
    const COLUMN: usize = 64;
    const UNPACK_TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn scale(_: &[u8], _: usize) -> Option<[__m256; 2]> {
        None
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn column(column: &[u8]) -> [__m256; 2] {
        [0, 1].map(|half| _mm256_castsi256_ps(load(part(column, 0), half)))
    }
}

impl Numbers for Halves {
    const COLUMN: usize = 32;
    const UNPACK_TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn scale(_: &[u8], _: usize) -> Option<[__m256; 2]> {
        None
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn column(column: &[u8]) -> [__m256; 2] {
        [0, 1].map(|half| _mm256_cvtph_ps(load128(part(column, half * 16))))
    }
}

impl Numbers for Bf16s {
    const COLUMN: usize = 32;
    const UNPACK_TOKENS: usize = 16;

    #[inline(always)]
    unsafe fn scale(_: &[u8], _: usize) -> Option<[__m256; 2]> {
        None
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn column(column: &[u8]) -> [__m256; 2] {
        [0, 1].map(|half| {
            let bits = _mm256_cvtepu16_epi32(load128(part(column, half * 16)));
            _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))
        })
    }
}

impl Numbers for Float8s {
    const COLUMN: usize = ROWS;
    const UNPACK_TOKENS: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale(scales: &[u8], record: usize) -> Option<[__m256; 2]> {
        // 2^8: see `column`.
        let factor = _mm256_set1_ps(256.0);
        Some([0, 1].map(|half| _mm256_mul_ps(singles(scales, record, half), factor)))
    }

    /// As a half with the same bits the number is 2^8 times smaller: the exponents' biases are 7 and 15.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn column(column: &[u8]) -> [__m256; 2] {
        [0, 1].map(|half| {
            let signed = _mm_cvtepi8_epi16(load64(part(column, half * 8)));
            let bits = _mm_slli_epi16(signed, 7);
            _mm256_cvtph_ps(_mm_and_si128(bits, _mm_set1_epi16(!0x4000)))
        })
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<N: Numbers>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    if panel.tokens() >= N::UNPACK_TOKENS {
        return stretches::<N>(tile, panel, sums);
    }
    for (first, tokens, block) in panel.blocks() {
        let sums = &mut sums[first..first + tokens];
        match tokens {
            // Two tokens in a pass: the sums of more would not fit in sixteen registers.
            8 => passes::<N, 8>(tile, block, sums),
            4 => passes::<N, 4>(tile, block, sums),
            2 => packed_block::<N, 2, 2>(tile, block, 0, sums),
            _ => packed_block::<N, 1, 1>(tile, block, 0, sums),
        }
    }
}

/// Columns that share a record of scales.
#[inline(always)]
fn record_columns(tile: &Tile<'_>) -> usize {
    if tile.scales.is_empty() { usize::MAX } else { tile.columns }
}

/// Products with a block of `T` tokens, in passes of two over the tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn passes<N: Numbers, const T: usize>(tile: &Tile<'_>, block: &[u8], sums: &mut Sums) {
    for (pass, sums) in sums.chunks_exact_mut(2).enumerate() {
        packed_block::<N, T, 2>(tile, block, pass * 2, sums);
    }
}

/// Products with tokens `first .. first + P` of a block of `T`, the tile being unpacked on the way.
#[target_feature(enable = "avx2,fma,f16c")]
fn packed_block<N: Numbers, const T: usize, const P: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    first: usize,
    sums: &mut Sums,
) {
    let columns = record_columns(tile);
    // [parity][token][half]
    let mut totals = [[[_mm256_setzero_ps(); 2]; P]; 2];
    let records = tile.codes.chunks(columns.saturating_mul(N::COLUMN));
    let blocks = block.chunks(columns.saturating_mul(const { T * 4 }));
    for (record, (codes, block)) in records.zip(blocks).enumerate() {
        // SAFETY: compiled for the instruction set.
        let scale = unsafe { N::scale(tile.scales, record) };
        let mut step = |column: &[u8], x: &[u8], parity: usize| {
            // SAFETY: as above.
            let mut weights = unsafe { N::column(column) };
            if let Some(scale) = scale {
                weights = [0, 1].map(|half| _mm256_mul_ps(weights[half], scale[half]));
            }
            for t in 0..P {
                let x = _mm256_castsi256_ps(word(x, first + t));
                for half in 0..2 {
                    let total = &mut totals[parity][t][half];
                    *total = _mm256_fmadd_ps(weights[half], x, *total);
                }
            }
        };
        let mut pairs = codes.chunks_exact(const { 2 * N::COLUMN });
        let mut blocks = block.chunks_exact(const { 2 * T * 4 });
        for (pair, x) in pairs.by_ref().zip(blocks.by_ref()) {
            // The processor fetches what needs no unpacking by itself.
            if N::COLUMN < 64 && first == 0 {
                fetch_ahead(pair, AHEAD);
            }
            step(&pair[..N::COLUMN], &x[..T * 4], 0);
            step(&pair[N::COLUMN..], &x[T * 4..], 1);
        }
        if !pairs.remainder().is_empty() {
            step(pairs.remainder(), blocks.remainder(), 0);
        }
    }
    for t in 0..P {
        let [even, odd] = totals;
        store(&mut sums[t], [0, 1].map(|half| _mm256_add_ps(even[t][half], odd[t][half])));
    }
}

/// Columns of a stretch. With the sums of a panel and the activations of a block it fits in 32 KiB.
const STRETCH: usize = 128;
const _: () = assert!(STRETCH.is_multiple_of(2));

/// Products with the tokens of a panel, one stretch of the tile after the other.
#[target_feature(enable = "avx2,fma,f16c")]
fn stretches<N: Numbers>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    let columns = tile.codes.len() / N::COLUMN;
    let mut odd_sums = [[0.0; ROWS]; PANEL_TOKENS];
    let odd_sums = &mut odd_sums[..panel.tokens()];
    sums[..panel.tokens()].fill([0.0; ROWS]);
    let mut stretch = [const { MaybeUninit::uninit() }; STRETCH];
    for start in (0..columns).step_by(STRETCH) {
        let end = columns.min(start + STRETCH);
        let stretch = unpack::<N>(tile, start..end, &mut stretch);
        for (first, tokens, block) in panel.blocks() {
            let block = &block[start * tokens * 4..end * tokens * 4];
            let rows = first..first + tokens;
            for (parity, sums) in
                [&mut sums[rows.clone()], &mut odd_sums[rows]].into_iter().enumerate()
            {
                match tokens {
                    8 => {
                        // Two passes: eight tokens' sums would not fit in sixteen registers.
                        let (low, high) = sums.split_at_mut(4);
                        stretch_block::<8, 4>(stretch, parity, block, 0, low);
                        stretch_block::<8, 4>(stretch, parity, block, 4, high);
                    }
                    4 => stretch_block::<4, 4>(stretch, parity, block, 0, sums),
                    2 => stretch_block::<2, 2>(stretch, parity, block, 0, sums),
                    _ => stretch_block::<1, 1>(stretch, parity, block, 0, sums),
                }
            }
        }
    }
    for (sums, odd_sums) in sums.iter_mut().zip(odd_sums) {
        let add = |half| _mm256_add_ps(load_single(sums, half), load_single(odd_sums, half));
        let both = [add(0), add(1)];
        store(sums, both);
    }
}

/// Adds the products of every other column of a stretch with tokens `first .. first + N` of a block of
/// `T` to their sums.
#[target_feature(enable = "avx2,fma,f16c")]
fn stretch_block<const T: usize, const N: usize>(
    stretch: &[[f32; ROWS]],
    parity: usize,
    block: &[u8],
    first: usize,
    sums: &mut Sums,
) {
    let mut totals: [_; N] =
        std::array::from_fn(|t| [0, 1].map(|half| load_single(&sums[t], half)));
    let columns = stretch[parity.min(stretch.len())..].chunks(2);
    let blocks = block[(parity * T * 4).min(block.len())..].chunks(const { 2 * T * 4 });
    for (column, x) in columns.zip(blocks) {
        let weights = [0, 1].map(|half| load_single(&column[0], half));
        for t in 0..N {
            let x = _mm256_castsi256_ps(word(x, first + t));
            for half in 0..2 {
                totals[t][half] = _mm256_fmadd_ps(weights[half], x, totals[t][half]);
            }
        }
    }
    for t in 0..N {
        store(&mut sums[t], totals[t]);
    }
}

/// Unpacks some columns of a tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<'a, N: Numbers>(
    tile: &Tile<'_>,
    columns: Range<usize>,
    stretch: &'a mut [MaybeUninit<[f32; ROWS]>; STRETCH],
) -> &'a [[f32; ROWS]] {
    let count = columns.len();
    let codes = &tile.codes[columns.start * N::COLUMN..columns.end * N::COLUMN];
    let of_record = record_columns(tile);
    let (mut record, mut left) = (columns.start / of_record, of_record - columns.start % of_record);
    // SAFETY: compiled for the instruction set.
    let mut scale = unsafe { N::scale(tile.scales, record) };
    for (column, to) in codes.chunks_exact(N::COLUMN).zip(&mut *stretch) {
        if left == 0 {
            (record, left) = (record + 1, of_record);
            // SAFETY: as above.
            scale = unsafe { N::scale(tile.scales, record) };
        }
        left -= 1;
        // SAFETY: as above.
        let mut weights = unsafe { N::column(column) };
        if let Some(scale) = scale {
            weights = [0, 1].map(|half| _mm256_mul_ps(weights[half], scale[half]));
        }
        for half in 0..2 {
            // SAFETY: writes half of the column's 16 numbers.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr().cast::<f32>().add(half * 8), weights[half]) };
        }
    }
    // SAFETY: the first `count` columns were written.
    unsafe { std::slice::from_raw_parts(stretch.as_ptr().cast(), count) }
}
