//! The kernels for AVX2: two registers hold the 16 rows of a tile.

use std::arch::x86_64::*;

use super::activations::{GROUP_BYTES, Rounded, factor_and_scale, put_rounded};
use super::bytes::Bytes;
use super::kernels::Sums;
use super::layout::{Coding, Dense, Float, Format, QUADS, ROWS, RUN, Scales};
use super::packed::Tile;
use super::prefetch::fetch_ahead;

/// The eight rows that a register holds: the first or the last of a tile.
type Half = usize;

/// Products of an integer tile with a block of tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn integer<F: Format, B: Bytes>(
    tile: &Tile<'_>,
    block: &[u8],
    tokens: usize,
    sums: &mut Sums,
) {
    for half in 0..2 {
        match tokens {
            8 => {
                // Two passes: eight tokens' sums would not fit in sixteen registers.
                integer_block::<F, B, 8, 4>(tile, block, 0, half, sums);
                integer_block::<F, B, 8, 4>(tile, block, 4, half, sums);
            }
            4 => integer_block::<F, B, 4, 4>(tile, block, 0, half, sums),
            2 => integer_block::<F, B, 2, 2>(tile, block, 0, half, sums),
            _ => integer_block::<F, B, 1, 1>(tile, block, 0, half, sums),
        }
    }
}

/// Tokens `first .. first + N` of a block of `T`.
#[target_feature(enable = "avx2,fma,f16c")]
fn integer_block<F: Format, B: Bytes, const T: usize, const N: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    first: usize,
    half: Half,
    sums: &mut Sums,
) {
    let coding = const { F::CODING };
    let levels = _mm256_broadcastsi128_si256(load128(tile.levels));
    let mut totals = [_mm256_setzero_ps(); N];
    let blocks = block.chunks_exact(const { GROUP_BYTES * T });
    let planes = tile.codes.chunks_exact(const { F::CODING.group_bytes() });
    for (group, (block, planes)) in blocks.zip(planes).enumerate() {
        let (registers, _) = planes.as_chunks::<64>();
        // The second half's are at hand by then.
        if half == 0 {
            fetch_ahead(registers, coding.bits, T);
        }
        let scales = scales::<F>(tile, group, half);
        let mut parts = [_mm256_setzero_ps(); N];
        let spans = const { if F::CODING.scales.halves() { 2 } else { 1 } };
        for span in 0..spans {
            // Where -(sum of the span's codes) of the first token lies.
            let negative = (QUADS + if spans == 1 { 1 } else { 2 + span }) * T + first;
            let mut dots = [_mm256_setzero_si256(); N];
            // What saturates multiplies levels around 128 as signed bytes, their zero already subtracted.
            if coding.zero != 0 && (B::FOURS || !coding.full_byte()) {
                let shift = _mm256_set1_epi32(coding.zero.trailing_zeros() as i32);
                for t in 0..N {
                    dots[t] = _mm256_sllv_epi32(word(block, negative + t), shift);
                }
            }
            let quads = span * QUADS / spans..(span + 1) * QUADS / spans;
            if B::FOURS {
                for k in quads {
                    let weights = quad::<F>(registers, k, half, levels);
                    for t in 0..N {
                        let codes = word(block, k * T + first + t);
                        // SAFETY: the kernel was chosen by what the processor has.
                        dots[t] = unsafe { B::fours(dots[t], weights, codes) };
                    }
                }
            } else {
                for run in quads.step_by(const { run_length(F::CODING) }) {
                    let mut twos = [_mm256_setzero_si256(); N];
                    for k in run..run + const { run_length(F::CODING) } {
                        let weights = quad::<F>(registers, k, half, levels);
                        for t in 0..N {
                            let codes = word(block, k * T + first + t);
                            let products = if coding.full_byte() {
                                let weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
                                let codes = _mm256_sign_epi8(codes, weights);
                                _mm256_maddubs_epi16(_mm256_abs_epi8(weights), codes)
                            } else {
                                _mm256_maddubs_epi16(weights, codes)
                            };
                            twos[t] = _mm256_add_epi16(twos[t], products);
                        }
                    }
                    for t in 0..N {
                        let fours = _mm256_madd_epi16(twos[t], _mm256_set1_epi16(1));
                        dots[t] = _mm256_add_epi32(dots[t], fours);
                    }
                }
            }
            let (scale, min) = scales[span];
            for t in 0..N {
                let dot = _mm256_cvtepi32_ps(dots[t]);
                parts[t] = if span == 0 {
                    _mm256_mul_ps(dot, scale)
                } else {
                    _mm256_fmadd_ps(dot, scale, parts[t])
                };
                if coding.scales.has_min() {
                    let negative = _mm256_cvtepi32_ps(word(block, negative + t));
                    parts[t] = _mm256_fnmadd_ps(min, negative, parts[t]);
                }
            }
        }
        for t in 0..N {
            let scale = _mm256_castsi256_ps(word(block, QUADS * T + first + t));
            totals[t] = _mm256_fmadd_ps(parts[t], scale, totals[t]);
        }
    }
    for t in 0..N {
        store(&mut sums[first + t], half, totals[t]);
    }
}

/// How many quads' sums of two products fit together in 16 bits.
const fn run_length(coding: Coding) -> usize {
    let level = if coding.full_byte() { 128 } else { (1 << coding.bits) - 1 };
    match i16::MAX / (2 * 127 * level) {
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// The levels of half of quad `k`, of which the zero is still to be subtracted.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad<F: Format>(registers: &[[u8; 64]], k: usize, half: Half, levels: __m256i) -> __m256i {
    let register = |index: usize| load(&registers[index], half);
    let code = match const { F::CODING.bits } {
        8 => register(k),
        6 => {
            let high = field(register(4 + k / 4), k % 4 * 2, 4, 0x30);
            _mm256_or_si256(field(register(k % 4), k / 4 * 4, 0, 0x0f), high)
        }
        5 => {
            let high = field(register(4), k, 4, 0x10);
            _mm256_or_si256(field(register(k % 4), k / 4 * 4, 0, 0x0f), high)
        }
        4 => field(register(k % 4), k / 4 * 4, 0, 0x0f),
        3 => {
            let high = field(register(2), k, 2, 0x04);
            _mm256_or_si256(field(register(k / 4), k % 4 * 2, 0, 0x03), high)
        }
        _ => field(register(k / 4), k % 4 * 2, 0, 0x03),
    };
    if const { F::CODING.lookup } { _mm256_shuffle_epi8(levels, code) } else { code }
}

/// Each byte moved from bit `from` to bit `to`, then masked.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field(bytes: __m256i, from: usize, to: usize, mask: i8) -> __m256i {
    // Bits that cross into a neighbouring byte are masked off.
    let moved = if from > to {
        _mm256_srlv_epi32(bytes, _mm256_set1_epi32((from - to) as i32))
    } else {
        _mm256_sllv_epi32(bytes, _mm256_set1_epi32((to - from) as i32))
    };
    _mm256_and_si256(moved, _mm256_set1_epi8(mask))
}

/// Scales and minima (which are added) of the group's halves, the first being the whole group's
/// where halves share them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales<F: Format>(tile: &Tile<'_>, group: usize, half: Half) -> [(__m256, __m256); 2] {
    let layout = const { F::CODING.scales };
    let (start, position) = layout.locate(group, tile.span_log());
    let record = &tile.scales[start..][..const { F::CODING.scales.record().1 }];
    let halves = |start: usize| _mm256_cvtph_ps(load128(part(record, start + half * 16)));
    let bytes = |start: usize| {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(part(record, start + half * 8))))
    };
    let negate = |v: __m256| _mm256_xor_ps(v, _mm256_set1_ps(-0.0));
    let none = _mm256_setzero_ps();
    match layout {
        Scales::Group | Scales::Super => [(halves(0), none); 2],
        Scales::GroupBf16 => {
            let bits = _mm256_cvtepu16_epi32(load128(part(record, half * 16)));
            [(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), none); 2]
        }
        Scales::GroupMin => [(halves(0), halves(32)); 2],
        Scales::Sub32 => {
            let unit = _mm256_mul_ps(halves(0), _mm256_set1_ps(tile.factor));
            [(_mm256_mul_ps(unit, bytes(32 + position * 16)), none); 2]
        }
        Scales::Sub32Min => {
            let place = 64 + position * 32;
            let scale = _mm256_mul_ps(halves(0), bytes(place));
            let min = _mm256_mul_ps(halves(32), bytes(place + 16));
            [(scale, negate(min)); 2]
        }
        Scales::Sub16 => {
            let unit = _mm256_mul_ps(halves(0), _mm256_set1_ps(tile.factor));
            let scale = |place: usize| (_mm256_mul_ps(unit, bytes(place)), none);
            [scale(32 + position * 32), scale(32 + position * 32 + 16)]
        }
        Scales::Sub16Min => {
            let (unit, min_unit) = (halves(0), halves(32));
            let pair = |place: usize| {
                let pair = _mm256_cvtepu8_epi32(load64(part(record, place + half * 8)));
                let scale = _mm256_and_si256(pair, _mm256_set1_epi32(15));
                let min = _mm256_mul_ps(min_unit, _mm256_cvtepi32_ps(_mm256_srli_epi32(pair, 4)));
                (_mm256_mul_ps(unit, _mm256_cvtepi32_ps(scale)), negate(min))
            };
            [pair(64 + position * 32), pair(64 + position * 32 + 16)]
        }
        Scales::Span => [(singles(record, 0, half), none); 2],
        Scales::SpanMin => [(singles(record, 0, half), singles(record, 1, half)); 2],
        Scales::Halves => [(singles(record, 0, half), none), (singles(record, 1, half), none)],
        Scales::HalvesMin => {
            [0, 2].map(|first| (singles(record, first, half), singles(record, first + 1, half)))
        }
    }
}

/// Products of a dense tile with a block of tokens. Even and odd columns are summed apart, so that
/// the sum of one token does not wait for every addition.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dense_f32(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F32 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dense_f16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F16 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dense_bf16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::Bf16 as u8 }>(tile, block, tokens, sums);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dense<const D: u8>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    for half in 0..2 {
        match tokens {
            8 => {
                dense_block::<D, 8, 4>(tile, block, 0, half, sums);
                dense_block::<D, 8, 4>(tile, block, 4, half, sums);
            }
            4 => dense_block::<D, 4, 4>(tile, block, 0, half, sums),
            2 => dense_block::<D, 2, 2>(tile, block, 0, half, sums),
            _ => dense_block::<D, 1, 1>(tile, block, 0, half, sums),
        }
    }
}

/// Tokens `first .. first + N` of a block of `T`.
#[target_feature(enable = "avx2,fma,f16c")]
fn dense_block<const D: u8, const T: usize, const N: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    first: usize,
    half: Half,
    sums: &mut Sums,
) {
    let column_bytes = const { if D == Dense::F32 as u8 { 64 } else { 32 } };
    let mut totals = [[_mm256_setzero_ps(); 2]; N];
    let mut step = |column: &[u8], x: &[u8], parity: usize| {
        let weights = if D == Dense::F32 as u8 {
            _mm256_castsi256_ps(load(part(column, 0), half))
        } else if D == Dense::F16 as u8 {
            _mm256_cvtph_ps(load128(part(column, half * 16)))
        } else {
            let bits = _mm256_cvtepu16_epi32(load128(part(column, half * 16)));
            _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))
        };
        for t in 0..N {
            let x = _mm256_castsi256_ps(word(x, first + t));
            totals[t][parity] = _mm256_fmadd_ps(weights, x, totals[t][parity]);
        }
    };
    let mut columns = tile.codes.chunks_exact(2 * column_bytes);
    let mut blocks = block.chunks_exact(const { 2 * T * 4 });
    for (pair, x) in columns.by_ref().zip(blocks.by_ref()) {
        step(&pair[..column_bytes], &x[..T * 4], 0);
        step(&pair[column_bytes..], &x[T * 4..], 1);
    }
    if !columns.remainder().is_empty() {
        step(columns.remainder(), blocks.remainder(), 0);
    }
    for t in 0..N {
        store(&mut sums[first + t], half, _mm256_add_ps(totals[t][0], totals[t][1]));
    }
}

/// Products of a tile of 4-bit level numbers with a block of tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn levels(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    float::<{ Float::Levels as u8 }>(tile, block, tokens, sums);
}

/// Products of a tile of F8_E4M3 codes with a block of tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn float8(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    float::<{ Float::Float8 as u8 }>(tile, block, tokens, sums);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn float<const F: u8>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    for half in 0..2 {
        match tokens {
            8 => {
                float_block::<F, 8, 4>(tile, block, 0, half, sums);
                float_block::<F, 8, 4>(tile, block, 4, half, sums);
            }
            4 => float_block::<F, 4, 4>(tile, block, 0, half, sums),
            2 => float_block::<F, 2, 2>(tile, block, 0, half, sums),
            _ => float_block::<F, 1, 1>(tile, block, 0, half, sums),
        }
    }
}

/// Tokens `first .. first + N` of a block of `T`. Even and odd columns are summed apart, as in a
/// dense tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn float_block<const F: u8, const T: usize, const N: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    first: usize,
    half: Half,
    sums: &mut Sums,
) {
    let run_bytes = const { Float::of(F).run_bytes() };
    let tables = [load_f32(part(tile.table, 0)), load_f32(part(tile.table, 8))];
    let mut totals = [_mm256_setzero_ps(); N];
    let groups = tile.codes.chunks(tile.columns / RUN * run_bytes);
    let blocks = block.chunks(tile.columns * T * 4);
    for ((codes, block), scales) in groups.zip(blocks).zip(tile.scales.chunks_exact(ROWS * 4)) {
        let mut parts = [[_mm256_setzero_ps(); 2]; N];
        let runs = codes.chunks_exact(run_bytes);
        for (run, x) in runs.zip(block.chunks_exact(const { RUN * T * 4 })) {
            // The loop over pairs stays short: sums whose place is not known when it is compiled
            // would not be kept in registers.
            for pair in 0..RUN / 2 {
                for parity in 0..2 {
                    let j = 2 * pair + parity;
                    let weights = float_column::<F>(run, j, half, tables);
                    for t in 0..N {
                        let x = _mm256_castsi256_ps(word(x, j * T + first + t));
                        parts[t][parity] = _mm256_fmadd_ps(weights, x, parts[t][parity]);
                    }
                }
            }
        }
        let mut scales = singles(scales, 0, half);
        if F == Float::Float8 as u8 {
            scales = _mm256_mul_ps(scales, _mm256_set1_ps(256.0));
        }
        for t in 0..N {
            let sum = _mm256_add_ps(parts[t][0], parts[t][1]);
            totals[t] = _mm256_fmadd_ps(sum, scales, totals[t]);
        }
    }
    for t in 0..N {
        store(&mut sums[first + t], half, totals[t]);
    }
}

/// Half of column `j` of a run.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn float_column<const F: u8>(run: &[u8], j: usize, half: Half, tables: [__m256; 2]) -> __m256 {
    if F == Float::Levels as u8 {
        // A lane's low three bits choose the level, the fourth the table, once it has become the
        // lane's sign.
        let numbers = load(part(run, 0), half);
        let number = _mm256_srlv_epi32(numbers, _mm256_set1_epi32(4 * j as i32));
        let sign = _mm256_sllv_epi32(numbers, _mm256_set1_epi32(28 - 4 * j as i32));
        let low = _mm256_permutevar8x32_ps(tables[0], number);
        let high = _mm256_permutevar8x32_ps(tables[1], number);
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign))
    } else {
        // As a half with the same bits the number is 2^8 times smaller: the exponents' biases are
        // 7 and 15.
        let signed = _mm_cvtepi8_epi16(load64(part(run, j * ROWS + half * 8)));
        let bits = _mm_slli_epi16(signed, 7);
        _mm256_cvtph_ps(_mm_and_si128(bits, _mm_set1_epi16(!0x4000)))
    }
}

/// Rounds the `tokens` rows of `x` to int8 groups, into one block.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_block(x: &[f32], tokens: usize, out: &mut [u8]) {
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
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let twos = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0b01_00_11_10));
        let sums = _mm256_add_epi32(twos, _mm256_shuffle_epi32(twos, 0b10_11_00_01));
        let negative_sums = [-_mm256_extract_epi32::<0>(sums), -_mm256_extract_epi32::<4>(sums)];
        Rounded { codes, scale, negative_sums }
    });
}

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

#[inline]
#[target_feature(enable = "avx2")]
fn store(out: &mut [f32; ROWS], half: Half, value: __m256) {
    let (halves, _) = out.as_chunks_mut::<8>();
    // SAFETY: writes exactly an array of eight values; any address will do.
    unsafe { _mm256_storeu_ps(halves[half].as_mut_ptr(), value) }
}
