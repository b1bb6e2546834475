//! Products of integer tiles.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::activations::GROUP_BYTES;
use super::super::bytes::Bytes;
use super::super::kernels::{Panel, Sums};
use super::super::layout::{Coding, Format, QUADS, ROWS};
use super::super::packed::Tile;
use super::super::prefetch::fetch_ahead;
use super::scales::{Scale, TileScales};
use super::{AHEAD, Half, load, load_single, load128, store, word};

/// Fewest tokens for which a tile is unpacked before it is multiplied.
const UNPACK_TOKENS: usize = 4;

/// Products of an integer tile with the tokens of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn integer<F: Format, B: Bytes>(
    tile: &Tile<'_>,
    panel: Panel<'_>,
    sums: &mut Sums,
) {
    if panel.tokens() >= UNPACK_TOKENS {
        return stretches::<F, B>(tile, panel, sums);
    }
    for (first, tokens, block) in panel.blocks() {
        match tokens {
            2 => packed_block::<F, B, 2>(tile, block, &mut sums[first..]),
            _ => packed_block::<F, B, 1>(tile, block, &mut sums[first..]),
        }
    }
}

/// Products with a block of `T` tokens, the tile being unpacked on the way.
#[target_feature(enable = "avx2,fma,f16c")]
fn packed_block<F: Format, B: Bytes, const T: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    sums: &mut Sums,
) {
    let levels = _mm256_broadcastsi128_si256(load128(tile.levels));
    let mut totals = [[_mm256_setzero_ps(); 2]; T];
    let blocks = block.chunks_exact(const { GROUP_BYTES * T });
    let planes = tile.codes.chunks_exact(const { F::CODING.group_bytes() });
    let mut scales = TileScales::new(tile);
    for (index, (block, planes)) in blocks.zip(planes).enumerate() {
        let (registers, _) = planes.as_chunks::<64>();
        fetch_ahead(planes, AHEAD);
        let scales = scales.of_group::<F>(index);
        let group = PackedGroup { registers, levels, scales };
        // SAFETY: compiled for the instruction set.
        unsafe { add::<F, B, _, T, T>(&group, block, 0, &mut totals) };
    }
    for t in 0..T {
        store(&mut sums[t], totals[t]);
    }
}

/// Products with the tokens of a panel, one stretch of the tile after the other.
#[target_feature(enable = "avx2,fma,f16c")]
fn stretches<F: Format, B: Bytes>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    let groups = tile.codes.len() / F::CODING.group_bytes();
    sums[..panel.tokens()].fill([0.0; ROWS]);
    let mut stretch = [const { MaybeUninit::uninit() }; STRETCH];
    for start in (0..groups).step_by(STRETCH) {
        let end = groups.min(start + STRETCH);
        let stretch = unpack::<F, B>(tile, start..end, &mut stretch);
        for (first, tokens, block) in panel.blocks() {
            let part = start * tokens * GROUP_BYTES..end * tokens * GROUP_BYTES;
            let (block, sums) = (&block[part], &mut sums[first..first + tokens]);
            match tokens {
                8 => {
                    // Two passes: eight tokens' sums would not fit in sixteen registers.
                    let (low, high) = sums.split_at_mut(4);
                    stretch_block::<F, B, 8, 4>(stretch, block, 0, low);
                    stretch_block::<F, B, 8, 4>(stretch, block, 4, high);
                }
                4 => stretch_block::<F, B, 4, 4>(stretch, block, 0, sums),
                2 => stretch_block::<F, B, 2, 2>(stretch, block, 0, sums),
                _ => stretch_block::<F, B, 1, 1>(stretch, block, 0, sums),
            }
        }
    }
}

/// Adds the products of a stretch with tokens `first .. first + N` of a block of `T` to their sums.
#[target_feature(enable = "avx2,fma,f16c")]
fn stretch_block<F: Format, B: Bytes, const T: usize, const N: usize>(
    stretch: &[UnpackedGroup],
    block: &[u8],
    first: usize,
    sums: &mut Sums,
) {
    let mut totals: [_; N] =
        std::array::from_fn(|t| [0, 1].map(|half| load_single(&sums[t], half)));
    let blocks = block.chunks_exact(const { GROUP_BYTES * T });
    for (group, block) in stretch.iter().zip(blocks) {
        // SAFETY: compiled for the instruction set.
        unsafe { add::<F, B, _, T, N>(group, block, first, &mut totals) };
    }
    for t in 0..N {
        store(&mut sums[t], totals[t]);
    }
}

/// A group of 32 columns of a tile, both halves of the rows.
///
/// # Safety
/// Functions may be called where the processor has AVX2, FMA and F16C, and inline into a caller
/// compiled for them.
trait Group {
    /// Σ (level - zero) · code over span `SPAN` of the group, which is `Q` quads long, for each half of the
    /// rows and tokens `first .. first + N` of a block of `T`.
    unsafe fn dots<
        F: Format,
        B: Bytes,
        const T: usize,
        const N: usize,
        const SPAN: usize,
        const Q: usize,
    >(
        &self,
        block: &[u8],
        first: usize,
    ) -> [[__m256i; 2]; N];

    /// Scale and minimum, which is added, of a span: the group or half of its columns.
    unsafe fn scale<F: Format>(&self, span: usize) -> [Scale; 2];
}

/// Adds the products of a group with tokens `first .. first + N` of a block of `T`, whose activations
/// there are `block`.
///
/// # Safety
/// That of [`Group`].
#[inline(always)]
unsafe fn add<F: Format, B: Bytes, G: Group, const T: usize, const N: usize>(
    group: &G,
    block: &[u8],
    first: usize,
    totals: &mut [[__m256; 2]; N],
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut parts = [[_mm256_setzero_ps(); 2]; N];
        if const { F::CODING.scales.halves() } {
            add_span::<F, B, G, T, N, 0, { QUADS / 2 }>(group, block, first, &mut parts);
            add_span::<F, B, G, T, N, 1, { QUADS / 2 }>(group, block, first, &mut parts);
        } else {
            add_span::<F, B, G, T, N, 0, QUADS>(group, block, first, &mut parts);
        }
        for t in 0..N {
            let scale = _mm256_castsi256_ps(word(block, QUADS * T + first + t));
            for half in 0..2 {
                totals[t][half] = _mm256_fmadd_ps(parts[t][half], scale, totals[t][half]);
            }
        }
    }
}

/// Span `SPAN` of a group, of `Q` quads. The first one's parts are the first.
///
/// # Safety
/// That of [`Group`].
#[inline(always)]
unsafe fn add_span<
    F: Format,
    B: Bytes,
    G: Group,
    const T: usize,
    const N: usize,
    const SPAN: usize,
    const Q: usize,
>(
    group: &G,
    block: &[u8],
    first: usize,
    parts: &mut [[__m256; 2]; N],
) {
    // SAFETY: this function's contract.
    unsafe {
        let dots = group.dots::<F, B, T, N, SPAN, Q>(block, first);
        let scales = group.scale::<F>(SPAN);
        for t in 0..N {
            for half in 0..2 {
                let (scale, min) = scales[half];
                let (dot, part) = (_mm256_cvtepi32_ps(dots[t][half]), &mut parts[t][half]);
                *part = match SPAN {
                    0 => _mm256_mul_ps(dot, scale),
                    _ => _mm256_fmadd_ps(dot, scale, *part),
                };
                if const { F::CODING.scales.has_min() } {
                    let negative = negative_sum::<B, T, SPAN, Q>(block, first + t);
                    *part = _mm256_fnmadd_ps(min, _mm256_cvtepi32_ps(negative), *part);
                }
            }
        }
    }
}

/// -(sum of a token's codes over span `SPAN`, of `Q` quads), in all lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn negative_sum<B: Bytes, const T: usize, const SPAN: usize, const Q: usize>(
    block: &[u8],
    token: usize,
) -> __m256i {
    let sums = negative_sums::<T, SPAN, Q>(block, token);
    if B::FOURS { sums } else { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) }
}

/// The same as it lies in the block: as two sums of 16 bits, where products are added up by twos.
#[inline]
#[target_feature(enable = "avx2")]
fn negative_sums<const T: usize, const SPAN: usize, const Q: usize>(
    block: &[u8],
    token: usize,
) -> __m256i {
    word(block, (QUADS + if Q == QUADS { 1 } else { 2 + SPAN }) * T + token)
}

/// What sums of products start with in 16 bits, so that they are those of levels without their zero:
/// zero where they are the levels, or where this would not fit.
#[inline]
#[target_feature(enable = "avx2")]
fn first_twos<F: Format, const T: usize, const SPAN: usize, const Q: usize>(
    block: &[u8],
    token: usize,
) -> __m256i {
    if const { !starts_with_zero(F::CODING, Q) } {
        return _mm256_setzero_si256();
    }
    let shift = const { F::CODING.zero.trailing_zeros() as i32 };
    _mm256_sll_epi16(negative_sums::<T, SPAN, Q>(block, token), _mm_cvtsi32_si128(shift))
}

/// What sums of products start with in 32 bits, where that is not zero.
#[inline]
#[target_feature(enable = "avx2")]
fn first_dots<F: Format, B: Bytes, const T: usize, const SPAN: usize, const Q: usize>(
    block: &[u8],
    token: usize,
) -> __m256i {
    let coding = const { F::CODING };
    let subtracted =
        if B::FOURS { false } else { coding.full_byte() || starts_with_zero(coding, Q) };
    if coding.zero == 0 || subtracted {
        return _mm256_setzero_si256();
    }
    let shift = _mm_cvtsi32_si128(coding.zero.trailing_zeros() as i32);
    _mm256_sll_epi32(negative_sum::<B, T, SPAN, Q>(block, token), shift)
}

/// True where all products of a span of `quads` quads, and what makes up for their zero, fit together in
/// 16 bits: sums wrap around, but what they come to does fit.
const fn starts_with_zero(coding: Coding, quads: usize) -> bool {
    coding.zero != 0 && !coding.full_byte() && run_length(coding, quads) == quads
}

/// Products of levels with codes, neighbours' added up in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn products<F: Format>(levels: __m256i, codes: __m256i) -> __m256i {
    if const { F::CODING.full_byte() } {
        // The left factor has to be unsigned.
        _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(codes, levels))
    } else {
        _mm256_maddubs_epi16(levels, codes)
    }
}

/// How many of `quads` quads' sums of two products fit together in 16 bits.
const fn run_length(coding: Coding, quads: usize) -> usize {
    let level = if coding.full_byte() { 128 } else { (1 << coding.bits) - 1 };
    match i16::MAX as usize / (2 * 127 * level) {
        8.. if quads == 8 => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// A group as it lies in its tile.
struct PackedGroup<'a> {
    registers: &'a [[u8; 64]],
    /// Levels of look-up types, plus 128.
    levels: __m256i,
    /// `[half][span]`
    scales: [[Scale; 2]; 2],
}

impl PackedGroup<'_> {
    /// The levels of quad `K`, as [`Group::dots`] takes them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn quad<F: Format, B: Bytes, const K: usize>(&self) -> [__m256i; 2] {
        let mut quad = [0, 1].map(|half| levels::<F>(self.registers, K, half, self.levels));
        if const { !B::FOURS && F::CODING.full_byte() } {
            quad = quad.map(|levels| _mm256_xor_si256(levels, _mm256_set1_epi8(-128)));
        }
        quad
    }
}

/// A loop over a group's quads that is written out: what is shifted by a number that is not known when
/// it is compiled takes more instructions.
macro_rules! each_quad {
    ($k:ident => $body:expr) => {
        each_quad!($k => $body; 0 1 2 3 4 5 6 7)
    };
    ($k:ident => $body:expr; $($number:literal)*) => {
        $({
            const $k: usize = $number;
            $body
        })*
    };
}

impl Group for PackedGroup<'_> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dots<
        F: Format,
        B: Bytes,
        const T: usize,
        const N: usize,
        const SPAN: usize,
        const Q: usize,
    >(
        &self,
        block: &[u8],
        first: usize,
    ) -> [[__m256i; 2]; N] {
        let run = const { run_length(F::CODING, Q) };
        let (mut dots, mut twos) = first_sums::<F, B, T, N, SPAN, Q>(block, first);
        each_quad!(K => if K / Q == SPAN {
            let weights = self.quad::<F, B, K>();
            for t in 0..N {
                let codes = word(block, K * T + first + t);
                for half in 0..2 {
                    let (dot, two) = (&mut dots[t][half], &mut twos[t][half]);
                    if B::FOURS {
                        // SAFETY: this function's contract.
                        *dot = unsafe { B::fours(*dot, weights[half], codes) };
                        continue;
                    }
                    let products = products::<F>(weights[half], codes);
                    *two = match K % run {
                        0 if !K.is_multiple_of(Q) => products,
                        _ => _mm256_add_epi16(*two, products),
                    };
                    if K % run == run - 1 {
                        *dot = add_twos(*dot, *two);
                    }
                }
            }
        });
        dots
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale<F: Format>(&self, span: usize) -> [Scale; 2] {
        self.scales.map(|half| half[span])
    }
}

/// What the sums of `N` tokens start with, in 32 and in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn first_sums<
    F: Format,
    B: Bytes,
    const T: usize,
    const N: usize,
    const SPAN: usize,
    const Q: usize,
>(
    block: &[u8],
    first: usize,
) -> ([[__m256i; 2]; N], [[__m256i; 2]; N]) {
    let dots = std::array::from_fn(|t| [first_dots::<F, B, T, SPAN, Q>(block, first + t); 2]);
    let twos = std::array::from_fn(|t| [first_twos::<F, T, SPAN, Q>(block, first + t); 2]);
    (dots, twos)
}

/// Adds neighbours in 16 bits to sums in 32.
#[inline]
#[target_feature(enable = "avx2")]
fn add_twos(sums: __m256i, twos: __m256i) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)))
}

/// Groups of a stretch. With the sums of a panel and the activations of a block it fits in 32 KiB.
const STRETCH: usize = 18;

/// A group as [`Group::quad`] and [`Group::scale`] give it.
#[repr(C, align(64))]
struct UnpackedGroup {
    quads: [[u8; 64]; QUADS],
    /// `[span][row]`: the second where halves of a group have scales of their own.
    scales: [MaybeUninit<[f32; ROWS]>; 2],
    /// The same, where the format has minima.
    mins: [MaybeUninit<[f32; ROWS]>; 2],
}

impl Group for UnpackedGroup {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dots<
        F: Format,
        B: Bytes,
        const T: usize,
        const N: usize,
        const SPAN: usize,
        const Q: usize,
    >(
        &self,
        block: &[u8],
        first: usize,
    ) -> [[__m256i; 2]; N] {
        let run = const { run_length(F::CODING, Q) };
        let quads = &self.quads[SPAN * Q..][..Q];
        let codes = &block[(SPAN * Q * T + first) * 4..];
        let (mut dots, mut twos) = first_sums::<F, B, T, N, SPAN, Q>(block, first);
        // SAFETY: this function's contract.
        unsafe {
            if B::FOURS || run == 1 {
                each_product::<T, N>(quads, codes, |t, half, weights, codes| {
                    let dot = &mut dots[t][half];
                    *dot = match B::FOURS {
                        true => B::fours(*dot, weights, codes),
                        false => add_twos(*dot, products::<F>(weights, codes)),
                    };
                });
                return dots;
            }
            for first in (0..Q).step_by(run) {
                let (quads, codes) = (&quads[first..][..run], &codes[first * T * 4..]);
                each_product::<T, N>(quads, codes, |t, half, weights, codes| {
                    let two = &mut twos[t][half];
                    *two = _mm256_add_epi16(*two, products::<F>(weights, codes));
                });
                for t in 0..N {
                    for half in 0..2 {
                        dots[t][half] = add_twos(dots[t][half], twos[t][half]);
                        twos[t][half] = _mm256_setzero_si256();
                    }
                }
            }
        }
        dots
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale<F: Format>(&self, span: usize) -> [Scale; 2] {
        // SAFETY: `unpack` has written what the format has.
        let list = |list: &[MaybeUninit<_>; 2], half| unsafe {
            load_single(list[span].assume_init_ref(), half)
        };
        [0, 1].map(|half| match const { F::CODING.scales.has_min() } {
            true => (list(&self.scales, half), list(&self.mins, half)),
            false => (list(&self.scales, half), _mm256_setzero_ps()),
        })
    }
}

/// Calls `add(token, half, weights, codes)` for each quad. The loop stays a loop, as the compiler does
/// not learn how long it is: written out, more is begun at a time than registers hold.
///
/// # Safety
/// That of [`Group`].
#[inline(always)]
unsafe fn each_product<const T: usize, const N: usize>(
    quads: &[[u8; 64]],
    codes: &[u8],
    mut add: impl FnMut(usize, usize, __m256i, __m256i),
) {
    assert!(codes.len() >= ((quads.len() - 1) * T + N) * 4);
    let (mut quad, mut code) = (quads.as_ptr(), codes.as_ptr());
    let end = std::hint::black_box(quads.as_ptr_range().end);
    // SAFETY: the loop ends with the quads, whose codes are that many.
    unsafe {
        loop {
            let weights = [0, 1].map(|half| load(&*quad, half));
            for t in 0..N {
                let codes = _mm256_set1_epi32(code.add(t * 4).cast::<i32>().read_unaligned());
                for half in 0..2 {
                    add(t, half, weights[half], codes);
                }
            }
            (quad, code) = (quad.add(1), code.add(T * 4));
            if quad == end {
                return;
            }
        }
    }
}

/// Unpacks some groups of a tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<'a, F: Format, B: Bytes>(
    tile: &Tile<'_>,
    groups: std::ops::Range<usize>,
    stretch: &'a mut [MaybeUninit<UnpackedGroup>; STRETCH],
) -> &'a [UnpackedGroup] {
    let levels = _mm256_broadcastsi128_si256(load128(tile.levels));
    let planes = tile.codes.chunks_exact(const { F::CODING.group_bytes() });
    let mut scales = TileScales::new(tile);
    let count = groups.len();
    for ((index, planes), to) in
        planes.enumerate().take(groups.end).skip(groups.start).zip(&mut *stretch)
    {
        let (registers, _) = planes.as_chunks::<64>();
        fetch_ahead(planes, AHEAD);
        let scales = scales.of_group::<F>(index);
        let group = PackedGroup { registers, levels, scales };
        let to = to.as_mut_ptr();
        each_quad!(K => {
            let quad = group.quad::<F, B, K>();
            for half in 0..2 {
                // SAFETY: writes half of the quad's 64 bytes, which nobody else has.
                unsafe {
                    let to = (&raw mut (*to).quads[K]).cast::<__m256i>();
                    _mm256_storeu_si256(to.add(half), quad[half]);
                }
            }
        });
        for (half, scales) in group.scales.into_iter().enumerate() {
            let spans = const { if F::CODING.scales.halves() { 2 } else { 1 } };
            for (span, (scale, min)) in scales.into_iter().enumerate().take(spans) {
                // SAFETY: writes half of 16 numbers each, which nobody else has.
                unsafe {
                    let (scales, mins) = (&raw mut (*to).scales[span], &raw mut (*to).mins[span]);
                    _mm256_storeu_ps(scales.cast::<f32>().add(half * 8), scale);
                    if const { F::CODING.scales.has_min() } {
                        _mm256_storeu_ps(mins.cast::<f32>().add(half * 8), min);
                    }
                }
            }
        }
    }
    // SAFETY: the quads of the first `count` groups were written; the rest need not be.
    unsafe { std::slice::from_raw_parts(stretch.as_ptr().cast(), count) }
}

/// The levels of half of quad `k`, of which the zero is still to be subtracted.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn levels<F: Format>(registers: &[[u8; 64]], k: usize, half: Half, levels: __m256i) -> __m256i {
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
