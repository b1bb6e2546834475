use std::path::PathBuf;

use bevel_base::DType;

/// What can go wrong with a conversion or a quantization.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot be opened or read.
    #[error(transparent)]
    Model(#[from] bevel_model::Error),
    /// A model file cannot be read or written.
    #[error(transparent)]
    Format(#[from] bevel_formats::Error),
    /// A data set cannot be fetched.
    #[error(transparent)]
    Hub(#[from] bevel_formats::hub::Error),
    /// The calibration data cannot be read, or do not suffice.
    #[error("calibration data `{data}`: {reason}")]
    Calibration {
        /// The file, with the line of a record, or the data as asked for.
        data: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The model's tokenizer cannot be carried over.
    #[error("the tokenizer cannot be converted: {0}")]
    Tokenizer(#[from] bevel_model::tokenizer::TokenizerError),
    /// A tensor holds a value that is not a number or infinite.
    #[error(
        "tensor `{tensor}`: value {index} is {value}; the model is damaged and would answer nonsense: download it again (`bevel inspect --check` lists every damaged tensor)"
    )]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Position in the tensor, row by row.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A tensor cannot be unpacked or packed.
    #[error("tensor `{tensor}`: {source}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What failed.
        source: bevel_base::Error,
    },
    /// A run that something else than this one left unfinished.
    #[error(
        "`{}` is an unfinished run with another {what}; finish that one with its own options, or throw it away with --restart",
        .dir.display()
    )]
    OtherRun {
        /// The directory of the unfinished run.
        dir: PathBuf,
        /// What is different.
        what: &'static str,
    },
    /// Another program is at the same output.
    #[error("another run is at work on `{}`; let it finish, or name another output", .0.display())]
    Busy(PathBuf),
    /// A file of an unfinished run that does not hold what it should.
    #[error("`{}` is damaged; throw the unfinished run away with --restart", .0.display())]
    BrokenPart(PathBuf),
    /// An importance matrix that cannot be used.
    #[error("importance matrix `{}`: {reason}", .path.display())]
    Imatrix {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A method that needs calibration data was given none.
    #[error("the recipe's method needs calibration data, and none was given")]
    NoCalibration,
    /// No choice of types keeps to a budget.
    #[error("the budget of {budget} cannot be kept to: {reason}")]
    Budget {
        /// What was asked for.
        budget: String,
        /// What is in the way and what to do.
        reason: String,
    },
    /// A matrix cannot be quantized as asked.
    #[error("tensor `{tensor}`: {source}")]
    Solve {
        /// The tensor.
        tensor: String,
        /// What failed.
        source: crate::solve::SolveError,
    },
    /// A recipe does not parse.
    #[error("the recipe is not valid: {0}")]
    Recipe(String),
    /// A type's or mix's name that bevel does not know.
    #[error("unknown type `{name}`; {known}")]
    UnknownType {
        /// What was asked for.
        name: String,
        /// What there is, and which of it comes close.
        known: String,
    },
    /// A type that can be read but not written.
    #[error("{dtype} cannot be written: {reason}")]
    NotWritable {
        /// The type.
        dtype: DType,
        /// Why not, and what to use.
        reason: String,
    },
    /// A target that cannot hold what the recipe asks for.
    #[error("`{}`: {reason}", .path.display())]
    Target {
        /// The output.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something went otherwise than asked for, and `strict` forbids that.
    #[error("strict: {}", .0.join("; "))]
    Strict(Vec<String>),
    /// The output is there already.
    #[error("`{}` exists; remove it, choose another name, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// The output would replace the model it is made from.
    #[error("`{}` is the model itself; choose another name for the output", .0.display())]
    OverwritesInput(PathBuf),
    /// The disk is too small.
    #[error(
        "`{}` needs {needed} bytes, but only {available} are free there; free some space or write to another disk",
        .path.display()
    )]
    NoSpace {
        /// The output.
        path: PathBuf,
        /// Bytes the output takes.
        needed: u64,
        /// Bytes free on its disk.
        available: u64,
    },
    /// A file other than the model's tensors cannot be read or written.
    #[error("cannot {action} `{}`: {source}", .path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The caller's progress function asked to stop. Nothing was left behind.
    #[error("stopped")]
    Stopped,
}

impl Error {
    /// For `map_err`: the operating system refused to do `action` with `path`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { action, path, source }
    }
}

/// A result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
