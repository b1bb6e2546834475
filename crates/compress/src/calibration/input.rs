//! The files that a user's paths mean.

use std::path::{Path, PathBuf};

use bevel_formats::records::{self, DataFile, Kind};

use crate::{Error, Result};

/// Files of one kind.
#[derive(Debug, PartialEq)]
pub(super) enum Inputs {
    Text(Vec<PathBuf>),
    Records(Vec<DataFile>),
}

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
            } else if records::is_packed(path) && records::kind(path) == Some(Kind::Text) {
                return Err(wrong(path, "packed text is not read; unpack it first"));
            } else {
                // A name that says nothing is taken for text.
                let kind = records::kind(path).unwrap_or(Kind::Text);
                found.push(DataFile { path: path.clone(), kind });
            }
        }
        let (texts, records): (Vec<DataFile>, Vec<DataFile>) = found.into_iter().partition(is_text);
        match (texts.first(), records.is_empty()) {
            (Some(text), false) => Err(wrong(
                &text.path,
                "it is text, while other files hold records; give files of one kind",
            )),
            (Some(_), true) => Ok(Self::Text(texts.into_iter().map(|file| file.path).collect())),
            (None, _) => Ok(Self::Records(records)),
        }
    }
}

fn of_directory(directory: &Path) -> Result<Vec<DataFile>> {
    let mut found = records::directory(directory)?.files;
    if !found.iter().all(is_text) {
        found.retain(|file| !is_text(file));
    }
    Ok(found)
}

fn is_text(file: &DataFile) -> bool {
    file.kind == Kind::Text
}

fn wrong(path: &Path, reason: &str) -> Error {
    Error::Calibration { data: path.display().to_string(), reason: reason.to_owned() }
}
