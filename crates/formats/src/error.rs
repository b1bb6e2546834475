use std::io;
use std::path::PathBuf;

/// What can go wrong with a model file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to open, write or rename a file.
    #[error("cannot {action} `{}`: {}", .path.display(), explain(.source))]
    Io {
        /// What was tried, as a verb: `open`, `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The path leads to something else than a model file of the expected format.
    #[error("`{}` is no {expected}: {found}", .path.display())]
    WrongFile {
        /// The file or directory.
        path: PathBuf,
        /// What was looked for: `GGUF file`, `safetensors file`.
        expected: &'static str,
        /// What was found instead and what to do about it.
        found: String,
    },
    /// The header is truncated, contradicts itself or asks for what this build does not read.
    #[error("cannot read the header of `{}`: {reason}", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A tensor's description is invalid.
    #[error("tensor `{tensor}` of `{}`: {reason}", .path.display())]
    Tensor {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// A tensor that was asked for is not there.
    #[error("`{}` has no tensor `{tensor}`", .path.display())]
    MissingTensor {
        /// The file, or the first one of several.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// The configuration says that weights are quantized in a way this build does not read.
    #[error("the quantization in `{}`: {reason}", .path.display())]
    Quantization {
        /// The configuration.
        path: PathBuf,
        /// The field, what was found there, and what is read.
        reason: String,
    },
    /// A quantized module that a format has no way to store.
    #[error("{format} cannot hold `{module}`: {reason}")]
    CannotHold {
        /// The module's name.
        module: String,
        /// The format.
        format: &'static str,
        /// What the format asks for and what was found.
        reason: String,
    },
    /// A record of a data set is not what it should be, or a file of them cannot be read.
    #[error("{place}: {reason}")]
    Record {
        /// The file, with the line or row.
        place: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// The shards of one model do not fit together.
    #[error("the shards of `{}` do not fit together: {reason}", .path.display())]
    Shards {
        /// The shard or the index that was opened.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// What should be written cannot be expressed in the format, or data came in the wrong order
    /// or amount.
    #[error("cannot write `{}`: {reason}", .path.display())]
    Unwritable {
        /// The file to be written.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
}

/// A result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says in words what users most often meet; leaves the rest to the operating system.
fn explain(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::StorageFull => {
            "the disk is full (no space left on device); free some space or write to another one"
                .to_owned()
        }
        io::ErrorKind::QuotaExceeded => {
            "the disk quota is used up; free some space or write to another disk".to_owned()
        }
        io::ErrorKind::FileTooLarge => {
            "the file grows past what the file system or `ulimit -f` allows (file too large)"
                .to_owned()
        }
        io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        io::ErrorKind::NotFound => "no such file or directory".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => source.to_string(),
    }
}

impl Error {
    /// For `map_err`: the operating system refused to do `action` with `path`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { action, path, source }
    }
}
