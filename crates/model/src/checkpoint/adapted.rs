//! A checkpoint with other weights than its files: tensors that were trained in the place of its own, and adapters merged
//! into it, `W + s B A` in the place of `W`; both in f32.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use bevel_base::DType;
use indexmap::IndexMap;

use super::{Checkpoint, Entry};
use crate::{AdapterFile, Result};

/// What changes a checkpoint, and the entries of the tensors that it changes as the files have them.
#[derive(Debug, Default)]
pub(super) struct Adapted {
    /// Weights are random, of this seed.
    pub(super) random: Option<u64>,
    replaced: IndexMap<String, Arc<[f32]>>,
    adapters: Vec<(Arc<AdapterFile>, f32)>,
    stored: IndexMap<String, Entry>,
}

impl Adapted {
    /// Whether anything is changed.
    pub(super) fn is_some(&self) -> bool {
        !self.stored.is_empty()
    }

    /// A changed tensor's entry, as the files have it.
    pub(super) fn stored(&self, name: &str) -> Option<&Entry> {
        self.stored.get(name)
    }
}

impl Checkpoint {
    /// The same model with an adapter merged into it: W + `scale` (W′ − W), with W′ what the adapter makes of W. Weights that
    /// it changes are read in f32.
    ///
    /// # Panics
    /// Where the adapter is one of another model, and where the checkpoint is rotated.
    pub fn adapted(mut self, adapter: Arc<AdapterFile>, scale: f32) -> Self {
        assert!(self.rotated.is_none(), "an adapter's inputs are not rotated");
        let names = adapter.matrices().keys().chain(adapter.tensors().keys());
        names.for_each(|name| self.change(name));
        self.adapted.adapters.push((adapter, scale));
        self
    }

    /// The same model with other values in the place of some tensors', which are read in f32.
    ///
    /// # Panics
    /// Where there is no such tensor or one of another size, and where the checkpoint is rotated.
    pub fn replaced(mut self, tensors: impl IntoIterator<Item = (String, Arc<[f32]>)>) -> Self {
        assert!(self.rotated.is_none(), "the new values are not rotated");
        for (name, values) in tensors {
            assert_eq!(values.len(), self.tensors[&name].shape.len(), "values of `{name}`");
            self.change(&name);
            self.adapted.replaced.insert(name, values);
        }
        self
    }

    /// From here on the tensor is another one than that of the files.
    pub(super) fn change(&mut self, name: &str) {
        let entry = &mut self.tensors[name];
        if !self.adapted.stored.contains_key(name) {
            self.adapted.stored.insert(name.to_owned(), entry.clone());
            entry.dtype = DType::F32;
        }
    }

    /// The type of a tensor in the files, also where it was [replaced](Checkpoint::replaced).
    pub fn file_dtype(&self, name: &str) -> DType {
        self.adapted.stored(name).map_or_else(|| self.stored_dtype(name), |entry| entry.dtype)
    }

    /// The seed of its weights, where they are [random](Checkpoint::with_random_weights).
    pub fn random_seed(&self) -> Option<u64> {
        self.adapted.random
    }

    /// The tensors that have other values than in the files, adapters not counted.
    pub fn replacements(&self) -> &IndexMap<String, Arc<[f32]>> {
        &self.adapted.replaced
    }

    /// The adapters that were merged into it, and how much each counts.
    pub fn adapters(&self) -> &[(Arc<AdapterFile>, f32)] {
        &self.adapted.adapters
    }

    /// Opens the same files again, with the same changes.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn reopened(&self) -> Result<Self> {
        let path = PathBuf::from(&self.path);
        let mut opened =
            if self.weight_files().is_empty() { Self::blank(&path)? } else { Self::open(&path)? };
        if let Some(seed) = self.adapted.random {
            opened = opened.with_random_weights(seed);
        }
        let opened = opened.replaced(self.adapted.replaced.clone());
        let adapters = self.adapted.adapters.iter();
        Ok(adapters.fold(opened, |model, (file, scale)| model.adapted(file.clone(), *scale)))
    }

    /// A tensor's bytes as they were changed.
    pub(super) fn read_adapted(&self, name: &str, stored: &Entry) -> Result<Cow<'_, [u8]>> {
        let mut values = match self.adapted.replaced.get(name) {
            Some(values) => values.to_vec(),
            None if let Some(seed) = self.adapted.random => self.random(name, seed),
            None => self.unpack(name, stored, &self.read_stored(name, stored)?)?,
        };
        let w = values.clone();
        for (adapter, scale) in &self.adapted.adapters {
            if let Some(matrix) = adapter.matrices().get(name) {
                matrix.add_to(&w, &mut values, *scale);
            }
            match adapter.tensors().get(name) {
                Some(tensor) if *scale == 1.0 && values == w => values.copy_from_slice(tensor),
                Some(tensor) => {
                    let moves = values.iter_mut().zip(tensor.iter().zip(&w));
                    moves.for_each(|(value, (tensor, w))| *value += scale * (tensor - w));
                }
                None => {}
            }
        }
        Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into())
    }
}
