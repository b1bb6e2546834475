//! Round-to-nearest affine quantization as MLX does it, to the bit.
//!
//! There is no paper; `mlx.core.quantize` defines it. Of a group with least value `a` and largest `b`,
//! codes of `B` bits:
//!
//! ```text
//! (1)  n = 2^B - 1
//! (2)  s = max((b - a) / n, 1e-7)
//! (3)  |a| > |b|:  e = a          otherwise: s = -s, e = b
//! (4)  q0 = round(e / s)                        the code from which the edge is counted
//! (5)  q0 ≠ 0:  s = e / q0, m = e               otherwise: m = 0
//! (6)  code = clamp(round((x - m) / s), 0, n)   ŵ = s code + m
//! ```
//! The edge of larger magnitude is code 0 and exact, and zero is a code. A scale may be negative.

use super::{Coding, GroupedMatrix, check_values, round_to};
use crate::{DType, Error, Result};

/// Quantizes a matrix `[rows, cols]`. Scales and minima are rounded to `dtype`, which is the
/// model's, after the codes were found.
///
/// # Errors
/// [`Error::Grouped`] where lengths disagree or groups do not divide the columns,
/// [`Error::NotFinite`].
pub fn quantize(
    values: &[f32],
    rows: usize,
    cols: usize,
    bits: u32,
    group_size: usize,
    dtype: DType,
) -> Result<GroupedMatrix> {
    check_values(values, rows, cols)?;
    if group_size == 0 || !cols.is_multiple_of(group_size) || !(1..=8).contains(&bits) {
        return Err(Error::Grouped(format!(
            "{cols} columns for MLX's groups of {group_size} codes of {bits} bits; groups must divide the columns"
        )));
    }
    let n = ((1u32 << bits) - 1) as f32; // (1)
    let mut codes = Vec::with_capacity(values.len());
    let (mut scales, mut minima) = (Vec::new(), Vec::new());
    for x in values.chunks_exact(group_size) {
        let a = x.iter().copied().fold(f32::INFINITY, f32::min);
        let b = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut s = ((b - a) / n).max(1e-7); // (2)
        let edge = match a.abs() > b.abs() {
            true => a,
            false => {
                s = -s;
                b
            }
        }; // (3)
        let q0 = (edge / s).round_ties_even(); // (4)
        let mut m = 0.0;
        if q0 != 0.0 {
            s = edge / q0;
            m = edge;
        } // (5)
        codes.extend(x.iter().map(|x| ((x - m) / s).round_ties_even().clamp(0.0, n) as u8)); // (6)
        scales.push(s);
        minima.push(m);
    }
    round_to(dtype, &mut scales)?;
    round_to(dtype, &mut minima)?;
    let coding = Coding::Affine { bits, minima };
    Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None })
}
