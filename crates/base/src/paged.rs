use std::ops::{Deref, DerefMut};
use std::path::Path;

use crate::{AlignedVec, Error, Result};

/// A fixed-length, zero-initialised buffer in memory, or in a file without a name, which the system writes out and reads
/// again as it needs memory: what is touched once in a while does not have to fit.
#[derive(Debug)]
pub struct PagedVec<T: bytemuck::Pod> {
    len: usize,
    place: Place<T>,
}

enum Place<T: bytemuck::Pod> {
    Memory(AlignedVec<T>),
    File(memmap2::MmapMut),
}

impl<T: bytemuck::Pod> std::fmt::Debug for Place<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Memory(_)) { "memory" } else { "file" })
    }
}

impl<T: bytemuck::Pod> PagedVec<T> {
    /// `len` zeros in memory.
    pub fn in_memory(len: usize) -> Self {
        Self { len, place: Place::Memory(AlignedVec::zeroed(len)) }
    }

    /// `len` zeros in a file of this directory, which has no name and is gone with the buffer.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be made, or the disk has no room for it.
    pub fn in_file(len: usize, directory: &Path) -> Result<Self> {
        let bytes = len * size_of::<T>();
        if bytes == 0 {
            return Ok(Self::in_memory(len));
        }
        let io = |source| Error::Io { path: directory.display().to_string(), source };
        let file = tempfile::tempfile_in(directory).map_err(io)?;
        reserve(&file, bytes as u64).map_err(io)?;
        // SAFETY: the file has no name, so that no other process maps or shortens it.
        let map = unsafe { memmap2::MmapMut::map_mut(&file) }.map_err(io)?;
        // It is gone through from the beginning to the end, once a step.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::Sequential);
        Ok(Self { len, place: Place::File(map) })
    }
}

/// Takes room on the disk, so that a disk that is full says so now and does not kill the process later.
fn reserve(file: &std::fs::File, bytes: u64) -> std::io::Result<()> {
    use std::io::Write;
    let zeros = vec![0; 1 << 20];
    let (mut file, mut left) = (file, bytes);
    while left > 0 {
        let part = left.min(zeros.len() as u64);
        file.write_all(&zeros[..part as usize])?;
        left -= part;
    }
    Ok(())
}

impl<T: bytemuck::Pod> Deref for PagedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.place {
            Place::Memory(values) => values,
            // A mapping begins at a page, and the file has so many values.
            Place::File(map) => &bytemuck::cast_slice(map)[..self.len],
        }
    }
}

impl<T: bytemuck::Pod> DerefMut for PagedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.place {
            Place::Memory(values) => values,
            Place::File(map) => &mut bytemuck::cast_slice_mut(map)[..self.len],
        }
    }
}
