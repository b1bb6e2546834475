//! Packed weight layouts.

use crate::{DType, Result};

/// Unpacks whole blocks into f32. `out.len()` values are expected in `data`.
///
/// # Errors
/// [`crate::Error::ByteLength`], [`crate::Error::RowLength`].
pub fn dequantize(dtype: DType, data: &[u8], out: &mut [f32]) -> Result<()> {
    let _ = (dtype, data, out);
    unimplemented!()
}

/// Packs values into blocks, round-to-nearest with the layout's best search. `importance`, where
/// given, weighs each value's squared error (same length as `values`).
///
/// # Errors
/// [`crate::Error::NotFinite`], [`crate::Error::NotWritable`], lengths.
pub fn quantize(
    dtype: DType,
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<()> {
    let _ = (dtype, values, importance, out);
    unimplemented!()
}
