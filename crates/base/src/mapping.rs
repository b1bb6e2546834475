use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;

use crate::{Error, Result};

/// A file mapped read-only into memory. Pages are loaded on first touch and can be given back.
#[derive(Debug)]
pub struct Mapping {
    map: memmap2::Mmap,
}

impl Mapping {
    /// Maps the whole file.
    ///
    /// # Errors
    /// [`Error::Io`] where the path is no regular file, or it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.display().to_string(), source };
        // Asked before opening, which waits for a writer where the path is a pipe.
        let kind = std::fs::metadata(path).map_err(io)?.file_type();
        if kind.is_dir() {
            return Err(io(ErrorKind::IsADirectory.into()));
        }
        if !kind.is_file() {
            return Err(io(std::io::Error::new(
                ErrorKind::InvalidInput,
                "it is a pipe or a device, which cannot be mapped; copy its content to a file",
            )));
        }
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is read-only. A file truncated by another process while it is mapped
        // raises SIGBUS, as in every program that maps model files; writers here rename into place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self { map })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Tells the system that the pages inside `range` will not be needed soon, so that they stop
    /// counting as resident memory. They are read again on the next touch.
    pub fn release(&self, range: Range<usize>) {
        let page = page_size();
        let start = range.start.next_multiple_of(page);
        let end = range.end.min(self.map.len()) / page * page;
        if start < end {
            #[cfg(unix)]
            // SAFETY: a read-only file mapping loses nothing by dropping its resident pages.
            let _ = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    start,
                    end - start,
                )
            };
        }
    }
}

pub(crate) fn page_size() -> usize {
    #[cfg(unix)]
    // SAFETY: `sysconf` has no preconditions.
    let size = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    #[cfg(not(unix))]
    let size = 4096;
    size
}
