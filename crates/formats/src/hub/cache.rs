//! The directories of one repository in the Hugging Face cache.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::repo::is_hex;
use super::select::Sibling;
use super::{Error, HubConfig, Progress, RepoId, Result};

pub(super) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
    symlinks: bool,
}

impl RepoCache {
    pub(super) fn new(config: &HubConfig, repo: &RepoId) -> Self {
        let name = format!("{}--{}", repo.kind().plural(), repo.id().replace('/', "--"));
        Self {
            root: config.cache.join(&name),
            locks: config.cache.join(".locks").join(name),
            symlinks: config.symlinks,
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// The commit that a branch or tag stood for when it was last fetched.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        let commit = text.trim();
        is_hex(commit, 40).then(|| commit.to_owned())
    }

    /// Remembers what a branch or tag stands for. A commit needs no ref.
    pub(super) fn set_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        // No two writers, in this process or another, share a temporary file.
        static WRITES: AtomicU32 = AtomicU32::new(0);
        let (process, write) = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
        let new = path.with_added_extension(format!("{process}-{write}.new"));
        fs::write(&new, commit).map_err(Error::io("write", &new, commit.len() as u64))?;
        fs::rename(&new, &path).map_err(Error::io("write", &path, 0))
    }

    /// Makes a blob appear in a snapshot. `is_new` says that no other snapshot can be using it, so
    /// that where links are refused it is moved instead of copied.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str, is_new: bool) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        let blob = self.blob(etag);
        create_parent(&pointer)?;
        if fs::symlink_metadata(&pointer).is_ok() {
            fs::remove_file(&pointer).map_err(Error::io("replace", &pointer, 0))?;
        }
        let up = "../".repeat(2 + file.matches('/').count());
        if self.symlinks {
            match symlink(Path::new(&format!("{up}blobs/{etag}")), &pointer) {
                Ok(()) => return Ok(()),
                // Another process was faster; the link says the same.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
                Err(_) => {}
            }
        }
        if is_new {
            return fs::rename(&blob, &pointer).map_err(Error::io("write", &pointer, 0));
        }
        let bytes = fs::metadata(&blob).map_or(0, |data| data.len());
        let new = pointer.with_added_extension("new");
        fs::copy(&blob, &new)
            .and_then(|_| fs::rename(&new, &pointer))
            .map_err(Error::io("copy to", &pointer, bytes))
    }

    /// Waits until no other process writes this blob. Dropping the file frees the lock.
    pub(super) fn lock(&self, etag: &str, file: &str, progress: &mut dyn Progress) -> Result<File> {
        lock(&self.locks.join(format!("{etag}.lock")), file, progress)
    }
}

/// Holds an advisory lock on a file that is made for this purpose. Where a file system knows no
/// locks there is none: two processes then cost bandwidth, and the checksum guards the bytes.
pub(super) fn lock(path: &Path, what: &str, progress: &mut dyn Progress) -> Result<File> {
    create_parent(path)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::io("open the lock", path, 0))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            progress.note(&format!("Another process is fetching `{what}`; waiting for it."));
            file.lock().map_err(Error::io("wait for the lock", path, 0))?;
        }
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    Ok(file)
}

pub(super) fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io("create", parent, 0))
}

/// The files below a directory that can be read, with `/` in their relative paths.
pub(super) fn files_below(directory: &Path) -> Vec<Sibling> {
    fn walk(directory: &Path, prefix: &str, depth: usize, found: &mut Vec<Sibling>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            // Follows the link: one without its blob is no file.
            let Ok(data) = fs::metadata(entry.path()) else { continue };
            let path = format!("{prefix}{name}");
            if !data.is_dir() {
                found.push(Sibling { path, size: Some(data.len()) });
            } else if depth > 0 {
                walk(&entry.path(), &format!("{path}/"), depth - 1, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(directory, "", 8, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target.to_string_lossy().replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}
