//! The kernels for AVX-512 with VNNI: a register holds the 16 rows of a tile.

use std::arch::x86_64::*;

use super::activations::{GROUP_BYTES, Rounded, factor_and_scale, put_pairs, put_rounded};
use super::kernels::Sums;
use super::layout::{Dense, Format, GROUP, QUADS, ROWS, Scales};
use super::packed::Tile;
use super::prefetch::fetch_ahead;

/// How far ahead codes are asked for: of 1 to 12 KiB the fastest, if by little.
const AHEAD: usize = 4 << 10;

/// Products of an integer tile with a block of tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn integer<F: Format>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    match tokens {
        8 => integer_block::<F, 8>(tile, block, sums),
        4 => integer_block::<F, 4>(tile, block, sums),
        2 => integer_block::<F, 2>(tile, block, sums),
        _ => integer_block::<F, 1>(tile, block, sums),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn integer_block<F: Format, const T: usize>(tile: &Tile<'_>, block: &[u8], sums: &mut Sums) {
    let coding = const { F::CODING };
    let levels = _mm512_broadcast_i32x4(load128(tile.levels));
    let mut totals = [_mm512_setzero_ps(); T];
    let blocks = block.chunks_exact(const { GROUP_BYTES * T });
    let planes = tile.codes.chunks_exact(const { F::CODING.group_bytes() });
    for (group, (block, planes)) in blocks.zip(planes).enumerate() {
        let (registers, _) = planes.as_chunks::<64>();
        // 8-bit codes with a token or two are as fast as the processor fetches by itself.
        if coding.bits < 8 || T > 2 {
            fetch_ahead(planes, AHEAD);
        }
        let scales = scales::<F>(tile, group);
        let mut parts = [_mm512_setzero_ps(); T];
        let spans = const { if F::CODING.scales.halves() { 2 } else { 1 } };
        for span in 0..spans {
            // Where -(sum of the span's codes) of the first token lies.
            let negative = (QUADS + if spans == 1 { 1 } else { 2 + span }) * T;
            let mut dots = [_mm512_setzero_si512(); T];
            if coding.zero != 0 {
                let shift = _mm512_set1_epi32(coding.zero.trailing_zeros() as i32);
                for t in 0..T {
                    dots[t] = _mm512_sllv_epi32(word(block, negative + t), shift);
                }
            }
            for k in span * QUADS / spans..(span + 1) * QUADS / spans {
                let weights = quad::<F>(registers, k, levels);
                for t in 0..T {
                    dots[t] = _mm512_dpbusd_epi32(dots[t], weights, word(block, k * T + t));
                }
            }
            let (scale, min) = scales[span];
            for t in 0..T {
                let dot = _mm512_cvtepi32_ps(dots[t]);
                parts[t] = if span == 0 {
                    _mm512_mul_ps(dot, scale)
                } else {
                    _mm512_fmadd_ps(dot, scale, parts[t])
                };
                if coding.scales.has_min() {
                    let negative = _mm512_cvtepi32_ps(word(block, negative + t));
                    parts[t] = _mm512_fnmadd_ps(min, negative, parts[t]);
                }
            }
        }
        for t in 0..T {
            let scale = _mm512_castsi512_ps(word(block, QUADS * T + t));
            totals[t] = _mm512_fmadd_ps(parts[t], scale, totals[t]);
        }
    }
    for t in 0..T {
        store(&mut sums[t], totals[t]);
    }
}

/// The levels of quad `k`, of which the zero is still to be subtracted.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn quad<F: Format>(registers: &[[u8; 64]], k: usize, levels: __m512i) -> __m512i {
    let code = match const { F::CODING.bits } {
        8 => load(&registers[k]),
        6 => {
            let high = field(&registers[4 + k / 4], k % 4 * 2, 4, 0x30);
            _mm512_or_si512(field(&registers[k % 4], k / 4 * 4, 0, 0x0f), high)
        }
        5 => {
            let high = field(&registers[4], k, 4, 0x10);
            _mm512_or_si512(field(&registers[k % 4], k / 4 * 4, 0, 0x0f), high)
        }
        4 => field(&registers[k % 4], k / 4 * 4, 0, 0x0f),
        3 => {
            let high = field(&registers[2], k, 2, 0x04);
            _mm512_or_si512(field(&registers[k / 4], k % 4 * 2, 0, 0x03), high)
        }
        _ => field(&registers[k / 4], k % 4 * 2, 0, 0x03),
    };
    if const { F::CODING.lookup } { _mm512_shuffle_epi8(levels, code) } else { code }
}

/// Each byte moved from bit `from` to bit `to`, then masked.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn field(register: &[u8; 64], from: usize, to: usize, mask: i8) -> __m512i {
    let bytes = load(register);
    // Bits that cross into a neighbouring byte are masked off.
    let moved = if from > to {
        _mm512_srlv_epi32(bytes, _mm512_set1_epi32((from - to) as i32))
    } else {
        _mm512_sllv_epi32(bytes, _mm512_set1_epi32((to - from) as i32))
    };
    _mm512_and_si512(moved, _mm512_set1_epi8(mask))
}

/// Scales and minima (which are added) of the group's halves, the first being the whole group's
/// where halves share them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn scales<F: Format>(tile: &Tile<'_>, group: usize) -> [(__m512, __m512); 2] {
    let layout = const { F::CODING.scales };
    let (start, position) = layout.locate(group, tile.span_log());
    let record = &tile.scales[start..][..const { F::CODING.scales.record().1 }];
    let none = _mm512_setzero_ps();
    match layout {
        Scales::Group | Scales::Super => [(halves(record, 0), none); 2],
        Scales::GroupBf16 => {
            let bits = _mm512_cvtepu16_epi32(load256(part(record, 0)));
            [(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), none); 2]
        }
        Scales::GroupMin => [(halves(record, 0), halves(record, 32)); 2],
        Scales::Sub32 => {
            let unit = _mm512_mul_ps(halves(record, 0), _mm512_set1_ps(tile.factor));
            [(_mm512_mul_ps(unit, bytes(record, 32 + position * 16)), none); 2]
        }
        Scales::Sub32Min => {
            let place = 64 + position * 32;
            let scale = _mm512_mul_ps(halves(record, 0), bytes(record, place));
            let min = _mm512_mul_ps(halves(record, 32), bytes(record, place + 16));
            [(scale, negate(min)); 2]
        }
        Scales::Sub16 => {
            let unit = halves(record, 0);
            let unit = match const { F::CODING.lookup } {
                true => _mm512_mul_ps(unit, _mm512_set1_ps(tile.factor)),
                false => unit,
            };
            let place = 32 + position * 32;
            let scales = [bytes(record, place), bytes(record, place + 16)];
            [(_mm512_mul_ps(unit, scales[0]), none), (_mm512_mul_ps(unit, scales[1]), none)]
        }
        Scales::Sub16Min => {
            let place = 64 + position * 32;
            let (unit, min_unit) = (halves(record, 0), halves(record, 32));
            let half = |place| {
                let pair = _mm512_cvtepu8_epi32(load128(part(record, place)));
                let scale = _mm512_and_si512(pair, _mm512_set1_epi32(15));
                let min = _mm512_mul_ps(min_unit, _mm512_cvtepi32_ps(_mm512_srli_epi32(pair, 4)));
                (_mm512_mul_ps(unit, _mm512_cvtepi32_ps(scale)), negate(min))
            };
            [half(place), half(place + 16)]
        }
        Scales::Span => [(singles(record, 0), none); 2],
        Scales::SpanMin => [(singles(record, 0), singles(record, 1)); 2],
        Scales::Halves => [(singles(record, 0), none), (singles(record, 1), none)],
        Scales::HalvesMin => {
            [0, 2].map(|first| (singles(record, first), singles(record, first + 1)))
        }
    }
}

/// Products of a dense tile with a block of tokens. Even and odd columns are summed apart, so that
/// the sum of one token does not wait for every addition.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn dense_f32(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F32 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn dense_f16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F16 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn dense_bf16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::Bf16 as u8 }>(tile, block, tokens, sums);
}

/// As [`dense_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn dense_f8(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense::<{ Dense::F8 as u8 }>(tile, block, tokens, sums);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn dense<const D: u8>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    match tokens {
        8 => dense_block::<D, 8>(tile, block, sums),
        4 => dense_block::<D, 4>(tile, block, sums),
        2 => dense_block::<D, 2>(tile, block, sums),
        _ => dense_block::<D, 1>(tile, block, sums),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn dense_block<const D: u8, const T: usize>(tile: &Tile<'_>, block: &[u8], sums: &mut Sums) {
    let column_bytes = const { Dense::of(D).bytes() * ROWS };
    let mut totals = [[_mm512_setzero_ps(); 2]; T];
    // Numbers without scales are one group.
    let columns = if D == Dense::F8 as u8 { tile.columns } else { usize::MAX };
    let groups = tile.codes.chunks(columns.saturating_mul(column_bytes));
    let blocks = block.chunks(columns.saturating_mul(const { T * 4 }));
    for (group, (codes, block)) in groups.zip(blocks).enumerate() {
        let scale = match D == Dense::F8 as u8 {
            // 2^8: see `numbers`.
            true => _mm512_mul_ps(singles(tile.scales, group), _mm512_set1_ps(256.0)),
            false => _mm512_set1_ps(1.0),
        };
        let mut step = |column: &[u8], x: &[u8], parity: usize| {
            let mut weights = numbers::<D>(column);
            if D == Dense::F8 as u8 {
                weights = _mm512_mul_ps(weights, scale);
            }
            for t in 0..T {
                let x = _mm512_castsi512_ps(word(x, t));
                totals[t][parity] = _mm512_fmadd_ps(weights, x, totals[t][parity]);
            }
        };
        let mut columns = codes.chunks_exact(2 * column_bytes);
        let mut blocks = block.chunks_exact(const { 2 * T * 4 });
        for (pair, x) in columns.by_ref().zip(blocks.by_ref()) {
            step(&pair[..column_bytes], &x[..T * 4], 0);
            step(&pair[column_bytes..], &x[T * 4..], 1);
        }
        if !columns.remainder().is_empty() {
            step(columns.remainder(), blocks.remainder(), 0);
        }
    }
    for t in 0..T {
        store(&mut sums[t], _mm512_add_ps(totals[t][0], totals[t][1]));
    }
}

/// The numbers of a column of a dense tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn numbers<const D: u8>(column: &[u8]) -> __m512 {
    match const { Dense::of(D) } {
        Dense::F32 => _mm512_castsi512_ps(load(part(column, 0))),
        Dense::F16 => _mm512_cvtph_ps(load256(part(column, 0))),
        Dense::Bf16 => {
            let bits = _mm512_cvtepu16_epi32(load256(part(column, 0)));
            _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))
        }
        Dense::F8 => {
            // As a half with the same bits the number is 2^8 times smaller: the exponents' biases are
            // 7 and 15.
            let signed = _mm256_cvtepi8_epi16(load128(part(column, 0)));
            let bits = _mm256_slli_epi16(signed, 7);
            _mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16(!0x4000)))
        }
    }
}

/// Products of a tile of bf16 pairs with a block of tokens. Even and odd pairs are summed apart, as
/// columns are in a dense tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(super) fn pairs(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    match tokens {
        8 => pairs_block::<8>(tile, block, sums),
        4 => pairs_block::<4>(tile, block, sums),
        2 => pairs_block::<2>(tile, block, sums),
        _ => pairs_block::<1>(tile, block, sums),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
fn pairs_block<const T: usize>(tile: &Tile<'_>, block: &[u8], sums: &mut Sums) {
    let mut totals = [[_mm512_setzero_ps(); 2]; T];
    let mut step = |weights: &[u8], x: &[u8], parity: usize| {
        let weights = as_bf16(load(part(weights, 0)));
        for t in 0..T {
            totals[t][parity] = _mm512_dpbf16_ps(totals[t][parity], weights, as_bf16(word(x, t)));
        }
    };
    let mut weights = tile.codes.chunks_exact(2 * 64);
    let mut blocks = block.chunks_exact(const { 2 * T * 4 });
    for (weights, x) in weights.by_ref().zip(blocks.by_ref()) {
        step(&weights[..64], &x[..T * 4], 0);
        step(&weights[64..], &x[T * 4..], 1);
    }
    if !weights.remainder().is_empty() {
        step(weights.remainder(), blocks.remainder(), 0);
    }
    for t in 0..T {
        store(&mut sums[t], _mm512_add_ps(totals[t][0], totals[t][1]));
    }
}

/// Rounds the `tokens` rows of `x` to bf16, into one block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(super) fn pair_block(x: &[f32], tokens: usize, out: &mut [u8]) {
    let cols = x.len() / tokens;
    let whole = cols / 32 * 32;
    let (words, _) = out.as_chunks_mut::<4>();
    let (vectors, rest) = words.split_at_mut(whole / 2 * tokens);
    for (token, row) in x.chunks_exact(cols).enumerate() {
        let (row, _) = row.as_chunks::<32>();
        for (values, words) in row.iter().zip(vectors.chunks_exact_mut(16 * tokens)) {
            let (first, second) = (load_f32(part(values, 0)), load_f32(part(values, 16)));
            let rounded = _mm512_cvtne2ps_pbh(second, first);
            // SAFETY: both are 64 bytes without padding.
            let pairs: [[u8; 4]; 16] = unsafe { std::mem::transmute(rounded) };
            for (words, pair) in words.chunks_exact_mut(tokens).zip(pairs) {
                words[token] = pair;
            }
        }
    }
    if cols > whole {
        for (token, row) in x.chunks_exact(cols).enumerate() {
            put_pairs(&row[whole..], token, tokens, rest);
        }
    }
}

/// The bits as 32 bf16 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes without padding, and any bits are numbers.
    unsafe { std::mem::transmute(bits) }
}

/// Rounds the `tokens` rows of `x` to int8 groups, into one block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn quantize_block(x: &[f32], tokens: usize, out: &mut [u8]) {
    put_rounded::<1>(x, tokens, out, |group| {
        let halves = [0, 1].map(|half| _mm512_castps_si512(load_f32(part(group, half * ROWS))));
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let [first, last] = halves.map(|half| _mm512_and_si512(half, magnitude));
        let (factor, scale) =
            factor_and_scale(_mm512_reduce_max_epu32(_mm512_max_epu32(first, last)));
        let factor = _mm512_set1_ps(factor);
        let mut codes = [0; GROUP];
        let mut negative_sums = [0; 3];
        for half in 0..2 {
            // Converting rounds to nearest, ties to even.
            let scaled = _mm512_mul_ps(_mm512_castsi512_ps(halves[half]), factor);
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled));
            store_codes(part_mut(&mut codes, half * ROWS), bytes);
            let fours = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), bytes);
            let twos = _mm_add_epi32(fours, _mm_shuffle_epi32(fours, 0b01_00_11_10));
            let sum = _mm_add_epi32(twos, _mm_shuffle_epi32(twos, 0b10_11_00_01));
            negative_sums[1 + half] = -_mm_cvtsi128_si32(sum);
        }
        negative_sums[0] = negative_sums[1] + negative_sums[2];
        Rounded { codes, scale, negative_sums }
    });
}

/// The 32-bit word `index` of `block`, in all lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn word(block: &[u8], index: usize) -> __m512i {
    _mm512_set1_epi32(i32::from_ne_bytes(*part(block, index * 4)))
}

/// 16 halves at `start` of a record.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(record: &[u8], start: usize) -> __m512 {
    _mm512_cvtph_ps(load256(part(record, start)))
}

/// The list of 16 singles `index` of a record.
#[inline]
#[target_feature(enable = "avx512f")]
fn singles(record: &[u8], index: usize) -> __m512 {
    _mm512_castsi512_ps(load(part(record, index * 64)))
}

/// 16 signed bytes at `start` of a record.
#[inline]
#[target_feature(enable = "avx512f")]
fn bytes(record: &[u8], start: usize) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(part(record, start))))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn negate(v: __m512) -> __m512 {
    _mm512_xor_ps(v, _mm512_set1_ps(-0.0))
}

/// The `N` elements at `start`.
#[inline(always)]
fn part<T, const N: usize>(values: &[T], start: usize) -> &[T; N] {
    values[start..].first_chunk().expect("lengths are those of the layout")
}

/// The `N` elements at `start`.
#[inline(always)]
fn part_mut<T, const N: usize>(values: &mut [T], start: usize) -> &mut [T; N] {
    values[start..].first_chunk_mut().expect("lengths are those of the layout")
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: reads exactly the array; any address will do.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load256(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: as in `load`.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: as in `load`.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(values: &[f32; ROWS]) -> __m512 {
    // SAFETY: as in `load`.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_codes(out: &mut [i8; ROWS], codes: __m128i) {
    // SAFETY: writes exactly the array; any address will do.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), codes) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(out: &mut [f32; ROWS], value: __m512) {
    // SAFETY: writes exactly the array; any address will do.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), value) }
}

const _: () = assert!(GROUP == 4 * QUADS);
