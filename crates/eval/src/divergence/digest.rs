use std::fmt;

use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use sha2::{Digest, Sha256};

use crate::Result;

/// Tells models apart by what they compute: SHA-256 over the configuration and over name, shape, type
/// and bytes of every tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ModelDigest(pub(crate) [u8; 32]);

impl ModelDigest {
    /// Reads all tensors of `checkpoint`, several at once.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub fn of(checkpoint: &Checkpoint, cpu: &Cpu) -> Result<Self> {
        let tensors: Vec<_> = checkpoint.tensors().iter().collect();
        let mut digests: Vec<bevel_model::Result<[u8; 32]>> =
            tensors.iter().map(|_| Ok([0; 32])).collect();
        cpu.pool().run_chunks(&mut digests, 1, |i, digest| {
            let (name, entry) = tensors[i];
            digest[0] = checkpoint.read(name).map(|bytes| {
                let mut hasher = Sha256::new();
                hasher.update(format!("{name}\0{}\0{}\0", entry.shape, entry.dtype.name()));
                hasher.update(bytes);
                checkpoint.release(name);
                hasher.finalize().into()
            });
        });
        let mut hasher = Sha256::new();
        hasher.update(format!("{:?}", checkpoint.config()));
        for digest in digests {
            hasher.update(digest?);
        }
        Ok(Self(hasher.finalize().into()))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
