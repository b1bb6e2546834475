use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Error, Result};

/// A file that appears under its name only when it is complete.
///
/// Bytes go to `NAME.PROCESS-COUNT.partial` in the same directory. [`AtomicFile::finish`] syncs
/// them to the disk and renames the file over NAME. Dropped before that, the partial file is
/// removed and whatever NAME held stays as it was. A process that is killed leaves a `.partial`
/// file behind, which nothing takes for a model and which may be deleted.
///
/// ```
/// use std::io::Write;
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("report.html");
/// let mut file = bevel_formats::AtomicFile::create(&path)?;
/// file.write_all(b"<html>")?;
/// assert!(!path.exists());
/// file.finish()?;
/// assert_eq!(std::fs::read(&path)?, b"<html>");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    /// None once the bytes are on the disk.
    file: Option<BufWriter<File>>,
    partial: PathBuf,
    path: PathBuf,
}

/// Tells apart the partial files of one process.
static COUNT: AtomicUsize = AtomicUsize::new(0);

impl AtomicFile {
    /// Creates the partial file beside `path`.
    ///
    /// # Errors
    /// [`Error::Unwritable`] where the directory of `path` does not exist, and [`Error::Io`] where it
    /// cannot be written or `path` is a directory itself.
    pub fn create(path: &Path) -> Result<Self> {
        let refused = |kind: io::ErrorKind| Error::io("write", path)(kind.into());
        let name = path.file_name().ok_or_else(|| refused(io::ErrorKind::IsADirectory))?;
        if path.is_dir() {
            return Err(refused(io::ErrorKind::IsADirectory));
        }
        let directory = directory_of(path);
        if !directory.is_dir() {
            let reason =
                format!("there is no directory `{}`; create it first", directory.display());
            return Err(Error::Unwritable { path: path.to_owned(), reason });
        }
        let (partial, file) = loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let mut partial_name = name.to_owned();
            partial_name.push(format!(".{}-{count}.partial", std::process::id()));
            let partial = path.with_file_name(partial_name);
            match OpenOptions::new().write(true).create_new(true).open(&partial) {
                // A process that was killed had the same number: in a container all have few.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                opened => break (partial, opened.map_err(Error::io("create", path))?),
            }
        };
        let file = BufWriter::with_capacity(1 << 18, file);
        Ok(Self { file: Some(file), partial, path: path.to_owned() })
    }

    /// The name under which the file is going to appear.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs the bytes to the disk and renames the file into place.
    ///
    /// # Errors
    /// [`Error::Io`]; the partial file is removed then.
    pub fn finish(mut self) -> Result<()> {
        self.seal()?;
        self.publish()
    }

    /// Writes out what is buffered, syncs and closes. The file keeps its partial name.
    pub(crate) fn seal(&mut self) -> Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        file.into_inner()
            .map_err(io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(Error::io("write", &self.path))
    }

    /// Renames a sealed file into place.
    pub(crate) fn publish(mut self) -> Result<()> {
        fs::rename(&self.partial, &self.path).map_err(Error::io("write", &self.path))?;
        // Nothing is left for `drop` to remove.
        let partial = std::mem::take(&mut self.partial);
        sync_directory_of(&partial);
        Ok(())
    }

    /// Extends the file with zeros to `len` bytes.
    pub(crate) fn extend_to(&mut self, len: u64) -> io::Result<()> {
        let file = self.file.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        file.flush()?;
        file.get_ref().set_len(len)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.seek(position)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.partial.as_os_str().is_empty() {
            return;
        }
        // What is buffered must not be written to a file that is going away.
        if let Some(file) = self.file.take() {
            drop(file.into_parts());
        }
        let _ = fs::remove_file(&self.partial);
    }
}

/// The directory that a path lies in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a rename survive a power failure, where the system can do that.
fn sync_directory_of(path: &Path) {
    #[cfg(unix)]
    {
        if let Ok(directory) = File::open(directory_of(path)) {
            let _ = directory.sync_all();
        }
    }
    #[cfg(not(unix))]
    let _ = path;
}
