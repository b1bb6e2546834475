//! The innermost product: a tile of `C`, held in registers, over a run of `k`.
//!
//! Every element is one chain of fused multiply-adds in the order of `k`, so that all instruction
//! sets give the same bits. The shape of a tile is that of the instruction set's registers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::Isa;

/// The most elements a tile has.
pub(super) const MOST: usize = 12 * 32;

/// Rows and columns of a tile of `C`: `A` is packed in panels of as many rows, `B` in panels of as
/// many columns.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// The tile that fills the registers.
pub(super) fn shape(isa: Isa) -> Shape {
    match isa {
        Isa::Avx512 => Shape { rows: 12, cols: 32 },
        Isa::Avx2 => Shape { rows: 6, cols: 16 },
        Isa::Scalar => Shape { rows: 4, cols: 8 },
    }
}

/// `tile[i, j] = Σ_k a[k, i] · b[k, j]`: the product of a panel of `A`, `[k, rows]`, with a panel of
/// `B`, `[k, cols]`; the tile is row by row.
///
/// # Panics
/// Where the panels are not of the same `k`, or this processor lacks `isa`.
pub(super) fn product(isa: Isa, a: &[f32], b: &[f32], tile: &mut [f32; MOST]) {
    let Shape { rows, cols } = shape(isa);
    assert_eq!(a.len() / rows, b.len() / cols, "panels of different depth");
    match isa {
        // SAFETY: a `Cpu` carries an instruction set only where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(a, b, tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(a, b, tile) },
        _ => scalar(a, b, tile),
    }
}

fn scalar(a: &[f32], b: &[f32], tile: &mut [f32; MOST]) {
    let mut sums = [[0f32; 8]; 4];
    for (a, b) in a.as_chunks::<4>().0.iter().zip(b.as_chunks::<8>().0) {
        for i in 0..4 {
            for j in 0..8 {
                sums[i][j] = a[i].mul_add(b[j], sums[i][j]);
            }
        }
    }
    tile[..32].copy_from_slice(sums.as_flattened());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(a: &[f32], b: &[f32], tile: &mut [f32; MOST]) {
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
    for (out, sum) in tile.as_chunks_mut::<8>().0.iter_mut().zip(sums.as_flattened()) {
        // SAFETY: there is room for eight values.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), *sum) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(a: &[f32], b: &[f32], tile: &mut [f32; MOST]) {
    let mut sums = [[_mm512_setzero_ps(); 2]; 12];
    for (a, b) in a.as_chunks::<12>().0.iter().zip(b.as_chunks::<32>().0) {
        // SAFETY: 32 values lie there.
        let b = unsafe { [_mm512_loadu_ps(b.as_ptr()), _mm512_loadu_ps(b.as_ptr().add(16))] };
        for i in 0..12 {
            let a = _mm512_set1_ps(a[i]);
            sums[i][0] = _mm512_fmadd_ps(a, b[0], sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(a, b[1], sums[i][1]);
        }
    }
    for (out, sum) in tile.as_chunks_mut::<16>().0.iter_mut().zip(sums.as_flattened()) {
        // SAFETY: there is room for sixteen values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *sum) };
    }
}
