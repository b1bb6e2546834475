use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// Sent to the endpoint, and to no other host.
    pub token: Option<Token>,
    /// The Hugging Face cache: the directory with the `models--owner--name` directories.
    pub cache: PathBuf,
    /// bevel's own cache, for models out of Python packages.
    pub bevel_cache: PathBuf,
    /// Ask nobody; use the caches.
    pub offline: bool,
    /// Link snapshots to blobs. Where a system refuses links, files are moved or copied anyway.
    pub symlinks: bool,
    /// Time to resolve, connect and agree on TLS.
    pub connect_timeout: Duration,
    /// A connection that brings no byte for this long is dropped and tried again.
    pub stall_timeout: Duration,
    /// Attempts in a row that bring nothing new before a fetch gives up.
    pub attempts: u32,
    /// Wait before the second attempt, doubled each time.
    pub backoff: Duration,
    /// The longest wait between attempts, whatever the server asks for.
    pub longest_wait: Duration,
    /// The Python that downloads packages.
    pub python: String,
    /// The proxy of `ALL_PROXY`, `HTTPS_PROXY` or `HTTP_PROXY`, except for the hosts in `NO_PROXY`.
    pub proxy: Option<ureq::Proxy>,
}

/// An access token; not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token as given by a user; `None` where nothing but white space is left.
    pub fn new(text: &str) -> Option<Self> {
        let text: String = text.split_whitespace().collect();
        (!text.is_empty()).then_some(Self(text))
    }

    pub(super) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl HubConfig {
    /// The settings that the process's environment asks for, proxies included.
    pub fn from_env() -> Self {
        let proxy = ureq::Proxy::try_from_env();
        // Where HOME is not set, the system's list of users may know it.
        let home = || std::env::home_dir()?.into_os_string().into_string().ok();
        let var = |name: &str| {
            std::env::var(name).ok().or_else(|| if name == "HOME" { home() } else { None })
        };
        Self { proxy, ..Self::from_vars(var) }
    }

    /// The settings for these variables, which mean what they mean to `huggingface_hub`:
    /// `HF_ENDPOINT`, `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN`, `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME`, `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`, `HF_HUB_DISABLE_SYMLINKS`,
    /// `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT` (seconds); and two of bevel's own,
    /// `BEVEL_CACHE` and `BEVEL_PYTHON`. An empty variable is one that is not set.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let home = PathBuf::from(var("HOME").or_else(|| var("USERPROFILE")).unwrap_or_default());
        let path = |name: &str| var(name).map(|value| expand(&value, &home));
        let is_true = |name: &str| {
            var(name).is_some_and(|value| {
                ["1", "on", "yes", "true"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
            })
        };
        let seconds = |name: &str| {
            let value = var(name)?.trim().parse().ok()?;
            Some(Duration::from_secs(value))
        };

        let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache"));
        let hf_home = path("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| hf_home.join("hub"));
        let token = || {
            if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
                return None;
            }
            if let Some(text) = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")) {
                return Token::new(&text);
            }
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
            Token::new(&std::fs::read_to_string(file).ok()?)
        };
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let python = if cfg!(windows) { "python" } else { "python3" };
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token(),
            cache,
            bevel_cache: path("BEVEL_CACHE").unwrap_or_else(|| caches.join("bevel")),
            offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
            symlinks: !is_true("HF_HUB_DISABLE_SYMLINKS"),
            connect_timeout: seconds("HF_HUB_ETAG_TIMEOUT").unwrap_or(Duration::from_secs(10)),
            stall_timeout: seconds("HF_HUB_DOWNLOAD_TIMEOUT").unwrap_or(Duration::from_secs(30)),
            attempts: 5,
            backoff: Duration::from_secs(1),
            longest_wait: Duration::from_secs(60),
            python: var("BEVEL_PYTHON").unwrap_or_else(|| python.to_owned()),
            proxy: None,
        }
    }
}

/// A leading `~` is the home directory, as in a shell.
fn expand(value: &str, home: &Path) -> PathBuf {
    match value.strip_prefix('~') {
        Some("") => home.to_owned(),
        Some(rest) if rest.starts_with('/') => home.join(&rest[1..]),
        _ => PathBuf::from(value),
    }
}
