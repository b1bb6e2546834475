//! 4-bit floats of the Open Compute microscaling family: MXFP4 and NVFP4.
//!
//! OCP Microscaling Formats specification 1.0, and Microscaling Data Formats for Deep Learning,
//! arXiv 2310.10537. Where the bytes leave a choice, it is that of compressed-tensors.
//!
//! With `x` a group, `e2m1` rounding to the nearest level, ties to the even code:
//!
//! ```text
//! NVFP4, groups of 16
//! (1)  G = 448 · 6 / max|x|                   over the whole matrix
//! (2)  c = e4m3(G max|x| / 6)                 of each group
//! (3)  s = c / G,  code = e2m1(x / s)
//!
//! MXFP4, groups of 32
//! (4)  s = 2^(⌊log2 max|x|⌉ - 2)              up from a mantissa of 1.75 on
//! (5)  code = e2m1(x / s)
//! ```

use super::{Coding, GroupedMatrix, check_values};
use crate::pack::{e4m3, to_e4m3};
use crate::{Error, Result};

/// What the codes of an E2M1 float stand for. Bit 3 is the sign, and there is a zero of each.
pub const E2M1_LEVELS: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Columns that share a scale in NVFP4.
pub const NVFP4_GROUP: usize = 16;
/// Columns that share a scale in MXFP4.
pub const MXFP4_GROUP: usize = 32;

/// The power of two that an E8M0 code stands for: `2^(code − 127)`; 255 is no number.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        code => f32::from_bits(u32::from(code) << 23),
    }
}

/// The E8M0 code of a power of two; `None` for every other number.
pub fn to_e8m0(value: f32) -> Option<u8> {
    (0..255).find(|&code| e8m0(code) == value)
}

/// The E2M1 code nearest to a number, ties to the even one, saturating at ±6.
pub fn to_e2m1(value: f32) -> u8 {
    let t = value.abs();
    // Between an even code below and an odd one above, the middle itself goes down.
    let above = [t > 0.25, t >= 0.75, t > 1.25, t >= 1.75, t > 2.5, t >= 3.5, t > 5.0];
    let magnitude = above.iter().filter(|&&above| above).count() as u8;
    magnitude | if value < 0.0 { 8 } else { 0 }
}

/// Quantizes a matrix `[rows, cols]` to NVFP4.
///
/// # Errors
/// [`Error::Grouped`] where lengths disagree or groups do not divide the columns,
/// [`Error::NotFinite`].
pub fn quantize_nvfp4(values: &[f32], rows: usize, cols: usize) -> Result<GroupedMatrix> {
    check_values(values, rows, cols)?;
    check_groups(cols, NVFP4_GROUP)?;
    let global = 448.0 * 6.0 / largest(values).max(f32::MIN_POSITIVE); // (1)
    let global = if global.is_finite() { global } else { 1.0 };
    let groups = values.chunks_exact(NVFP4_GROUP);
    let scale = |x: &[f32]| nvfp4_scale(global * (largest(x) / 6.0), global);
    let scales: Vec<f32> = groups.map(scale).collect(); // (2)
    Ok(codes(values, rows, cols, NVFP4_GROUP, scales)) // (3)
}

/// The scale that NVFP4 stores for one that is `scaled` before the division by `global`. No scale
/// is zero: the least is an eighth, as in compressed-tensors.
fn nvfp4_scale(scaled: f32, global: f32) -> f32 {
    let stored = e4m3(to_e4m3(scaled));
    (if stored == 0.0 { 0.125 } else { stored }) / global
}

/// Makes scales into what NVFP4 can store: multiples of E4M3 floats, the largest being 448.
///
/// # Errors
/// [`Error::Grouped`] where a scale is negative or not finite.
pub fn round_nvfp4(scales: &mut [f32]) -> Result<()> {
    if let Some(wrong) = scales.iter().find(|scale| !(scale.is_finite() && **scale >= 0.0)) {
        return Err(Error::Grouped(format!("a scale of {wrong}; NVFP4 needs positive ones")));
    }
    let global = 448.0 / largest(scales).max(f32::MIN_POSITIVE);
    let global = if global.is_finite() { global } else { 1.0 };
    scales.iter_mut().for_each(|scale| *scale = nvfp4_scale(global * *scale, global));
    Ok(())
}

/// Takes scales apart into the E4M3 codes and the one divisor that NVFP4 stores; `None` where they
/// are no such products.
pub fn split_nvfp4(scales: &[f32]) -> Option<(f32, Vec<u8>)> {
    let largest = largest(scales);
    if largest == 0.0 || !largest.is_finite() {
        return None;
    }
    // The largest scale has the largest code, most likely 448, and the quotient was rounded.
    let globals = (1..0x7f).rev().flat_map(|code| {
        let bits = (e4m3(code) / largest).to_bits();
        (bits.saturating_sub(2)..=bits.saturating_add(2)).map(f32::from_bits)
    });
    let split = |global: f32| {
        let code =
            |&scale: &f32| Some(to_e4m3(scale * global)).filter(|&c| e4m3(c) / global == scale);
        scales.iter().map(code).collect::<Option<Vec<u8>>>().map(|codes| (global, codes))
    };
    globals.filter(|global| global.is_finite()).find_map(split)
}

/// Quantizes a matrix `[rows, cols]` to MXFP4.
///
/// # Errors
/// [`Error::Grouped`] where lengths disagree or groups do not divide the columns,
/// [`Error::NotFinite`].
pub fn quantize_mxfp4(values: &[f32], rows: usize, cols: usize) -> Result<GroupedMatrix> {
    check_values(values, rows, cols)?;
    check_groups(cols, MXFP4_GROUP)?;
    let groups = values.chunks_exact(MXFP4_GROUP);
    let scales = groups.map(|x| mxfp4_scale(largest(x) / 4.0)).collect(); // (4)
    Ok(codes(values, rows, cols, MXFP4_GROUP, scales)) // (5)
}

/// The power of two nearest to a positive number, up from a mantissa of 1.75 on, within E8M0.
pub fn mxfp4_scale(value: f32) -> f32 {
    let exponent = (value.to_bits() + (1 << 21)) >> 23;
    e8m0(exponent.min(254) as u8)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |largest, value| largest.max(value.abs()))
}

fn check_groups(cols: usize, group_size: usize) -> Result<()> {
    match cols.is_multiple_of(group_size) {
        true => Ok(()),
        false => Err(Error::Grouped(format!("{cols} columns, which {group_size} does not divide"))),
    }
}

fn codes(
    values: &[f32],
    rows: usize,
    cols: usize,
    group_size: usize,
    scales: Vec<f32>,
) -> GroupedMatrix {
    let groups = values.chunks_exact(group_size).zip(&scales);
    let codes = groups.flat_map(|(x, &s)| x.iter().map(move |x| to_e2m1(x / s))).collect();
    let coding = Coding::Levels(E2M1_LEVELS);
    GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None }
}
