//! Where an output comes from: what it carries, so that the run can be repeated to the byte.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bevel_formats::gguf::Metadata;
use bevel_model::Checkpoint;
use indexmap::IndexMap;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::progress::{Meter, OnProgress, Stage};
use crate::{Error, Recipe, Result};

/// The version that outputs carry.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const RECIPE_KEY: &str = "bevel.recipe";
const SHA256_KEY: &str = "bevel.source.sha256";
const VERSION_KEY: &str = "bevel.version";

/// Recipe, source and version of an output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// The recipe, as TOML.
    pub recipe: String,
    /// SHA-256 of the source in hexadecimal digits. Of one file it is what `sha256sum FILE` prints;
    /// of several, what `sha256sum FILES | sha256sum` prints in their directory, for
    /// `config.json`, the tokenizer's files and the weights, in the order of their names. Where tensors are
    /// replaced or adapters merged, it is that of a text: this hash, a line for each of these tensors with its values'
    /// hash and its name, and one for each adapter with its own and its scale.
    pub source_sha256: String,
    /// Version of bevel.
    pub version: String,
}

impl Provenance {
    /// Hashes a model's files, one after the other.
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Self> {
        Ok(Self {
            recipe: recipe.to_string(),
            source_sha256: hash_all(checkpoint, on_progress)?,
            version: VERSION.to_owned(),
        })
    }

    /// What a GGUF file says about itself. `None` where bevel did not write it.
    pub(crate) fn from_gguf(metadata: &Metadata) -> Option<Self> {
        Self::read(|key| metadata.get(key)?.as_str())
    }

    /// What safetensors files say about themselves.
    pub(crate) fn from_safetensors(metadata: &IndexMap<String, String>) -> Option<Self> {
        Self::read(|key| metadata.get(key).map(String::as_str))
    }

    fn read<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let get = |key: &str| get(key).map(str::to_owned);
        Some(Self {
            recipe: get(RECIPE_KEY)?,
            source_sha256: get(SHA256_KEY)?,
            version: get(VERSION_KEY)?,
        })
    }

    /// Keys and values.
    pub(crate) fn pairs(&self) -> [(&'static str, &str); 3] {
        [
            (RECIPE_KEY, &self.recipe),
            (SHA256_KEY, &self.source_sha256),
            (VERSION_KEY, &self.version),
        ]
    }
}

/// The files that a model's weights, configuration and tokenizer are read from, by name.
pub(crate) fn source_files(checkpoint: &Checkpoint) -> Vec<PathBuf> {
    let mut files = checkpoint.weight_files().to_vec();
    let Some(dir) = checkpoint.hf_dir() else { return files };
    let side = ["config.json", "tokenizer.json", "tokenizer_config.json"];
    files.extend(side.iter().map(|name| dir.join(name)).filter(|path| path.is_file()));
    files.sort();
    files
}

/// Hashes the model's files and those of the adapters that are merged into it.
fn hash_all(checkpoint: &Checkpoint, on_progress: &mut OnProgress<'_>) -> Result<String> {
    let mut list = hash(&source_files(checkpoint), on_progress)?;
    let seed = checkpoint.random_seed();
    if seed.is_none() && checkpoint.replacements().is_empty() && checkpoint.adapters().is_empty() {
        return Ok(list);
    }
    list += &seed.map_or(String::new(), |seed| format!("\nrandom weights, seed {seed}"));
    for (name, values) in checkpoint.replacements() {
        let values = hexadecimal(&Sha256::digest(bytemuck::cast_slice::<f32, u8>(values)));
        list += &format!("\n{values}  {name}");
    }
    for (adapter, scale) in checkpoint.adapters() {
        list += &format!("\n{}  {scale}", hash(adapter.files(), on_progress)?);
    }
    Ok(hexadecimal(&Sha256::digest(list.as_bytes())))
}

fn hash(files: &[PathBuf], on_progress: &mut OnProgress<'_>) -> Result<String> {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
    let total = files.iter().map(size).sum();
    let mut meter = Meter { stage: Stage::Hash, done: 0, total, on_progress };
    let mut list = String::new();
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let digest = hash_file(path, &name, &mut meter)?;
        if files.len() == 1 {
            return Ok(digest);
        }
        list += &format!("{digest}  {name}\n");
    }
    Ok(hexadecimal(&Sha256::digest(list.as_bytes())))
}

fn hash_file(path: &Path, name: &str, meter: &mut Meter<'_, '_>) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let len = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if len == 0 {
            return Ok(hexadecimal(&hasher.finalize()));
        }
        hasher.update(&buffer[..len]);
        meter.advance(name, len)?;
    }
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
