//! The fast Walsh–Hadamard transform, which spreads outliers evenly (QuaRot, arXiv 2404.00456).
//!
//! H₁ = 1, H₂ₙ = (Hₙ Hₙ; Hₙ −Hₙ) / √2. Hₙ is orthogonal and symmetric: it is its own inverse, and
//! q·k = (H q)·(H k).

use crate::dispatch::for_each_isa;

/// The largest power of two that divides `head_dim`: 128 → 128, 96 → 32, 80 → 16.
///
/// # Panics
/// Where `head_dim` is 0.
pub(crate) const fn block_len(head_dim: usize) -> usize {
    assert!(head_dim > 0, "a head without values");
    1 << head_dim.trailing_zeros()
}

for_each_isa! {
    /// Multiplies every block of `n` values by Hₙ, in n log n additions; `n` is a power of two.
    pub(crate) fn hadamard(x: &mut [f32], n: usize) {
        let scale = 1.0 / (n as f32).sqrt();
        for x in x.chunks_exact_mut(n) {
            let mut half = n / 2;
            while half > 0 {
                for pair in x.chunks_exact_mut(2 * half) {
                    let (a, b) = pair.split_at_mut(half);
                    for (a, b) in a.iter_mut().zip(b) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                half /= 2;
            }
            for x in x {
                *x *= scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn blocks_are_the_power_of_two_in_the_width() {
        for (head_dim, block) in [(1, 1), (7, 1), (64, 64), (80, 16), (96, 32), (100, 4)] {
            assert_eq!(block_len(head_dim), block, "{head_dim}");
        }
    }

    /// The matrix itself: Hᵢⱼ = (−1)^(bits that i and j share) / √n.
    #[test]
    fn the_transform_is_the_matrix() {
        for n in [1, 2, 4, 32, 256] {
            let x: Vec<f32> = (0..2 * n).map(|i| (i as f32 * 1.7).sin()).collect();
            let expected = |i: usize| {
                let block = &x[i / n * n..][..n];
                let sign = |j: usize| {
                    if ((i % n) & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }
                };
                let terms = block.iter().enumerate().map(|(j, &x)| sign(j) * f64::from(x));
                terms.sum::<f64>() / (n as f64).sqrt()
            };
            for isa in Isa::available() {
                let mut y = x.clone();
                hadamard(isa, &mut y, n);
                for (i, &y) in y.iter().enumerate() {
                    let expected = expected(i);
                    assert!((f64::from(y) - expected).abs() < 1e-6, "{isa} {n}: {y} {expected}");
                }
            }
        }
    }
}
