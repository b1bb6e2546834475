use std::collections::VecDeque;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::{AtomicFile, Error, Result};

/// One file that is going to be written: where everything goes is known before the first byte.
#[derive(Debug)]
pub(crate) struct ShardLayout {
    pub(crate) path: PathBuf,
    /// Everything before the tensor data.
    pub(crate) header: Vec<u8>,
    /// Tensors in the order in which their data will come, which need not be that of the offsets.
    pub(crate) tensors: VecDeque<Placement>,
    pub(crate) file_len: u64,
}

/// Where a tensor's bytes go.
#[derive(Debug)]
pub(crate) struct Placement {
    pub(crate) name: String,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) byte_len: u64,
}

/// Writes tensors as their data arrives, shard after shard, and renames all files at the end.
#[derive(Debug)]
pub(crate) struct TensorStream {
    path: PathBuf,
    /// The shard being written and those to come.
    shards: VecDeque<ShardLayout>,
    current: Option<AtomicFile>,
    /// Bytes of the first tensor of the first shard that have arrived.
    arrived: u64,
    sealed: Vec<AtomicFile>,
}

impl TensorStream {
    /// `path` names the whole in messages.
    pub(crate) fn new(path: &Path, shards: Vec<ShardLayout>) -> Result<Self> {
        let mut stream = Self {
            path: path.to_owned(),
            shards: shards.into(),
            current: None,
            arrived: 0,
            sealed: Vec::new(),
        };
        stream.advance()?;
        Ok(stream)
    }

    /// Takes the next bytes of tensor `name`, which must be the one whose turn it is.
    pub(crate) fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let wrong = |reason| Err(Error::Unwritable { path: self.path.clone(), reason });
        let due = self.shards.front().and_then(|shard| shard.tensors.front());
        let (Some(file), Some(due)) = (&mut self.current, due) else {
            return wrong(format!("no data of tensor `{name}` was expected"));
        };
        if due.name != name {
            return wrong(format!("expected data of tensor `{}`, got `{name}`", due.name));
        }
        let arrived = self.arrived + data.len() as u64;
        if arrived > due.byte_len {
            let total = due.byte_len;
            return wrong(format!("tensor `{name}` has {total} bytes, got at least {arrived}"));
        }
        if self.arrived == 0 {
            let position = SeekFrom::Start(due.offset);
            file.seek(position).map_err(Error::io("write", file.path()))?;
        }
        file.write_all(data).map_err(Error::io("write", file.path()))?;
        self.arrived = arrived;
        self.advance()
    }

    /// Syncs everything and renames the files into place, the first one last, so that a reader
    /// never finds a first shard without the others. Returns their names.
    pub(crate) fn finish(mut self) -> Result<Vec<PathBuf>> {
        if let Some(due) = self.shards.front().and_then(|shard| shard.tensors.front()) {
            let (name, total) = (&due.name, due.byte_len);
            let reason = format!("tensor `{name}` got {} of {total} bytes", self.arrived);
            return Err(Error::Unwritable { path: self.path, reason });
        }
        let paths = self.sealed.iter().map(|file| file.path().to_owned()).collect();
        while let Some(file) = self.sealed.pop() {
            file.publish()?;
        }
        Ok(paths)
    }

    /// Passes by complete tensors, seals complete files and opens the next one.
    fn advance(&mut self) -> Result<()> {
        while let Some(shard) = self.shards.front_mut() {
            let io = || Error::io("write", &shard.path);
            let file = match &mut self.current {
                Some(file) => file,
                None => {
                    let mut file = AtomicFile::create(&shard.path)?;
                    file.write_all(&shard.header).map_err(io())?;
                    shard.header = Vec::new();
                    self.current.insert(file)
                }
            };
            while shard.tensors.front().is_some_and(|tensor| tensor.byte_len == self.arrived) {
                shard.tensors.pop_front();
                self.arrived = 0;
            }
            if !shard.tensors.is_empty() {
                return Ok(());
            }
            file.extend_to(shard.file_len).map_err(io())?;
            file.seal()?;
            self.sealed.extend(self.current.take());
            self.shards.pop_front();
        }
        Ok(())
    }
}
