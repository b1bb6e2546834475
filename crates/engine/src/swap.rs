//! Blocks of preempted sequences, kept in a file until there is room again.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use bevel_kernels::KvPool;

use crate::scheduler::{Load, Save, SequenceId};

/// A file without a name, which is gone when the process is.
#[derive(Debug)]
pub(crate) struct SwapFile {
    file: File,
    /// Places in it, in blocks.
    capacity: usize,
    used: usize,
    /// Places that were used and are not any more.
    free: Vec<usize>,
    /// Where a sequence's blocks are, in their order.
    places: HashMap<SequenceId, Vec<usize>>,
    /// Room for a block.
    block: Vec<u8>,
}

impl SwapFile {
    /// A file in `directory` that grows up to `bytes`.
    pub(crate) fn new(directory: &Path, bytes: u64, pool: &KvPool) -> io::Result<Self> {
        let block = KvPool::bytes_per_block(pool.shape());
        Ok(Self {
            file: tempfile::tempfile_in(directory)?,
            capacity: usize::try_from(bytes).unwrap_or(usize::MAX) / block.max(1),
            used: 0,
            free: Vec::new(),
            places: HashMap::new(),
            block: vec![0; block],
        })
    }

    /// Keeps blocks; false where there is no room for them.
    ///
    /// # Errors
    /// Of the file. Nothing of the sequence is kept then.
    pub(crate) fn save(&mut self, pool: &KvPool, save: &Save) -> io::Result<bool> {
        // What is left of an earlier time was not wanted.
        self.discard(save.id);
        if save.blocks.len() > self.capacity - self.used + self.free.len() {
            return Ok(false);
        }
        let mut places = Vec::with_capacity(save.blocks.len());
        let mut result = Ok(());
        for &block in &save.blocks {
            let place = self.free.pop().unwrap_or(self.used);
            self.used = self.used.max(place + 1);
            places.push(place);
            pool.save_block(block, &mut self.block);
            result = self.go_to(place).and_then(|()| self.file.write_all(&self.block));
            if result.is_err() {
                break;
            }
        }
        match result {
            Ok(()) => {
                self.places.insert(save.id, places);
                Ok(true)
            }
            Err(error) => {
                self.free.extend(places);
                Err(error)
            }
        }
    }

    /// Brings blocks back, and gives up their places.
    ///
    /// # Errors
    /// Of the file.
    pub(crate) fn load(&mut self, pool: &mut KvPool, load: &Load) -> io::Result<()> {
        let places = self.places.remove(&load.id).expect("what is loaded was saved");
        let mut result = Ok(());
        for (&place, &block) in places[load.skip..].iter().zip(&load.blocks) {
            result = self.go_to(place).and_then(|()| self.file.read_exact(&mut self.block));
            if result.is_err() {
                break;
            }
            pool.load_block(block, &self.block);
        }
        self.free.extend(places);
        result
    }

    /// Gives up what is kept of a sequence, if anything is.
    pub(crate) fn discard(&mut self, id: SequenceId) {
        self.free.extend(self.places.remove(&id).unwrap_or_default());
    }

    /// Blocks that are kept.
    pub(crate) fn blocks(&self) -> usize {
        self.used - self.free.len()
    }

    fn go_to(&mut self, place: usize) -> io::Result<()> {
        let offset = place as u64 * self.block.len() as u64;
        self.file.seek(SeekFrom::Start(offset)).map(|_| ())
    }
}
