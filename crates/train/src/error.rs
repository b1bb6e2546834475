/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot be read, or does not fit.
    #[error(transparent)]
    Model(#[from] bevel_model::Error),
    /// Keys and values do not fit into memory.
    #[error(transparent)]
    Kernel(#[from] bevel_kernels::Error),
    /// An adapter that is to begin with what quantization lost.
    #[error("LoftQ begins with what quantization lost, and asks for the original model")]
    NoOriginal,
    /// An original that is another model.
    #[error("`{path}` was not made of `{original}`, whose layers have other shapes")]
    OtherModel {
        /// The model.
        path: String,
        /// What it is said to be made of.
        original: String,
    },
    /// An adapter that training cannot begin with.
    #[error("`{path}` cannot be gone on from: {reason}")]
    Start {
        /// The adapter.
        path: String,
        /// Why.
        reason: String,
    },
    /// An adapter that has no place in files.
    #[error(
        "`{tensor}` holds several layers, of which some alone have lengths of their own (DoRA); choose all of them as targets"
    )]
    PartOfFused {
        /// The tensor.
        tensor: String,
    },
    /// A file that cannot be read or written, or a record in one that is no example.
    #[error(transparent)]
    Format(#[from] bevel_formats::Error),
    /// A file for the optimizer's state that cannot be made.
    #[error(transparent)]
    Base(#[from] bevel_base::Error),
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
    /// The same in a step of training.
    #[error(
        "step {step}: the loss or a gradient is no number; lower the learning rate, or look at the examples of this step: number {}, counted without those that are held out",
        numbers(examples)
    )]
    BadStep {
        /// From 1 on.
        step: usize,
        /// Its examples, from 1 on.
        examples: Vec<usize>,
    },
    /// A checkpoint of another run.
    #[error("`{path}` cannot be gone on with: {reason}")]
    Checkpoint {
        /// The checkpoint.
        path: String,
        /// Why.
        reason: String,
    },
}

/// With this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn numbers(examples: &[usize]) -> String {
    let shown: Vec<String> = examples.iter().take(32).map(usize::to_string).collect();
    shown.join(", ")
}
