//! What holds for every output: it replaces nothing by accident, fits on the disk, and appears when
//! it is complete.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// How an output is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// An output that exists is replaced.
    pub force: bool,
    /// What would be a warning is an error.
    pub strict: bool,
    /// Calibrated solvers also measure what rounding to nearest would have cost, for the report.
    pub compare: bool,
    /// What an unfinished run left is thrown away instead of taken up.
    pub restart: bool,
    /// Files are split so that each has at most so many bytes of tensors.
    pub shard_bytes: Option<u64>,
}

impl Options {
    /// Turns warnings into an error where `strict` asks for it.
    pub(crate) fn accept(&self, warnings: &[String]) -> Result<()> {
        if self.strict && !warnings.is_empty() {
            return Err(Error::Strict(warnings.to_vec()));
        }
        Ok(())
    }
}

/// Refuses an output that is one of the `sources`, or that exists and is not to be replaced.
pub(crate) fn may_write(out: &Path, sources: &[PathBuf], options: &Options) -> Result<()> {
    let existing = existing(out, options);
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let sources: Vec<PathBuf> = sources.iter().map(|path| real(path)).collect();
    let is_source = |path: &PathBuf| {
        let path = real(path);
        // A directory is the source where the source's files lie in it.
        sources.iter().any(|s| *s == path || s.parent() == Some(&path))
    };
    if existing.iter().any(is_source) {
        return Err(Error::OverwritesInput(out.to_owned()));
    }
    match existing.into_iter().next() {
        Some(path) if !options.force => Err(Error::Exists(path)),
        _ => Ok(()),
    }
}

/// What an output would replace: a file, a directory with something in it, and, where the output is
/// split, shards of the same name. An unsplit file may lie beside the shards it was joined from.
fn existing(out: &Path, options: &Options) -> Vec<PathBuf> {
    if out.is_dir() {
        let is_empty = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        return if is_empty { Vec::new() } else { vec![out.to_owned()] };
    }
    let mut found = Vec::new();
    if out.symlink_metadata().is_ok() {
        found.push(out.to_owned());
    }
    if options.shard_bytes.is_some() {
        found.extend(shards(out));
    }
    found
}

/// The shards that lie beside `out` and are named after it: `model-00001-of-00003.gguf`.
fn shards(out: &Path) -> Vec<PathBuf> {
    let (Some(stem), Some(extension)) = (out.file_stem(), out.extension()) else {
        return Vec::new();
    };
    let prefix = format!("{}-", stem.to_string_lossy());
    let suffix = format!(".{}", extension.to_string_lossy());
    let is_shard = |name: &str| {
        let middle = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(&suffix));
        let numbers = middle.and_then(|middle| middle.split_once("-of-"));
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        numbers.is_some_and(|(number, count)| digits(number) && digits(count))
    };
    let entries = std::fs::read_dir(directory_of(out)).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| is_shard(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Removes what `force` was to replace and the new files did not.
pub(crate) fn remove_stale(out: &Path, written: &[PathBuf], options: &Options) -> Result<()> {
    let is_new = |path: &PathBuf| written.iter().any(|new| new.file_name() == path.file_name());
    for path in existing(out, options).iter().filter(|path| !is_new(path)) {
        std::fs::remove_file(path).map_err(Error::io("remove", path))?;
    }
    Ok(())
}

/// Refuses to start what the disk cannot hold.
pub(crate) fn has_space(out: &Path, needed: u64) -> Result<()> {
    match free_bytes(directory_of(out)) {
        Some(available) if available < needed => {
            Err(Error::NoSpace { path: out.to_owned(), needed, available })
        }
        _ => Ok(()),
    }
}

/// Bytes that may still be written to the disk of a directory, where the system tells.
fn free_bytes(directory: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let disk = rustix::fs::statvfs(directory).ok()?;
        disk.f_bavail.checked_mul(disk.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = directory;
        None
    }
}

/// The directory that a path lies in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A directory that appears under its name when it is complete.
#[derive(Debug)]
pub(crate) struct AtomicDirectory {
    partial: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl AtomicDirectory {
    /// Creates `NAME.PROCESS-COUNT.partial` beside `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let refused = || Error::Target {
            path: path.to_owned(),
            reason: "it is no name for a directory".to_owned(),
        };
        let name = path.file_name().ok_or_else(refused)?;
        let directory = directory_of(path);
        if !directory.is_dir() {
            let reason =
                format!("there is no directory `{}`; create it first", directory.display());
            return Err(Error::Target { path: path.to_owned(), reason });
        }
        for count in 0.. {
            let mut partial = name.to_owned();
            partial.push(format!(".{}-{count}.partial", std::process::id()));
            let partial = path.with_file_name(partial);
            match std::fs::create_dir(&partial) {
                // A process that was killed had the same number: in a container all have few.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                created => {
                    created.map_err(Error::io("create", path))?;
                    return Ok(Self { partial, path: path.to_owned(), finished: false });
                }
            }
        }
        unreachable!("counting goes on until a name is free")
    }

    /// Where its files are written.
    pub(crate) fn workspace(&self) -> &Path {
        &self.partial
    }

    /// Moves it into place. What lies there is put aside first and removed last.
    pub(crate) fn finish(mut self) -> Result<()> {
        let mut aside = None;
        if self.path.exists() {
            let old = self.partial.with_extension("replaced");
            std::fs::rename(&self.path, &old).map_err(Error::io("replace", &self.path))?;
            aside = Some(old);
        }
        if let Err(error) = std::fs::rename(&self.partial, &self.path) {
            if let Some(old) = &aside {
                let _ = std::fs::rename(old, &self.path);
            }
            return Err(Error::io("write", &self.path)(error));
        }
        self.finished = true;
        match aside {
            Some(old) => std::fs::remove_dir_all(&old).map_err(Error::io("remove", &old)),
            None => Ok(()),
        }
    }
}

impl Drop for AtomicDirectory {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

/// The one directory inside a Hugging Face checkpoint.
pub(crate) const MORE_TEMPLATES: &str = "additional_chat_templates";

/// Refuses to replace anything but a model, so that `-o ~ --force` is an error and no loss: a
/// directory with a configuration and weights, and beside them what programs put there, what bevel
/// does, or what lies in the `source` directory too.
pub(crate) fn is_replaceable(out: &Path, source: Option<&Path>) -> Result<()> {
    let refuse = |reason: String| Err(Error::Target { path: out.to_owned(), reason });
    let Ok(entries) = std::fs::read_dir(out) else {
        return match out.is_file() {
            true => {
                refuse("it is a file, and a directory is written; choose another name".to_owned())
            }
            false => Ok(()),
        };
    };
    let mut names: Vec<String> =
        entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let is_weights =
        |name: &str| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    if !names.is_empty() && !names.iter().any(|name| name == "config.json") {
        let first = &names[0];
        return refuse(format!(
            "the directory holds `{first}` and no model, so it is not replaced; choose another one"
        ));
    }
    let is_part = |name: &String| {
        let path = out.join(name);
        let is_copied = source.is_some_and(|source| source.join(name).is_file());
        let is_known = is_weights(name) || SIDE_FILES.contains(&name.as_str());
        path.is_file() && (is_known || is_copied) || name == MORE_TEMPLATES
    };
    match names.iter().find(|name| !is_part(name)) {
        Some(other) => refuse(format!(
            "the directory holds `{other}`, which is no part of a model, so it is not replaced; choose another one"
        )),
        None => Ok(()),
    }
}

/// What lies in models' directories beside the weights.
const SIDE_FILES: [&str; 29] = [
    ".gitattributes",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "configuration.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
    "report.html",
    "report.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
