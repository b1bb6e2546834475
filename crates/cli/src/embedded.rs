//! The model inside the binary: tiny-austen, unpacked where files are needed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bevel_formats::AtomicFile;

/// What users call it.
pub(crate) const NAME: &str = "tiny-austen";

macro_rules! files {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../../assets/tiny-austen/", $name)).as_slice())),*]
    };
}

/// Its files: names and contents.
const FILES: [(&str, &[u8]); 5] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json"
];

/// Unpacks the model below bevel's cache, or in the system's temporary directory where the cache
/// cannot be written, and returns its directory. Files that are there already are compared byte for
/// byte, so that a damaged copy heals.
pub(crate) fn unpack(bevel_cache: &Path) -> Result<PathBuf> {
    let cached = bevel_cache.join("embedded").join(NAME);
    let Err(refused) = unpack_into(&cached) else { return Ok(cached) };
    let temporary = std::env::temp_dir().join(format!("bevel-{NAME}"));
    match unpack_into(&temporary) {
        Ok(()) => Ok(temporary),
        Err(_) => Err(refused),
    }
}

fn unpack_into(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .with_context(|| format!("cannot unpack the embedded model into `{}`", dir.display()))?;
    for (name, content) in FILES {
        let path = dir.join(name);
        let same_size = fs::metadata(&path).is_ok_and(|m| m.len() == content.len() as u64);
        if same_size && fs::read(&path).is_ok_and(|found| found == content) {
            continue;
        }
        let mut file = AtomicFile::create(&path)?;
        file.write_all(content).with_context(|| format!("cannot write `{}`", path.display()))?;
        file.finish()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_copy_heals() {
        let cache = tempfile::tempdir().unwrap();
        let dir = unpack(cache.path()).unwrap();
        assert!(dir.starts_with(cache.path()));
        let config = dir.join("config.json");
        let content = fs::read(&config).unwrap();
        let mut damaged = content.clone();
        damaged[0] ^= 1;
        fs::write(&config, damaged).unwrap();
        assert_eq!(unpack(cache.path()).unwrap(), dir);
        assert_eq!(fs::read(&config).unwrap(), content);
    }
}
