//! FP8: 8-bit floats (E4M3) with a scale for each row.
//!
//! FP8 Formats for Deep Learning, arXiv 2209.05433. With `x` a row:
//!
//! ```text
//! (1)  s = max|x| / 448
//! (2)  code = e4m3(x / s)
//! ```

use super::{Coding, GroupedMatrix, check_values, round_to};
use crate::pack::to_e4m3;
use crate::{DType, Result};

/// Quantizes a matrix `[rows, cols]`. Scales are rounded to `dtype` before the codes are chosen.
///
/// # Errors
/// [`Error::Grouped`](crate::Error::Grouped) where lengths disagree,
/// [`Error::NotFinite`](crate::Error::NotFinite).
pub fn quantize(values: &[f32], rows: usize, cols: usize, dtype: DType) -> Result<GroupedMatrix> {
    check_values(values, rows, cols)?;
    let largest = |x: &[f32]| x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let mut scales: Vec<f32> =
        values.chunks_exact(cols.max(1)).map(|x| largest(x) / 448.0).collect(); // (1)
    round_to(dtype, &mut scales)?;
    // A row of zeros, or nearly so, keeps a scale that can be divided by.
    scales.iter_mut().filter(|s| **s == 0.0).for_each(|s| *s = 1.0);
    let rows_of = values.chunks_exact(cols.max(1)).zip(&scales);
    let codes = rows_of.flat_map(|(x, &s)| x.iter().map(move |x| to_e4m3(x / s))).collect(); // (2)
    let coding = Coding::Float8;
    Ok(GroupedMatrix { rows, cols, group_size: cols, coding, codes, scales, group_of: None })
}
