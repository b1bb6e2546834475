/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot be read, or does not fit.
    #[error(transparent)]
    Model(#[from] bevel_model::Error),
    /// Keys and values do not fit into memory.
    #[error(transparent)]
    Kernel(#[from] bevel_kernels::Error),
    /// A model that cannot be trained yet.
    #[error("`{path}` is a mixture of experts, which cannot be trained yet")]
    Experts {
        /// The model.
        path: String,
    },
    /// A file that cannot be read or written, or a record in one that is no example.
    #[error(transparent)]
    Format(#[from] bevel_formats::Error),
    /// The system fails.
    #[error("`{path}`: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// A loss or gradient that is no number.
    #[error("the loss is no number: lower the learning rate, or look at the data")]
    NotFinite,
}

/// With this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
