//! The files that a user's paths mean, and their bytes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::zstd::Frames;
use crate::{Error, Result};

/// Files of one kind.
#[derive(Debug, PartialEq)]
pub(super) enum Inputs {
    Text(Vec<PathBuf>),
    Records(Vec<PathBuf>),
}

/// What a file holds, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Json,
    JsonLines,
    Parquet,
}

/// Directories in directories that are looked into.
const DEPTH: usize = 8;
/// The files that a directory may hold.
const MOST_FILES: usize = 100_000;

impl Inputs {
    /// The files that `paths` mean. Of a directory these are its records if it has any, else its
    /// texts, in the order of their names.
    pub(super) fn find(paths: &[PathBuf]) -> Result<Self> {
        let mut found = Vec::new();
        for path in paths {
            let data = std::fs::metadata(path).map_err(Error::io("open", path))?;
            if data.is_dir() {
                found.extend(of_directory(path)?);
            } else if !data.is_file() {
                return Err(wrong(path, "it is no file and no directory"));
            } else if is_packed(path) && kind(path) == Some(Kind::Text) {
                return Err(wrong(path, "packed text is not read; unpack it first"));
            } else {
                // A name that says nothing is taken for text.
                found.push((kind(path).unwrap_or(Kind::Text), path.clone()));
            }
        }
        let texts = found.iter().filter(|(kind, _)| *kind == Kind::Text).count();
        if texts != 0 && texts != found.len() {
            let text = found.iter().find(|(kind, _)| *kind == Kind::Text).map(|(_, path)| path);
            return Err(wrong(
                text.unwrap_or(&paths[0]),
                "it is text, while other files hold records; give files of one kind",
            ));
        }
        let all_text = texts == found.len();
        let files = found.into_iter().map(|(_, path)| path).collect();
        Ok(if all_text { Self::Text(files) } else { Self::Records(files) })
    }
}

fn of_directory(directory: &Path) -> Result<Vec<(Kind, PathBuf)>> {
    let mut found = Vec::new();
    walk(directory, DEPTH, &mut found)?;
    if found.iter().any(|(kind, _)| *kind != Kind::Text) {
        found.retain(|(kind, _)| *kind != Kind::Text);
    }
    match found.is_empty() {
        true => Err(wrong(directory, "it has no .txt, .md, .jsonl, .json or .parquet files")),
        false => Ok(found),
    }
}

fn walk(directory: &Path, depth: usize, found: &mut Vec<(Kind, PathBuf)>) -> Result<()> {
    let read = Error::io("read", directory);
    let entries: std::io::Result<Vec<_>> =
        std::fs::read_dir(directory).and_then(|entries| entries.collect());
    let mut paths: Vec<PathBuf> = entries.map_err(read)?.iter().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(data) = std::fs::metadata(&path) else { continue };
        if data.is_dir() && depth > 0 {
            walk(&path, depth - 1, found)?;
        } else if data.is_file()
            && let Some(kind) = kind(&path)
            && !(kind == Kind::Text && is_packed(&path))
        {
            found.push((kind, path));
        }
        if found.len() > MOST_FILES {
            return Err(wrong(directory, &format!("it has more than {MOST_FILES} files")));
        }
    }
    Ok(())
}

fn wrong(path: &Path, reason: &str) -> Error {
    Error::Calibration { data: path.display().to_string(), reason: reason.to_owned() }
}

/// What a file's name says; `None` for a name that says nothing.
pub(super) fn kind(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    match name.rsplit_once('.')?.1 {
        "txt" | "md" | "text" => Some(Kind::Text),
        "jsonl" | "ndjson" => Some(Kind::JsonLines),
        "json" => Some(Kind::Json),
        "parquet" => Some(Kind::Parquet),
        _ => None,
    }
}

fn is_packed(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz") || e.eq_ignore_ascii_case("zst"))
}

/// A file's bytes, unpacked where its name ends in `.gz` or `.zst`.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    let reader: Box<dyn Read> = match extension.as_ref().and_then(|e| e.to_str()) {
        Some("gz") => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
        Some("zst") => {
            let frames = Frames::open(BufReader::new(file));
            Box::new(frames.map_err(|error| wrong(path, &error.to_string()))?)
        }
        _ => Box::new(file),
    };
    Ok(Box::new(BufReader::with_capacity(256 << 10, reader)))
}
