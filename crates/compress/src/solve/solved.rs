use bevel_base::{DType, GroupedMatrix};
use serde::Serialize;

/// A quantized matrix.
#[derive(Clone, Debug)]
pub struct Solved {
    /// What it is when dequantized, `[rows, cols]`.
    pub weights: Vec<f32>,
    /// What is to be written.
    pub form: Form,
    /// What happened.
    pub report: SolveReport,
}

/// A quantized matrix as numbers to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Rows of blocks.
    Packed {
        /// Their layout.
        dtype: DType,
        /// The blocks.
        bytes: Vec<u8>,
    },
    /// Codes and scales.
    Grouped {
        /// The matrix.
        matrix: GroupedMatrix,
        /// The number that all scales are multiples of, by an FP8 E4M3 number each
        /// ([`ScaleType::E4m3`](super::ScaleType::E4m3)).
        global_scale: Option<f32>,
    },
}

/// What a solver did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SolveReport {
    /// `tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`: the error of the layer's output as a part of the output, both
    /// squared. Without a Gram matrix `H` is the diagonal of mean squares, and without any statistics
    /// the identity.
    pub error: f64,
    /// The same for rounding the matrix as it was to nearest, with the same target, where it was asked
    /// for: an estimate of [`rounding_error`](super::rounding_error).
    pub rtn_error: Option<f64>,
    /// Calibration tokens that came to the matrix.
    pub tokens: u64,
    /// True where the target has no codes of single weights (IQ2, IQ3, floating point), and the
    /// weights were rounded to nearest, with importance, instead of the method asked for.
    pub fell_back: bool,
    /// How often damping was raised because the Hessian had no Cholesky factor.
    pub damping_retries: usize,
    /// Columns whose input was always zero. Their weights do not matter and become zero.
    pub dead_columns: usize,
    /// Seconds for each step, in the order they were taken.
    pub seconds: Vec<(&'static str, f64)>,
}
