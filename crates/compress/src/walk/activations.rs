//! The residual stream of every calibration sequence, between two layers.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Residual streams `[tokens, dim]` of a number of sequences, in memory or, where they are more than
/// fits, in a file.
#[derive(Debug)]
pub(crate) struct Activations {
    /// Values of each sequence.
    lengths: Vec<usize>,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<Vec<f32>>),
    Spilled { file: File, path: PathBuf },
}

impl Activations {
    /// Room for sequences of so many values. Where they take more than `limit` bytes in all they lie
    /// in the file `spill`, which is made anew.
    pub(crate) fn new(lengths: Vec<usize>, limit: u64, spill: &Path) -> Result<Self> {
        let bytes = lengths.iter().map(|&len| 4 * len as u64).sum::<u64>();
        let store = if bytes <= limit {
            Store::Memory(vec![Vec::new(); lengths.len()])
        } else {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            let file = options.open(spill).map_err(Error::io("create", spill))?;
            Store::Spilled { file, path: spill.to_owned() }
        };
        Ok(Self { lengths, store })
    }

    /// Values of each sequence.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Sequences.
    pub(crate) fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Reads the stream of a sequence into `x`.
    pub(crate) fn read(&mut self, index: usize, x: &mut Vec<f32>) -> Result<()> {
        match &mut self.store {
            Store::Memory(streams) => {
                x.clear();
                x.extend_from_slice(&streams[index]);
            }
            Store::Spilled { file, path } => {
                let mut bytes = vec![0; 4 * self.lengths[index]];
                let at = offset(&self.lengths, index);
                file.seek(SeekFrom::Start(at))
                    .and_then(|_| file.read_exact(&mut bytes))
                    .map_err(Error::io("read", &*path))?;
                x.clear();
                x.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)));
            }
        }
        Ok(())
    }

    /// Keeps `x` as the stream of a sequence.
    pub(crate) fn write(&mut self, index: usize, x: &[f32]) -> Result<()> {
        assert_eq!(x.len(), self.lengths[index], "the stream of sequence {index}");
        match &mut self.store {
            Store::Memory(streams) => {
                streams[index].clear();
                streams[index].extend_from_slice(x);
            }
            Store::Spilled { file, path } => {
                let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                let at = offset(&self.lengths, index);
                file.seek(SeekFrom::Start(at))
                    .and_then(|_| file.write_all(&bytes))
                    .map_err(Error::io("write", &*path))?;
            }
        }
        Ok(())
    }

    /// Writes all streams to a file, one after the other.
    pub(crate) fn save(&mut self, path: &Path) -> Result<()> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut x = Vec::new();
        for index in 0..self.len() {
            self.read(index, &mut x)?;
            let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
            out.write_all(&bytes).map_err(Error::io("write", path))?;
        }
        let file = out.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
        file.sync_all().map_err(Error::io("write", path))
    }

    /// Reads what [`Activations::save`] wrote.
    pub(crate) fn load(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let mut input = BufReader::with_capacity(1 << 20, file);
        for index in 0..self.len() {
            let mut bytes = vec![0; 4 * self.lengths[index]];
            input.read_exact(&mut bytes).map_err(Error::io("read", path))?;
            let x: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            self.write(index, &x)?;
        }
        Ok(())
    }
}

impl Drop for Activations {
    fn drop(&mut self) {
        if let Store::Spilled { path, .. } = &self.store {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where a sequence's values begin in a file.
fn offset(lengths: &[usize], index: usize) -> u64 {
    lengths[..index].iter().map(|&len| 4 * len as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(limit: u64) {
        let dir = tempfile::tempdir().unwrap();
        let (spill, saved) = (dir.path().join("spill"), dir.path().join("saved"));
        let mut streams = Activations::new(vec![6, 3, 9], limit, &spill).unwrap();
        let values = |index: usize, shift: f32| -> Vec<f32> {
            (0..[6, 3, 9][index]).map(|i| (index * 10 + i) as f32 + shift).collect()
        };
        for index in [2, 0, 1] {
            streams.write(index, &values(index, 0.0)).unwrap();
        }
        streams.write(1, &values(1, 0.5)).unwrap();
        let mut x = Vec::new();
        streams.save(&saved).unwrap();
        streams.write(0, &values(0, 0.25)).unwrap();
        streams.read(0, &mut x).unwrap();
        assert_eq!(x, values(0, 0.25));
        streams.load(&saved).unwrap();
        for (index, shift) in [(0, 0.0), (1, 0.5), (2, 0.0)] {
            streams.read(index, &mut x).unwrap();
            assert_eq!(x, values(index, shift));
        }
        assert_eq!(spill.exists(), limit < 72);
        drop(streams);
        assert!(!spill.exists(), "nothing is left behind");
    }

    #[test]
    fn streams_are_kept_in_memory_and_in_a_file_alike() {
        check(72);
        check(71);
    }
}
