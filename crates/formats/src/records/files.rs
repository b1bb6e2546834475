//! The files of a directory of data, and their bytes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::wrong_file;
use super::zstd::Frames;
use crate::{Error, Result};

/// A file of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Where it lies; `-` is standard input.
    pub path: PathBuf,
    /// What it holds.
    pub kind: Kind,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One text.
    Text,
    /// An array of records, or one after another.
    Json,
    /// A record a line.
    JsonLines,
    /// A row a record, with the names of its members in the first one.
    Csv,
    /// Columns of text.
    Parquet,
}

/// What a directory holds, in the order of the paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Files whose names say what they hold.
    pub files: Vec<DataFile>,
    /// The others, but for hidden ones and those that describe the data.
    pub left_out: Vec<PathBuf>,
}

/// Directories in directories that are looked into.
const DEPTH: usize = 8;
/// The files that a directory may hold.
const MOST_FILES: usize = 100_000;
/// JSON files that describe a data set.
const DESCRIPTIONS: [&str; 5] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
];

/// The files of a directory and of those in it.
///
/// # Errors
/// Where it cannot be read, or holds no data.
pub fn directory(path: &Path) -> Result<Directory> {
    let mut found = Directory::default();
    walk(path, DEPTH, &mut found)?;
    match found.files.is_empty() {
        true => Err(wrong_file(path, "it has no .txt, .md, .jsonl, .json, .csv or .parquet files")),
        false => Ok(found),
    }
}

fn walk(directory: &Path, depth: usize, found: &mut Directory) -> Result<()> {
    let entries: std::io::Result<Vec<_>> =
        std::fs::read_dir(directory).and_then(|entries| entries.collect());
    let entries = entries.map_err(Error::io("read", directory))?;
    let mut paths: Vec<PathBuf> = entries.iter().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Ok(data) = std::fs::metadata(&path) else { continue };
        if name.starts_with('.') || describes(&name) {
            continue;
        }
        if data.is_dir() && depth > 0 {
            walk(&path, depth - 1, found)?;
        } else if data.is_file() {
            match kind(&path) {
                Some(kind) if kind != Kind::Text || !is_packed(&path) => {
                    found.files.push(DataFile { path, kind });
                }
                _ => found.left_out.push(path),
            }
        }
        if found.files.len() + found.left_out.len() > MOST_FILES {
            return Err(wrong_file(directory, format!("it has more than {MOST_FILES} files")));
        }
    }
    Ok(())
}

/// Whether a file of this name describes the data beside it and is none of it.
pub fn describes(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    DESCRIPTIONS.contains(&name.as_str())
        || ["readme", "license"].contains(&name.split('.').next().unwrap_or_default())
}

/// What a file's name says; `None` for a name that says nothing.
pub fn kind(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    match name.rsplit_once('.')?.1 {
        "txt" | "md" | "text" => Some(Kind::Text),
        "jsonl" | "ndjson" => Some(Kind::JsonLines),
        "json" => Some(Kind::Json),
        "csv" => Some(Kind::Csv),
        "parquet" => Some(Kind::Parquet),
        _ => None,
    }
}

/// Whether a name says that the file is packed by gzip or zstd.
pub fn is_packed(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz") || e.eq_ignore_ascii_case("zst"))
}

/// A whole text, without a byte order mark.
///
/// # Errors
/// Where it cannot be read, is packed, or is no UTF-8; that is named with its line.
pub fn text(path: &Path) -> Result<String> {
    if is_packed(path) {
        return Err(wrong_file(path, "packed text is not read; unpack it first"));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
        wrong_file(path, format!("line {line} is {NO_UTF8}"))
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// What to do about bytes that are none.
pub(super) const NO_UTF8: &str = "no UTF-8; convert the file, for example with `iconv -t utf-8`";

/// A file's bytes, unpacked where its name ends in `.gz` or `.zst`.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(std::io::stdin().lock()));
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    let reader: Box<dyn Read> = match extension.as_ref().and_then(|e| e.to_str()) {
        Some("gz") => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
        Some("zst") => {
            let frames = Frames::open(BufReader::new(file));
            Box::new(frames.map_err(|error| wrong_file(path, error.to_string()))?)
        }
        _ => Box::new(file),
    };
    Ok(Box::new(BufReader::with_capacity(256 << 10, reader)))
}
