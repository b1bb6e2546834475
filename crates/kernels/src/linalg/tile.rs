//! The innermost product: a tile of `C`, held in registers, over a run of `k`.
//!
//! Every element is one chain of fused multiply-adds in the order of `k`, so that all instruction
//! sets give the same bits. The shape of a tile is that of the instruction set's registers.

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::Update;
use crate::Isa;

/// The most elements a tile has.
pub(super) const MOST: usize = 12 * 32;

/// What is multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Factors {
    /// Single-precision numbers.
    #[default]
    F32,
    /// bf16 numbers, two of neighbouring `k` in a word. Only where the instruction set has them.
    Bf16,
}

impl Factors {
    /// Words of a panel for each column, where it is `depth` of `k` deep.
    pub(super) fn words(self, depth: usize) -> usize {
        match self {
            Self::F32 => depth,
            Self::Bf16 => depth.div_ceil(2),
        }
    }
}

/// Rows and columns of a tile of `C`: `A` is packed in panels of as many rows, `B` in panels of as
/// many columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// The tile that fills the registers; a smaller one for a product of few rows or columns, or of rows that it divides and the
/// larger one does not: with nothing wasted it is as fast.
pub(super) fn shape(isa: Isa, rows: usize, cols: usize) -> Shape {
    match isa {
        Isa::Avx512 | Isa::Avx512Bf16 => {
            let eight = rows <= 8 || rows.is_multiple_of(8) && !rows.is_multiple_of(12);
            Shape { rows: if eight { 8 } else { 12 }, cols: if cols <= 16 { 16 } else { 32 } }
        }
        Isa::Avx2 | Isa::AvxVnni => Shape { rows: 6, cols: 16 },
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => Shape { rows: 8, cols: 12 },
        Isa::Scalar => Shape { rows: 4, cols: 8 },
    }
}

/// Whether tiles of this shape are computed.
pub(super) fn has_shape(isa: Isa, tile: Shape) -> bool {
    let few_or_many = [1, usize::MAX];
    let mut shapes =
        few_or_many.iter().flat_map(|&rows| few_or_many.map(|cols| shape(isa, rows, cols)));
    shapes.any(|shape| shape == tile)
}

/// `tile[i, j] += Σ_k a[k, i] · b[k, j]`, or what `update` says: the product of a panel of `A`, `[k, rows]`, with a panel
/// of `B`, `[k, cols]`; the tile's rows begin `stride` values apart at `tile`.
///
/// # Safety
/// All rows of the tile can be written at `tile`, nobody else looks at them, and the processor has `isa`.
///
/// # Panics
/// Where the panels are not of the same `k`.
#[allow(clippy::too_many_arguments)] // Those of a product.
pub(super) unsafe fn accumulate(
    isa: Isa,
    factors: Factors,
    shape: Shape,
    a: &[f32],
    b: &[f32],
    update: Update,
    tile: *mut f32,
    stride: usize,
) {
    assert_eq!(a.len() * shape.cols, b.len() * shape.rows, "panels of different depth");
    // SAFETY: the caller's word.
    unsafe {
        match (isa, factors) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, Factors::Bf16) => match (shape.rows, shape.cols) {
                (8, 16) => avx512_bf16::<8, 1>(a, b, update, tile, stride),
                (8, _) => avx512_bf16::<8, 2>(a, b, update, tile, stride),
                (_, 16) => avx512_bf16::<12, 1>(a, b, update, tile, stride),
                _ => avx512_bf16::<12, 2>(a, b, update, tile, stride),
            },
            (_, Factors::Bf16) => unreachable!("bf16 is not for {isa}"),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Avx512Bf16, _) => match (shape.rows, shape.cols) {
                (8, 16) => avx512::<8, 1>(a, b, update, tile, stride),
                (8, _) => avx512::<8, 2>(a, b, update, tile, stride),
                (_, 16) => avx512::<12, 1>(a, b, update, tile, stride),
                _ => avx512::<12, 2>(a, b, update, tile, stride),
            },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::AvxVnni, ..) => avx2(a, b, update, tile, stride),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, ..) => neon(a, b, update, tile, stride),
            _ => scalar(a, b, update, tile, stride),
        }
    }
}

/// # Safety
/// That of [`accumulate`].
unsafe fn scalar(a: &[f32], b: &[f32], update: Update, tile: *mut f32, stride: usize) {
    let mut sums = [[0f32; 8]; 4];
    for (a, b) in a.as_chunks::<4>().0.iter().zip(b.as_chunks::<8>().0) {
        for i in 0..4 {
            for j in 0..8 {
                sums[i][j] = a[i].mul_add(b[j], sums[i][j]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: the tile's row, by the caller's word.
        let row = unsafe { std::slice::from_raw_parts_mut(tile.add(i * stride), sums.len()) };
        row.iter_mut().zip(sums).for_each(|(c, sum)| update.apply(c, *sum));
    }
}

/// # Safety
/// That of [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(a: &[f32], b: &[f32], update: Update, tile: *mut f32, stride: usize) {
    let mut sums = [[_mm256_setzero_ps(); 2]; 6];
    for (a, b) in a.as_chunks::<6>().0.iter().zip(b.as_chunks::<16>().0) {
        // SAFETY: sixteen values lie there.
        let b = unsafe { [_mm256_loadu_ps(b.as_ptr()), _mm256_loadu_ps(b.as_ptr().add(8))] };
        for i in 0..6 {
            let a = _mm256_set1_ps(a[i]);
            sums[i][0] = _mm256_fmadd_ps(a, b[0], sums[i][0]);
            sums[i][1] = _mm256_fmadd_ps(a, b[1], sums[i][1]);
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            // SAFETY: eight values of the tile, by the caller's word.
            unsafe {
                let place = tile.add(i * stride + j * 8);
                let updated = match update {
                    Update::Set => sum,
                    Update::Add => _mm256_add_ps(_mm256_loadu_ps(place), sum),
                    Update::Subtract => _mm256_sub_ps(_mm256_loadu_ps(place), sum),
                };
                _mm256_storeu_ps(place, updated);
            }
        }
    }
}

/// A tile of `ROWS` rows and `VECTORS` registers in each.
///
/// # Safety
/// That of [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const ROWS: usize, const VECTORS: usize>(
    a: &[f32],
    b: &[f32],
    update: Update,
    tile: *mut f32,
    stride: usize,
) {
    prefetch::<ROWS, VECTORS>(tile, stride);
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (a, b) in a.as_chunks::<ROWS>().0.iter().zip(b.as_chunks::<16>().0.as_chunks().0) {
        // SAFETY: sixteen values lie there.
        let b: [__m512; VECTORS] = b.map(|b| unsafe { _mm512_loadu_ps(b.as_ptr()) });
        for i in 0..ROWS {
            let a = _mm512_set1_ps(a[i]);
            for j in 0..VECTORS {
                sums[i][j] = _mm512_fmadd_ps(a, b[j], sums[i][j]);
            }
        }
    }
    // SAFETY: the caller's word.
    unsafe { put_tile(sums, update, tile, stride) };
}

/// The same of pairs of bf16 numbers.
///
/// # Safety
/// That of [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16<const ROWS: usize, const VECTORS: usize>(
    a: &[f32],
    b: &[f32],
    update: Update,
    tile: *mut f32,
    stride: usize,
) {
    prefetch::<ROWS, VECTORS>(tile, stride);
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (a, b) in a.as_chunks::<ROWS>().0.iter().zip(b.as_chunks::<16>().0.as_chunks().0) {
        // SAFETY: sixteen words lie there; they are pairs of bf16 numbers.
        let b: [__m512bh; VECTORS] = b.map(|b| unsafe {
            std::mem::transmute::<__m512, __m512bh>(_mm512_loadu_ps(b.as_ptr()))
        });
        for i in 0..ROWS {
            // SAFETY: a pair of bf16 numbers, as above.
            let a = unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(a[i])) };
            for j in 0..VECTORS {
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], a, b[j]);
            }
        }
    }
    // SAFETY: the caller's word.
    unsafe { put_tile(sums, update, tile, stride) };
}

/// The tile's lines are on their way while the sums are made: they lie far apart, and would be waited for one by one.
#[cfg(target_arch = "x86_64")]
#[inline]
fn prefetch<const ROWS: usize, const VECTORS: usize>(tile: *const f32, stride: usize) {
    for i in 0..ROWS {
        for j in 0..VECTORS {
            // SAFETY: prefetching touches no memory that the program can see.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(tile.wrapping_add(i * stride + j * 16).cast()) };
        }
    }
}

/// # Safety
/// That of [`accumulate`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn put_tile<const ROWS: usize, const VECTORS: usize>(
    sums: [[__m512; VECTORS]; ROWS],
    update: Update,
    tile: *mut f32,
    stride: usize,
) {
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            // SAFETY: sixteen values of the tile, by the caller's word.
            unsafe {
                let place = tile.add(i * stride + j * 16);
                let updated = match update {
                    Update::Set => sum,
                    Update::Add => _mm512_add_ps(_mm512_loadu_ps(place), sum),
                    Update::Subtract => _mm512_sub_ps(_mm512_loadu_ps(place), sum),
                };
                _mm512_storeu_ps(place, updated);
            }
        }
    }
}

/// # Safety
/// That of [`accumulate`].
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(a: &[f32], b: &[f32], update: Update, tile: *mut f32, stride: usize) {
    let mut sums = [[vdupq_n_f32(0.0); 3]; 8];
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<12>().0) {
        // SAFETY: twelve values lie there.
        let b = unsafe { [0, 4, 8].map(|j| vld1q_f32(b.as_ptr().add(j))) };
        // SAFETY: eight values lie there.
        let a = unsafe { [0, 4].map(|i| vld1q_f32(a.as_ptr().add(i))) };
        for j in 0..3 {
            for half in 0..2 {
                let (i, a) = (half * 4, a[half]);
                sums[i][j] = vfmaq_laneq_f32::<0>(sums[i][j], b[j], a);
                sums[i + 1][j] = vfmaq_laneq_f32::<1>(sums[i + 1][j], b[j], a);
                sums[i + 2][j] = vfmaq_laneq_f32::<2>(sums[i + 2][j], b[j], a);
                sums[i + 3][j] = vfmaq_laneq_f32::<3>(sums[i + 3][j], b[j], a);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            // SAFETY: four values of the tile, by the caller's word.
            unsafe {
                let place = tile.add(i * stride + j * 4);
                let updated = match update {
                    Update::Set => sum,
                    Update::Add => vaddq_f32(vld1q_f32(place), sum),
                    Update::Subtract => vsubq_f32(vld1q_f32(place), sum),
                };
                vst1q_f32(place, updated);
            }
        }
    }
}
