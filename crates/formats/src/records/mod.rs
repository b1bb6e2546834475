//! Rows of data sets: JSON Lines, JSON, CSV and Parquet files, one record after another, and the files that a
//! directory of them holds. Lines may be packed by gzip or zstd. Bounded memory, however long a file is.

mod csv;
mod files;
mod json;
mod zstd;

use std::fmt;
use std::path::Path;

use serde_json::Value;

pub use files::{DataFile, Directory, Kind, describes, directory, is_packed, kind, text};
pub use json::lines_of;

use crate::parquet::ParquetFile;
use crate::{Error, Result};

/// The longest record.
const LONGEST: u64 = 64 << 20;

/// Where a record was found.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    path: &'a Path,
    unit: Unit,
    /// From 1 on.
    number: u64,
}

/// What a file's records are counted in.
#[derive(Clone, Copy, Debug)]
enum Unit {
    Line,
    Record,
    /// The names of CSV's columns are no row.
    Row,
}

impl Place<'_> {
    /// The error that a record there is not what it should be.
    pub fn wrong(&self, reason: impl Into<String>) -> Error {
        Error::Record { place: self.to_string(), reason: reason.into() }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, unit, number } = self;
        let path = path.display();
        match unit {
            Unit::Line => write!(f, "{path}, line {number}"),
            Unit::Record => write!(f, "{path}, record {number}"),
            Unit::Row => write!(f, "{path}, row {number}"),
        }
    }
}

/// Told of each record. An error ends the reading.
pub type OnRecord<'r, 'a, E> = dyn FnMut(Place<'a>, Value) -> Result<(), E> + 'r;

/// Says which columns of a Parquet file are wanted.
pub type Columns<'r, E> = dyn Fn(&ParquetFile) -> Result<Vec<String>, E> + 'r;

/// Reads all records of a file that holds records.
///
/// # Errors
/// [`Error::Record`] names the place; those of [`crate::parquet`], and what `on_record` returns.
///
/// # Panics
/// For a text, which has no records.
pub fn read<'a, E: From<Error>>(
    file: &'a DataFile,
    columns: &Columns<'_, E>,
    on_record: &mut OnRecord<'_, 'a, E>,
) -> Result<(), E> {
    let path = file.path.as_path();
    match file.kind {
        Kind::JsonLines => lines_of(&mut files::open(path)?, path, on_record),
        Kind::Json => json::array(path, on_record),
        Kind::Csv => csv::rows(path, on_record),
        Kind::Parquet => {
            let parquet = ParquetFile::open(path)?;
            let wanted = columns(&parquet)?;
            let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
            for (number, record) in (1..).zip(parquet.records(&wanted)?) {
                on_record(Place { path, unit: Unit::Row, number }, record?)?;
            }
            Ok(())
        }
        Kind::Text => panic!("`{}` is a text and has no records", path.display()),
    }
}

/// The error that a whole file cannot be read.
fn wrong_file(path: &Path, reason: impl Into<String>) -> Error {
    Error::Record { place: path.display().to_string(), reason: reason.into() }
}
