//! Sixteen trials side by side, written as loops over arrays that compile to vector instructions.

use std::hint::black_box;

/// Trials at once: the lanes of the widest vectors.
pub(super) const LANES: usize = 16;

/// A number for each trial.
pub(super) type Lanes = [f32; LANES];

/// The array of `f(0), f(1), …`. Unlike `std::array::from_fn`, always inlined, and so compiled for
/// the caller's vectors.
#[inline(always)]
pub(super) fn each<const N: usize>(f: impl Fn(usize) -> f32) -> [f32; N] {
    let mut numbers = [0f32; N];
    for l in 0..N {
        numbers[l] = f(l);
    }
    numbers
}

/// The same numbers. Lanes that are folded into fewer and fewer would have the compiler cut the
/// vectors that made them likewise; what goes through here it makes in one piece.
#[inline(always)]
fn whole<const N: usize>(numbers: [f32; N]) -> [f32; N] {
    black_box(numbers)
}

/// The first lane with the least number.
#[inline(always)]
pub(super) fn least<const N: usize>(numbers: &[f32; N]) -> usize {
    let numbers = whole(*numbers);
    let mut folded = numbers;
    let mut half = N / 2;
    while half > 0 {
        for l in 0..half {
            let other = folded[half + l];
            folded[l] = if other < folded[l] { other } else { folded[l] };
        }
        half /= 2;
    }
    let mut found = 0u32;
    for l in 0..N {
        found |= u32::from(numbers[l] <= folded[0]) << l;
    }
    // Where no number compares, the first lane is as good as any.
    found.trailing_zeros() as usize % N
}

/// The smallest and the largest of at least one value.
#[inline(always)]
pub(super) fn range(x: &[f32]) -> (f32, f32) {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (mut low, mut high) = ([x[0]; LANES], [x[0]; LANES]);
    for chunk in chunks {
        for l in 0..LANES {
            low[l] = if chunk[l] < low[l] { chunk[l] } else { low[l] };
            high[l] = if chunk[l] > high[l] { chunk[l] } else { high[l] };
        }
    }
    for &v in rest {
        low[0] = if v < low[0] { v } else { low[0] };
        high[0] = if v > high[0] { v } else { high[0] };
    }

    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            low[l] = if low[half + l] < low[l] { low[half + l] } else { low[l] };
            high[l] = if high[half + l] > high[l] { high[half + l] } else { high[l] };
        }
        half /= 2;
    }
    (low[0], high[0])
}

/// 1 / d, or 0 for a scale of zero.
#[inline(always)]
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Sums `K` terms over the values `0..n`, `n` a multiple of [`LANES`].
#[inline(always)]
pub(super) fn total<const K: usize>(n: usize, terms: impl Fn(usize) -> [f32; K]) -> [f32; K] {
    let mut sums = [[0f32; LANES]; K];
    for first in (0..n).step_by(LANES) {
        for l in 0..LANES {
            let terms = terms(first + l);
            for k in 0..K {
                sums[k][l] += terms[k];
            }
        }
    }
    each(|k| {
        let mut folded = sums[k];
        let mut half = LANES / 2;
        while half > 0 {
            for l in 0..half {
                folded[l] += folded[half + l];
            }
            half /= 2;
        }
        folded[0]
    })
}
