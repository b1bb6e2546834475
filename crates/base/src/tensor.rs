use std::fmt;

use crate::{DType, Error, Result};

/// A tensor's dimensions, outermost first; the last one is the contiguous row.
///
/// A linear layer's weight is `[out, in]`, whatever the order in the file it came from.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Values in a row: the last dimension, 1 for a scalar.
    pub fn row_len(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all dimensions but the last. Saturates instead of overflowing;
    /// a shape that came with data was checked by [`Shape::byte_len`].
    pub fn rows(&self) -> usize {
        let outer = self.0.len().saturating_sub(1);
        self.0[..outer].iter().fold(1usize, |n, &d| n.saturating_mul(d))
    }

    /// Number of values, saturating.
    pub fn len(&self) -> usize {
        self.rows().saturating_mul(self.row_len())
    }

    /// True where a dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a tensor of this shape.
    ///
    /// # Errors
    /// [`Error::RowLength`] where blocks do not divide the row, [`Error::Overflow`] where the
    /// count does not fit.
    pub fn byte_len(&self, dtype: DType) -> Result<usize> {
        let overflow = || Error::Overflow { shape: self.to_string(), dtype };
        let outer = self.0.len().saturating_sub(1);
        let rows = self.0[..outer]
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .ok_or_else(overflow)?;
        dtype.row_bytes(self.row_len())?.checked_mul(rows).ok_or_else(overflow)
    }
}

impl From<Vec<usize>> for Shape {
    fn from(dims: Vec<usize>) -> Self {
        Self(dims)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Self(dims.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[")?;
        for (i, d) in self.0.iter().enumerate() {
            write!(f, "{}{d}", if i == 0 { "" } else { ", " })?;
        }
        write!(f, "]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A tensor lying in somebody else's memory: type, shape and exactly the bytes they ask for.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    dtype: DType,
    shape: Shape,
    data: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// Joins a type, a shape and bytes.
    ///
    /// # Errors
    /// [`Error::ByteLength`] where `data` is not exactly as long as type and shape ask for.
    pub fn new(dtype: DType, shape: impl Into<Shape>, data: &'a [u8]) -> Result<Self> {
        let shape = shape.into();
        let expected = shape.byte_len(dtype)?;
        if data.len() != expected {
            let what = format!("tensor {shape} of {dtype}");
            return Err(Error::ByteLength { what, expected, found: data.len() });
        }
        Ok(Self { dtype, shape, data })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The stored bytes, rows one after another.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The bytes of row `i`.
    pub fn row(&self, i: usize) -> &'a [u8] {
        let bytes = self.data.len() / self.shape.rows();
        &self.data[i * bytes..][..bytes]
    }

    /// All values as f32, rows one after another.
    ///
    /// # Errors
    /// Those of [`crate::pack::dequantize`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.shape.len()];
        crate::pack::dequantize(self.dtype, self.data, &mut out)?;
        Ok(out)
    }
}
