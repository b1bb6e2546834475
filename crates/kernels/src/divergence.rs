//! How far two rows of logits lie apart. Gives the same bits on every instruction set.

use crate::Cpu;
use crate::dispatch::for_each_isa;
use crate::math::{LANES, exp, max, max_lanes, sum_lanes};

/// What [`kl_divergence`] finds out about two rows of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowDivergence {
    /// Σ p · ln(p / q) in nats, with p = softmax(base) and q = softmax(other); 0 where the rows are
    /// equal.
    pub kl: f64,
    /// ln Σ e^base
    pub base: f64,
    /// ln Σ e^other
    pub other: f64,
}

/// The Kullback–Leibler divergence of softmax(`other`) from softmax(`base`), and the logarithm of both
/// normalisers. The divergence is within 1e-6 · (1 + KL), the others are within 1e-6, for logits that
/// span less than 100; a row with a NaN, with +∞, or of nothing but −∞ gives NaN.
///
/// With b = base − max base and o = other − max other, and sums over the vocabulary,
/// KL = Σ eᵇ (b − o) / Σ eᵇ − ln Σ eᵇ + ln Σ eᵒ.
///
/// # Panics
/// Where the rows are of different lengths.
pub fn kl_divergence(cpu: &Cpu, base: &[f32], other: &[f32]) -> RowDivergence {
    assert_eq!(base.len(), other.len(), "two distributions over one vocabulary");
    kl_body(cpu.isa(), base, other)
}

/// ln Σ e^`row` within 1e-6. A row with a NaN, with +∞, or of nothing but −∞ gives NaN.
pub fn log_sum_exp(cpu: &Cpu, row: &[f32]) -> f64 {
    log_sum_exp_body(cpu.isa(), row)
}

/// Values whose sums are kept in f32 before they join the total in f64.
const BLOCK: usize = 64 * LANES;

for_each_isa! {
    fn kl_body(base: &[f32], other: &[f32]) -> RowDivergence {
        let (base_max, other_max) = (highest(base), highest(other));
        // Σ eᵇ, Σ eᵒ and Σ eᵇ (b − o)
        let (mut base_sum, mut other_sum, mut distance) = (0.0f64, 0.0f64, 0.0f64);
        for (base, other) in base.chunks(BLOCK).zip(other.chunks(BLOCK)) {
            let mut lanes = [[0.0f32; LANES]; 3];
            let (base_parts, base_rest) = base.as_chunks::<LANES>();
            let (other_parts, other_rest) = other.as_chunks::<LANES>();
            for (base, other) in base_parts.iter().zip(other_parts) {
                add_divergence(&mut lanes, base, base_max, other, other_max);
            }
            add_divergence(&mut lanes, base_rest, base_max, other_rest, other_max);
            base_sum += f64::from(sum_lanes(lanes[0]));
            other_sum += f64::from(sum_lanes(lanes[1]));
            distance += f64::from(sum_lanes(lanes[2]));
        }
        let (base_log, other_log) = (base_sum.ln(), other_sum.ln());
        RowDivergence {
            kl: distance / base_sum - base_log + other_log,
            base: f64::from(base_max) + base_log,
            other: f64::from(other_max) + other_log,
        }
    }

    fn log_sum_exp_body(row: &[f32]) -> f64 {
        let row_max = highest(row);
        let mut sum = 0.0f64;
        for row in row.chunks(BLOCK) {
            let mut lanes = [0.0f32; LANES];
            let (parts, rest) = row.as_chunks::<LANES>();
            for part in parts {
                add_exp(&mut lanes, part, row_max);
            }
            add_exp(&mut lanes, rest, row_max);
            sum += f64::from(sum_lanes(lanes));
        }
        f64::from(row_max) + sum.ln()
    }
}

/// Adds eᵇ, eᵒ and eᵇ (b − o) of at most `LANES` values to the lanes.
#[inline(always)]
fn add_divergence(
    lanes: &mut [[f32; LANES]; 3],
    base: &[f32],
    base_max: f32,
    other: &[f32],
    other_max: f32,
) {
    for j in 0..base.len() {
        let (b, o) = (base[j] - base_max, other[j] - other_max);
        let p = exp(b);
        lanes[0][j] += p;
        lanes[1][j] += exp(o);
        // A token that cannot occur adds nothing, even if the other distribution excludes it as well.
        let distance = p * (b - o);
        lanes[2][j] += if p == 0.0 { 0.0 } else { distance };
    }
}

#[inline(always)]
fn add_exp(lanes: &mut [f32; LANES], row: &[f32], row_max: f32) {
    for j in 0..row.len() {
        lanes[j] += exp(row[j] - row_max);
    }
}

/// The greatest of `row`; −∞ where it is empty.
#[inline(always)]
fn highest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (parts, rest) = row.as_chunks::<LANES>();
    for part in parts {
        for j in 0..LANES {
            lanes[j] = max(part[j], lanes[j]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = max(x, *lane);
    }
    max_lanes(lanes)
}
