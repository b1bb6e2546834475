use std::ops::Range;

use bevel_base::{DType, Shape};

/// A stored tensor: what it is and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The element type.
    pub dtype: DType,
    /// The dimensions, outermost first, whatever the order in the file.
    pub shape: Shape,
    /// Which of the model's files holds it.
    pub(crate) file: usize,
    /// Its bytes within that file.
    pub(crate) range: Range<usize>,
}

impl TensorInfo {
    /// Stored bytes.
    pub fn byte_len(&self) -> usize {
        self.range.len()
    }

    /// The bytes' place within their file.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }
}

/// A tensor that is going to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// The element type.
    pub dtype: DType,
    /// The dimensions, outermost first.
    pub shape: Shape,
}

impl TensorSpec {
    /// Joins a name, a type and a shape.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Shape>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }
}

/// Finds two tensors that share bytes: the names of the later and of the earlier one, if any.
/// `tensors` need not be sorted.
pub(crate) fn find_overlap<'a>(
    tensors: impl Iterator<Item = (&'a str, Range<usize>)>,
) -> Option<(&'a str, &'a str)> {
    let mut sorted: Vec<_> = tensors.filter(|(_, range)| !range.is_empty()).collect();
    sorted.sort_by_key(|(_, range)| range.start);
    sorted
        .windows(2)
        .find(|pair| pair[1].1.start < pair[0].1.end)
        .map(|pair| (pair[1].0, pair[0].0))
}
