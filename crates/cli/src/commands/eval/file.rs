use std::path::{Path, PathBuf};

use anyhow::Result;
use bevel_compress::Provenance;
use serde::Serialize;

/// What the measured model is, as a comparison over several of them needs to know it.
#[derive(Debug, Serialize)]
pub(crate) struct ModelFile {
    path: PathBuf,
    /// Bytes of the files with tensors.
    bytes: u64,
    parameters: u64,
    bits_per_weight: f64,
    /// Types of its tensors, the one with most bytes first.
    types: Vec<&'static str>,
    /// How bevel made it, where it did.
    provenance: Option<Provenance>,
}

impl ModelFile {
    /// Reads the headers of the model at `path`.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let found = bevel_compress::inspect(path)?;
        Ok(Self {
            path: found.path,
            bytes: found.file_bytes,
            parameters: found.parameters,
            bits_per_weight: found.bits_per_weight,
            types: found.types.iter().map(|summary| summary.dtype.name()).collect(),
            provenance: found.provenance,
        })
    }
}
