//! The scales of integer tiles.

use std::arch::x86_64::*;

use super::super::layout::{Format, Scales};
use super::super::packed::Tile;
use super::{Half, load64, load128, part, singles};

/// Scale and minimum, which is added, of eight rows.
pub(super) type Scale = (__m256, __m256);

/// Reads the scales of a tile's groups, one after the other, and what groups share only once.
pub(super) struct TileScales<'a> {
    tile: &'a Tile<'a>,
    /// Where the record of the group before starts, and what its groups share, for each half.
    start: usize,
    shared: [Scale; 2],
}

impl<'a> TileScales<'a> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn new(tile: &'a Tile<'a>) -> Self {
        Self { tile, start: usize::MAX, shared: [(_mm256_setzero_ps(), _mm256_setzero_ps()); 2] }
    }

    /// Those of a group, `[half][span]`: the second span's are the first's where a group's columns share
    /// them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn of_group<F: Format>(&mut self, group: usize) -> [[Scale; 2]; 2] {
        let (start, position) = F::CODING.scales.locate(group, self.tile.span_log());
        let record = &self.tile.scales[start..][..const { F::CODING.scales.record().1 }];
        if start != self.start {
            self.start = start;
            self.shared = [0, 1].map(|half| shared::<F>(record, half, self.tile.factor));
        }
        [0, 1].map(|half| of_half::<F>(record, position, half, self.shared[half]))
    }
}

/// What the groups of a record share: their scale and minimum, or the units of these.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shared<F: Format>(record: &[u8], half: Half, factor: f32) -> Scale {
    let halves = |start: usize| _mm256_cvtph_ps(load128(part(record, start + half * 16)));
    let negate = |v: __m256| _mm256_xor_ps(v, _mm256_set1_ps(-0.0));
    let none = _mm256_setzero_ps();
    match const { F::CODING.scales } {
        Scales::Group | Scales::Super => (halves(0), none),
        Scales::GroupBf16 => {
            let bits = _mm256_cvtepu16_epi32(load128(part(record, half * 16)));
            (_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), none)
        }
        Scales::GroupMin => (halves(0), halves(32)),
        Scales::Sub32 | Scales::Sub16 => (_mm256_mul_ps(halves(0), _mm256_set1_ps(factor)), none),
        // These are subtracted.
        Scales::Sub32Min | Scales::Sub16Min => (halves(0), negate(halves(32))),
        Scales::Span => (singles(record, 0, half), none),
        Scales::SpanMin => (singles(record, 0, half), singles(record, 1, half)),
        Scales::Halves | Scales::HalvesMin => (none, none),
    }
}

/// A group's, for its spans.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn of_half<F: Format>(record: &[u8], position: usize, half: Half, shared: Scale) -> [Scale; 2] {
    let (unit, min_unit) = shared;
    let bytes = |start: usize| {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(part(record, start + half * 8))))
    };
    match const { F::CODING.scales } {
        Scales::Group
        | Scales::GroupBf16
        | Scales::GroupMin
        | Scales::Super
        | Scales::Span
        | Scales::SpanMin => [shared; 2],
        Scales::Sub32 => [(_mm256_mul_ps(unit, bytes(32 + position * 16)), min_unit); 2],
        Scales::Sub32Min => {
            let place = 64 + position * 32;
            let min = _mm256_mul_ps(min_unit, bytes(place + 16));
            [(_mm256_mul_ps(unit, bytes(place)), min); 2]
        }
        Scales::Sub16 => {
            let scale = |place: usize| (_mm256_mul_ps(unit, bytes(place)), min_unit);
            [scale(32 + position * 32), scale(32 + position * 32 + 16)]
        }
        Scales::Sub16Min => {
            let pair = |place: usize| {
                let pair = _mm256_cvtepu8_epi32(load64(part(record, place + half * 8)));
                let scale = _mm256_cvtepi32_ps(_mm256_and_si256(pair, _mm256_set1_epi32(15)));
                let min = _mm256_cvtepi32_ps(_mm256_srli_epi32(pair, 4));
                (_mm256_mul_ps(unit, scale), _mm256_mul_ps(min_unit, min))
            };
            [pair(64 + position * 32), pair(64 + position * 32 + 16)]
        }
        Scales::Halves => [0, 1].map(|list| (singles(record, list, half), min_unit)),
        Scales::HalvesMin => {
            [0, 2].map(|list| (singles(record, list, half), singles(record, list + 1, half)))
        }
    }
}
