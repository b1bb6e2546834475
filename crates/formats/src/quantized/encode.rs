//! The parts of a module as bytes.

use bevel_base::{DType, Shape, pack};

/// A tensor of a module, with its data once there is any.
#[derive(Debug)]
pub(super) struct Tensor {
    /// The last part of its name.
    pub(super) part: &'static str,
    pub(super) dtype: DType,
    pub(super) shape: Shape,
    pub(super) data: Vec<u8>,
}

impl Tensor {
    pub(super) fn new<const N: usize>(part: &'static str, dtype: DType, shape: [usize; N]) -> Self {
        Self { part, dtype, shape: shape.into(), data: Vec::new() }
    }
}

pub(super) fn integers(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Numbers in a type that must hold them exactly, so that what is read is what was meant.
pub(super) fn floats(dtype: DType, values: &[f32]) -> Result<Vec<u8>, String> {
    let wrong = |error: bevel_base::Error| error.to_string();
    let mut data = vec![0; dtype.row_bytes(values.len()).map_err(wrong)?];
    pack::quantize(dtype, values, None, &mut data).map_err(wrong)?;
    let mut stored = vec![0.0; values.len()];
    pack::dequantize(dtype, &data, &mut stored).map_err(wrong)?;
    match values.iter().zip(&stored).find(|(value, stored)| value != stored) {
        None => Ok(data),
        Some((value, stored)) => Err(format!(
            "{value} would be stored as {stored} in {dtype}; round scales and minima with `GroupedFormat::fit` first"
        )),
    }
}
