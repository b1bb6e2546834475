//! A checkpoint with adapters merged into it: `W + s B A` in the place of `W`, in f32.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use bevel_base::DType;
use indexmap::IndexMap;

use super::{Checkpoint, Entry};
use crate::{AdapterFile, Result};

/// What is merged into a checkpoint, and the entries of the tensors that it changes as the files have them.
#[derive(Debug, Default)]
pub(super) struct Adapted {
    adapters: Vec<(Arc<AdapterFile>, f32)>,
    stored: IndexMap<String, Entry>,
}

impl Adapted {
    /// A changed tensor's entry, as the files have it.
    pub(super) fn stored(&self, name: &str) -> Option<&Entry> {
        self.stored.get(name)
    }
}

impl Checkpoint {
    /// The same model with an adapter merged into it, which counts `scale` times what it was trained for. Weights
    /// that it changes are read in f32.
    ///
    /// # Panics
    /// Where the adapter is one of another model, and where the checkpoint is rotated.
    pub fn adapted(mut self, adapter: Arc<AdapterFile>, scale: f32) -> Self {
        assert!(self.rotated.is_none(), "an adapter's inputs are not rotated");
        for name in adapter.matrices().keys() {
            let entry = &mut self.tensors[name];
            if self.adapted.stored.contains_key(name) {
                continue;
            }
            self.adapted.stored.insert(name.clone(), entry.clone());
            entry.dtype = DType::F32;
        }
        self.adapted.adapters.push((adapter, scale));
        self
    }

    /// The adapters that were merged into it, and how much each counts.
    pub fn adapters(&self) -> &[(Arc<AdapterFile>, f32)] {
        &self.adapted.adapters
    }

    /// Opens the same files again, with the same adapters.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn reopened(&self) -> Result<Self> {
        let opened = Self::open(&PathBuf::from(&self.path))?;
        let adapters = self.adapted.adapters.iter();
        Ok(adapters.fold(opened, |model, (file, scale)| model.adapted(file.clone(), *scale)))
    }

    /// A tensor's bytes, with what adapters add to it.
    pub(super) fn read_adapted(&self, name: &str, stored: &Entry) -> Result<Cow<'_, [u8]>> {
        let mut values = self.unpack(name, stored, &self.read_stored(name, stored)?)?;
        for (adapter, scale) in &self.adapted.adapters {
            if let Some(matrix) = adapter.matrices().get(name) {
                matrix.add_to(&mut values, *scale);
            }
        }
        Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into())
    }
}
