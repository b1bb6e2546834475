//! The footer: the schema, and where each row group's columns lie.

use super::schema::{Column, SchemaElement, text_columns};
use super::thrift::{Reader, Result, Wire};

/// What bevel needs of a footer.
#[derive(Debug)]
pub(super) struct Footer {
    /// The columns that hold text.
    pub(super) columns: Vec<Column>,
    /// The names on the paths to text that is not read.
    pub(super) deeper: Vec<Vec<String>>,
    pub(super) groups: Vec<RowGroup>,
}

/// Rows whose columns lie together.
#[derive(Debug, Default)]
pub(super) struct RowGroup {
    pub(super) rows: u64,
    /// One for each leaf of the schema.
    pub(super) chunks: Vec<Chunk>,
}

/// A row group's values of one column: pages, one after another.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chunk {
    pub(super) codec: i64,
    /// Values, nulls counted.
    pub(super) values: u64,
    pub(super) byte_len: u64,
    data_start: u64,
    dictionary_start: u64,
    /// The pages are in another file.
    pub(super) elsewhere: bool,
}

impl Chunk {
    /// Where the first page lies.
    pub(super) fn start(&self) -> u64 {
        match self.dictionary_start {
            0 => self.data_start,
            dictionary => dictionary.min(self.data_start),
        }
    }
}

impl Footer {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let mut schema = Vec::new();
        let mut groups = Vec::new();
        reader.fields(&mut |reader, id, wire| match (id, wire) {
            (2, Wire::List) => list_into(reader, &mut schema, schema_element),
            (4, Wire::List) => list_into(reader, &mut groups, row_group),
            _ => Ok(false),
        })?;
        let (columns, deeper) = text_columns(&schema)?;
        Ok(Self { columns, deeper, groups })
    }
}

/// Reads a list of structs.
fn list_into<T>(
    reader: &mut Reader<'_>,
    out: &mut Vec<T>,
    read: fn(&mut Reader<'_>) -> Result<T>,
) -> Result<bool> {
    let (len, wire) = reader.list()?;
    if wire != Wire::Struct && len > 0 {
        return Err("a list of structs holds something else".to_owned());
    }
    for _ in 0..len {
        out.push(read(reader)?);
    }
    Ok(true)
}

fn schema_element(reader: &mut Reader<'_>) -> Result<SchemaElement> {
    let mut element = SchemaElement::default();
    reader.fields(&mut |reader, id, wire| {
        match (id, wire) {
            (1, Wire::Integer) => element.physical = Some(reader.integer()?),
            (3, Wire::Integer) => element.repetition = reader.integer()?,
            (4, Wire::Binary) => element.name = reader.string()?,
            (5, Wire::Integer) => element.children = reader.count()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(element)
}

fn row_group(reader: &mut Reader<'_>) -> Result<RowGroup> {
    let mut group = RowGroup::default();
    reader.fields(&mut |reader, id, wire| match (id, wire) {
        (1, Wire::List) => list_into(reader, &mut group.chunks, chunk),
        (3, Wire::Integer) => {
            group.rows = reader.count()?;
            Ok(true)
        }
        _ => Ok(false),
    })?;
    Ok(group)
}

fn chunk(reader: &mut Reader<'_>) -> Result<Chunk> {
    let mut chunk = Chunk::default();
    reader.fields(&mut |reader, id, wire| match (id, wire) {
        (1, Wire::Binary) => {
            chunk.elsewhere = !reader.binary()?.is_empty();
            Ok(true)
        }
        (3, Wire::Struct) => {
            reader.fields(&mut |reader, id, wire| {
                if wire != Wire::Integer {
                    return Ok(false);
                }
                match id {
                    4 => chunk.codec = reader.integer()?,
                    5 => chunk.values = reader.count()?,
                    7 => chunk.byte_len = reader.count()?,
                    9 => chunk.data_start = reader.count()?,
                    11 => chunk.dictionary_start = reader.count()?,
                    _ => return Ok(false),
                }
                Ok(true)
            })?;
            Ok(true)
        }
        _ => Ok(false),
    })?;
    Ok(chunk)
}
