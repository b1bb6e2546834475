//! Parquet, as far as data sets of text need it: string columns, and lists of strings or of structs
//! of strings, such as the messages of a conversation. `docs/formats/parquet.md` shows the layout.
//!
//! Read are the encodings PLAIN, RLE_DICTIONARY, DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY, pages of
//! both versions, plain and packed by Snappy, gzip and zstd. Of each column one page is in memory.

mod column;
mod delta;
mod footer;
mod levels;
mod page;
mod schema;
mod thrift;

use std::path::{Path, PathBuf};

use bevel_base::Mapping;
use serde_json::{Map, Value};

use crate::shards::map;
use crate::wrong_file::wrong_file;
use crate::{Error, Result};
use column::ColumnReader;
use footer::{Footer, RowGroup};
use schema::Column;

/// A file begins and ends with it.
const MAGIC: &[u8] = b"PAR1";

/// A Parquet file mapped into memory.
#[derive(Debug)]
pub struct ParquetFile {
    path: PathBuf,
    mapping: Mapping,
    footer: Footer,
}

impl ParquetFile {
    /// Opens a file and reads its footer.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::WrongFile`] for another format, [`Error::Header`] for a damaged or
    /// truncated file.
    pub fn open(path: &Path) -> Result<Self> {
        let mapping = map(path)?;
        let footer = parse(path, mapping.bytes())?;
        Ok(Self { path: path.to_owned(), mapping, footer })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Rows of all row groups.
    pub fn rows(&self) -> u64 {
        self.footer.groups.iter().map(|group| group.rows).sum()
    }

    /// The columns that hold text, by the names of their topmost fields.
    pub fn text_columns(&self) -> Vec<&str> {
        text_columns(&self.footer)
    }

    /// The path to a text within `column` that lies too deep to be read, if there is one: lists in lists, as the
    /// arguments of a message's tool calls are.
    pub fn unread_text(&self, column: &str) -> Option<String> {
        let deeper = self.footer.deeper.iter().find(|path| path[0] == column)?;
        Some(deeper.join("."))
    }

    /// All rows as objects with those of `fields` that hold text. Strings are strings, lists of
    /// structs are lists of objects, what is missing is null.
    ///
    /// # Errors
    /// [`Error::Header`] where none of `fields` holds text. The iterator ends at its first error.
    pub fn records<'a>(&'a self, fields: &[&str]) -> Result<Records<'a>> {
        Records::new(&self.path, self.mapping.bytes(), &self.footer, fields)
    }
}

/// Reads a whole file lying in `bytes`: calls `on_record` with each row of all text columns, at most
/// `limit` of them. For tests and fuzzers; `path` is used in messages.
///
/// # Errors
/// As [`ParquetFile::open`] and [`ParquetFile::records`].
pub fn parse_records(
    path: &Path,
    bytes: &[u8],
    limit: usize,
    on_record: &mut dyn FnMut(Value),
) -> Result<()> {
    let footer = parse(path, bytes)?;
    let fields = text_columns(&footer);
    for record in Records::new(path, bytes, &footer, &fields)?.take(limit) {
        on_record(record?);
    }
    Ok(())
}

fn text_columns(footer: &Footer) -> Vec<&str> {
    let mut names: Vec<&str> = footer.columns.iter().map(|column| column.top.as_str()).collect();
    names.dedup();
    names
}

/// Finds the footer at a file's end: its length, and the magic once more.
fn parse(path: &Path, bytes: &[u8]) -> Result<Footer> {
    let damaged = |reason: String| Error::Header { path: path.to_owned(), reason };
    if bytes.starts_with(b"PARE") || bytes.ends_with(b"PARE") {
        return Err(damaged("it is encrypted; bevel reads plain Parquet".to_owned()));
    }
    if !bytes.starts_with(MAGIC) {
        return Err(wrong_file(path, "Parquet file", bytes));
    }
    let tail = bytes.strip_suffix(MAGIC).filter(|rest| rest.len() >= MAGIC.len() + 4);
    let Some((rest, len)) = tail.and_then(|rest| rest.split_last_chunk()) else {
        return Err(damaged("its end is missing; copy or download it again".to_owned()));
    };
    let len = u32::from_le_bytes(*len) as usize;
    let start = rest.len().checked_sub(len).filter(|&start| start >= MAGIC.len());
    let start = start.ok_or_else(|| {
        damaged(format!("its footer should take {len} bytes, more than the file has"))
    })?;
    Footer::parse(&rest[start..]).map_err(damaged)
}

/// The rows of a file, one after another.
#[derive(Debug)]
pub struct Records<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    columns: Vec<&'a Column>,
    groups: std::slice::Iter<'a, RowGroup>,
    readers: Vec<ColumnReader<'a>>,
    /// Rows left in the row group.
    left: u64,
    failed: bool,
}

impl<'a> Records<'a> {
    fn new(path: &'a Path, bytes: &'a [u8], footer: &'a Footer, fields: &[&str]) -> Result<Self> {
        let wanted = |column: &&Column| fields.contains(&column.top.as_str());
        let columns: Vec<&Column> = footer.columns.iter().filter(wanted).collect();
        if columns.is_empty() {
            let names = text_columns(footer);
            return Err(Error::Header {
                path: path.to_owned(),
                reason: format!(
                    "none of its columns with text is called `{}`; they are {names:?}",
                    fields.join("` or `")
                ),
            });
        }
        let groups = footer.groups.iter();
        Ok(Self { path, bytes, columns, groups, readers: Vec::new(), left: 0, failed: false })
    }

    fn record(&mut self) -> Result<Option<Value>, String> {
        while self.left == 0 {
            let Some(group) = self.groups.next() else { return Ok(None) };
            self.left = group.rows;
            let reader = |column: &&'a Column| {
                let chunk = group.chunks.get(column.leaf);
                let chunk = chunk.ok_or_else(|| "a row group lacks a column".to_owned())?;
                ColumnReader::new(self.bytes, column, chunk)
            };
            self.readers = self.columns.iter().map(reader).collect::<Result<_, String>>()?;
        }
        self.left -= 1;
        let mut record = Map::new();
        for reader in &mut self.readers {
            let column = reader.column();
            let cell = reader.next_row().map_err(|e| format!("column `{}`: {e}", column.top))?;
            join(&mut record, column, cell);
        }
        Ok(Some(Value::Object(record)))
    }
}

/// Puts a cell into its record: fields of one list's structs come from columns of their own.
fn join(record: &mut Map<String, Value>, column: &Column, cell: Value) {
    let Some(field) = &column.field else {
        record.insert(column.top.clone(), cell);
        return;
    };
    let Value::Array(values) = cell else {
        record.entry(column.top.clone()).or_insert(Value::Null);
        return;
    };
    let list = record.entry(column.top.clone()).or_insert_with(|| Value::Array(Vec::new()));
    if list.is_null() {
        *list = Value::Array(Vec::new());
    }
    let Value::Array(items) = list else { return };
    items.resize_with(items.len().max(values.len()), || Value::Object(Map::new()));
    for (item, value) in items.iter_mut().zip(values) {
        if let Value::Object(item) = item {
            item.insert(field.clone(), value);
        }
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let record = self.record().map_err(|reason| {
            self.failed = true;
            Error::Header { path: self.path.to_owned(), reason }
        });
        record.transpose()
    }
}
