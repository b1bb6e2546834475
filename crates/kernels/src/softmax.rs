//! Softmax over a row. Gives the same bits on every instruction set.

use crate::Cpu;
use crate::dispatch::for_each_isa;
use crate::math::{LANES, exp, max, max_lanes, sum_lanes};

/// Replaces `row` by its softmax, e^(x − max) / Σ e^(x − max).
///
/// A row of nothing but −∞ becomes zeros.
pub fn softmax(cpu: &Cpu, row: &mut [f32]) {
    softmax_body(cpu.isa(), row);
}

for_each_isa! {
    fn softmax_body(row: &mut [f32]) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for part in row.chunks(LANES) {
            for (lane, &x) in lanes.iter_mut().zip(part) {
                *lane = max(*lane, x);
            }
        }
        let highest = max_lanes(lanes);
        let highest = if highest == f32::NEG_INFINITY { 0.0 } else { highest };
        let mut lanes = [0.0f32; LANES];
        for part in row.chunks_mut(LANES) {
            for (lane, x) in lanes.iter_mut().zip(part) {
                *x = exp(*x - highest);
                *lane += *x;
            }
        }
        let sum = sum_lanes(lanes);
        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        for x in row {
            *x *= inverse;
        }
    }
}
