use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;

use super::cache::{RepoCache, create_parent};
use super::checksum::Checksum;
use super::client::{Client, Failure, Head};
use super::{Error, Progress, RepoId, Result};

/// A repository at one commit, with the cache its files go to.
pub(super) struct Source<'a> {
    pub(super) client: &'a Client<'a>,
    pub(super) cache: &'a RepoCache,
    pub(super) repo: &'a RepoId,
    pub(super) commit: &'a str,
}

/// Wrong bytes are fetched once more; the second time is an error.
const WRONG_LIMIT: u32 = 2;

impl Source<'_> {
    /// Brings one file into the snapshot, unless it is there.
    pub(super) fn file(
        &self,
        file: &str,
        pin: Option<&str>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let pointer = self.cache.snapshot(self.commit).join(file);
        if pointer.exists() {
            return Ok(());
        }
        let head = self.client.head(self.repo, self.commit, file, progress)?;
        if let Some(expected) = pin.filter(|pin| *pin != head.etag) {
            return Err(Error::Differs {
                file: file.to_owned(),
                expected: expected.to_owned(),
                found: head.etag,
            });
        }
        let _lock = self.cache.lock(&head.etag, file, progress)?;
        if pointer.exists() {
            return Ok(());
        }
        let blob = self.cache.blob(&head.etag);
        let is_new = !blob.exists();
        if is_new {
            let partial = self.download(file, &head, progress)?;
            fs::rename(&partial, &blob).map_err(Error::io("write", &blob, 0))?;
        }
        self.cache.link(self.commit, file, &head.etag, is_new)
    }

    /// Fetches a file's bytes beside its blob, continuing what is there; returns the path of the
    /// complete, checked file.
    fn download(&self, file: &str, head: &Head, progress: &mut dyn Progress) -> Result<PathBuf> {
        let path = self.cache.blob(&format!("{}.incomplete", head.etag));
        let mut partial = Partial::open(path, head)?;
        let mut patience = self.client.patience(file, self.client.attempts());
        let mut furthest = partial.len;
        let mut wrong = 0;
        if matches!(partial.checksum, Checksum::Unknown) {
            progress
                .note(&format!("The hub gives no checksum for `{file}`; its length is checked."));
        }
        progress.start(file, Some(head.size), partial.len);
        loop {
            let ended = match partial.len == head.size {
                true => Ok(()),
                false => self.continue_file(file, &mut partial, progress),
            };
            let why = match ended {
                Ok(()) => match partial.verdict() {
                    None => break,
                    Some(why) => why,
                },
                Err(Ended::Wrong(why)) => why,
                Err(Ended::Failed(failure)) => {
                    patience.wait(failure, partial.len > furthest, progress)?;
                    furthest = furthest.max(partial.len);
                    continue;
                }
            };
            wrong += 1;
            if wrong == WRONG_LIMIT {
                fs::remove_file(&partial.path).map_err(Error::io("remove", &partial.path, 0))?;
                return Err(Error::WrongBytes { file: file.to_owned(), why });
            }
            progress.note(&format!("`{file}`: {why}; fetching it again from the beginning."));
            partial.restart()?;
            progress.start(file, Some(head.size), 0);
        }
        partial.file.sync_all().map_err(Error::io("write", &partial.path, 0))?;
        progress.finish();
        Ok(partial.path)
    }

    /// One connection: appends what it brings.
    fn continue_file(
        &self,
        file: &str,
        partial: &mut Partial,
        progress: &mut dyn Progress,
    ) -> Result<(), Ended> {
        let size = partial.size;
        let Some((skipped, body)) = self.client.get(self.repo, self.commit, file, partial.len)?
        else {
            return Err(Ended::Wrong(format!(
                "the server has nothing after byte {}, expected {size} bytes",
                partial.len
            )));
        };
        if skipped != partial.len {
            partial.restart()?;
            progress.start(file, Some(size), 0);
        }
        let mut reader = body.into_reader();
        let mut buffer = vec![0; 128 << 10];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) if partial.len == size => return Ok(()),
                Ok(0) => {
                    let why = format!("the connection ended after {} of {size} bytes", partial.len);
                    return Err(Failure::retry(why).into());
                }
                Ok(n) => n,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    let why = format!("{error} after {} of {size} bytes", partial.len);
                    return Err(Failure::retry(why).into());
                }
            };
            if n as u64 > size - partial.len {
                return Err(Ended::Wrong(format!("more than the {size} bytes announced")));
            }
            partial.append(&buffer[..n])?;
            progress.advance(n as u64);
        }
    }
}

/// Why a connection did not complete the file.
enum Ended {
    Failed(Failure),
    Wrong(String),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Ended::Failed(failure)
    }
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Ended::Failed(error.into())
    }
}

/// A file that is arriving, with the checksum of what came so far.
struct Partial {
    path: PathBuf,
    file: File,
    etag: String,
    /// Bytes announced.
    size: u64,
    /// Bytes here.
    len: u64,
    checksum: Checksum,
}

impl Partial {
    /// Opens what an earlier attempt left, or an empty file.
    fn open(path: PathBuf, head: &Head) -> Result<Self> {
        create_parent(&path)?;
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(Error::io("write", &path, head.size))?;
        let len = file.metadata().map_err(Error::io("read", &path, 0))?.len();
        let checksum = Checksum::for_etag(&head.etag, head.size);
        let mut partial =
            Self { path, file, etag: head.etag.clone(), size: head.size, len, checksum };
        if len > head.size {
            partial.restart()?;
        } else if len > 0 {
            let read = partial.checksum.update_from(&partial.file);
            partial.len = read.map_err(Error::io("read", &partial.path, 0))?;
        }
        Ok(partial)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let missing = self.size - self.len;
        self.file.write_all(bytes).map_err(Error::io("write", &self.path, missing))?;
        self.checksum.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("write", &self.path, self.size))?;
        self.len = 0;
        self.checksum = Checksum::for_etag(&self.etag, self.size);
        Ok(())
    }

    /// `None` where the bytes are the announced ones, else what is wrong with them.
    fn verdict(&mut self) -> Option<String> {
        let checksum = std::mem::replace(&mut self.checksum, Checksum::Unknown);
        let (name, found) = checksum.finish()?;
        let expected = self.etag.to_ascii_lowercase();
        (found != expected).then(|| format!("its {name} is {found}, expected {expected}"))
    }
}
