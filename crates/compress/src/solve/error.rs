/// Why a matrix could not be quantized or pruned.
#[derive(Debug, thiserror::Error)]
pub enum SolveError {
    /// A weight that is not a number or infinite.
    #[error("weight {index} is {value}; the model is damaged: download it again")]
    Weights {
        /// Position in the matrix, row by row.
        index: usize,
        /// The weight.
        value: f32,
    },
    /// The target's layout does not fit.
    #[error(transparent)]
    Layout(#[from] bevel_base::Error),
    /// A target that is not what it could be.
    #[error("{0}")]
    Target(String),
    /// Statistics that were not gathered.
    #[error("{method} needs the {what} of the layer's inputs, which calibration did not gather")]
    Missing {
        /// The method.
        method: &'static str,
        /// The statistics.
        what: &'static str,
    },
    /// Statistics that are not finite.
    #[error(
        "the inputs of the layer are not finite: column {column} has a sum of squares of {value}; the model computes nonsense on the calibration text"
    )]
    Inputs {
        /// The column.
        column: usize,
        /// What was found.
        value: f64,
    },
    /// The Hessian stays singular however much is added to its diagonal.
    #[error(
        "the inputs' second moments have no Cholesky factor even with {damping} of their mean added to the diagonal"
    )]
    Singular {
        /// The last λ that was tried, as a part of the mean.
        damping: f32,
    },
}

/// A result with [`SolveError`].
pub type SolveResult<T> = std::result::Result<T, SolveError>;
