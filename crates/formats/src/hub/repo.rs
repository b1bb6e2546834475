use std::fmt;
use std::str::FromStr;

use super::{Error, Result};

/// A model on a hub: `owner/name`, with `@revision` (a branch, a tag or a commit) and, for GGUF
/// repositories, `:file.gguf` or a quantization such as `:Q4_K_M`.
///
/// ```
/// use bevel_formats::hub::RepoId;
/// let repo: RepoId = "owner/name@v1.0:Q4_K_M".parse()?;
/// assert_eq!((repo.id(), repo.revision()), ("owner/name", "v1.0"));
/// assert_eq!(repo.selection(), Some("Q4_K_M"));
/// # Ok::<(), bevel_formats::hub::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    kind: RepoKind,
    id: String,
    revision: Option<String>,
    selection: Option<String>,
}

/// What a repository holds: a hub keeps models and data sets apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RepoKind {
    Model,
    DataSet,
}

impl RepoKind {
    /// The first word of the directory in the cache, and of the address that lists the files.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::DataSet => "datasets",
        }
    }

    /// In words.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::DataSet => "data set",
        }
    }
}

impl RepoId {
    pub(super) fn kind(&self) -> RepoKind {
        self.kind
    }

    /// The same name among the data sets.
    pub(super) fn of_data_set(self) -> Self {
        Self { kind: RepoKind::DataSet, ..self }
    }

    /// The repository's page, relative to the hub's address.
    pub(super) fn page(&self) -> String {
        match self.kind {
            RepoKind::Model => self.id.clone(),
            RepoKind::DataSet => format!("datasets/{}", self.id),
        }
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit; `main` where none was given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The GGUF file's name, or the quantization that picks it; of a data set, the split.
    pub fn selection(&self) -> Option<&str> {
        self.selection.as_deref()
    }

    /// True where the revision is a full commit, which never changes its meaning.
    pub fn is_commit(&self) -> bool {
        is_hex(self.revision(), 40)
    }
}

impl FromStr for RepoId {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let bad = |why| Error::BadName { name: name.to_owned(), why };
        let (rest, selection) = match name.split_once(':') {
            Some((rest, selection)) => (rest, Some(selection)),
            None => (name, None),
        };
        let (id, revision) = match rest.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (rest, None),
        };
        let parts: Vec<&str> = id.split('/').collect();
        let [owner, model] = parts[..] else { return Err(bad("expected `owner/name`")) };
        if !is_name(owner) || !is_name(model) {
            return Err(bad(
                "owner and name are letters, digits, `-`, `_` and `.`, without `--` and `..`",
            ));
        }
        if revision.is_some_and(|r| !is_safe_path(r)) {
            return Err(bad("the part after `@` is no revision"));
        }
        if selection.is_some_and(|s| !is_safe_path(s)) {
            return Err(bad("the part after `:` is no file of a repository and no quantization"));
        }
        Ok(Self {
            kind: RepoKind::Model,
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
            selection: selection.map(str::to_owned),
        })
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(selection) = &self.selection {
            write!(f, ":{selection}")?;
        }
        Ok(())
    }
}

/// One half of `owner/name`, by the hub's own rules; `--` joins the two in the cache.
fn is_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edges = |c: char| matches!(c, '-' | '.');
    (1..=96).contains(&part.len())
        && part.chars().all(allowed)
        && !part.starts_with(edges)
        && !part.ends_with(edges)
        && !part.contains("--")
        && !part.contains("..")
}

/// A relative path with `/` between its parts that stays inside its directory on every system.
pub(super) fn is_safe_path(path: &str) -> bool {
    let safe =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !part.ends_with(['.', ' ']);
    path.split('/').all(safe)
        && !path.contains(['\\', ':', '*', '?', '"', '<', '>', '|'])
        && !path.chars().any(char::is_control)
}

/// True for `len` lower- or upper-case hexadecimal digits.
pub(super) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit())
}
