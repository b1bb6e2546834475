//! A column's cells, row by row, out of its pages.

use serde_json::Value;

use super::footer::Chunk;
use super::page::{Dictionary, Found, Page, read};
use super::schema::Column;
use super::thrift::Result;

/// Elements of one list.
const MOST_ELEMENTS: usize = 1 << 16;
/// Bytes of one cell.
const LONGEST_CELL: usize = 64 << 20;

#[derive(Debug)]
pub(super) struct ColumnReader<'a> {
    column: &'a Column,
    codec: i64,
    bytes: &'a [u8],
    position: usize,
    dictionary: Dictionary,
    page: Option<Page>,
    /// Values that no page has brought yet.
    left: u64,
    /// Levels read ahead.
    peeked: Option<(u32, u32)>,
    value: Vec<u8>,
}

impl<'a> ColumnReader<'a> {
    pub(super) fn new(file: &'a [u8], column: &'a Column, chunk: &Chunk) -> Result<Self> {
        if chunk.elsewhere {
            return Err("its columns lie in another file, which bevel does not read".to_owned());
        }
        let start = usize::try_from(chunk.start()).ok();
        let end = start.and_then(|start| start.checked_add(chunk.byte_len.try_into().ok()?));
        let bytes = start.zip(end).and_then(|(start, end)| file.get(start..end));
        let bytes = bytes.ok_or("a column lies past the end of the file")?;
        Ok(Self {
            column,
            codec: chunk.codec,
            bytes,
            position: 0,
            dictionary: Dictionary::default(),
            page: None,
            left: chunk.values,
            peeked: None,
            value: Vec::new(),
        })
    }

    pub(super) fn column(&self) -> &'a Column {
        self.column
    }

    /// The next row's cell: a string, a list of strings and nulls, or null.
    pub(super) fn next_row(&mut self) -> Result<Value> {
        let (_, definition) = self.levels()?;
        let mut bytes = 0;
        let Some(element) = self.column.element_definition else {
            return self.string(definition, &mut bytes);
        };
        if definition < element {
            // An empty list is one level deeper than a list that is missing.
            let empty = definition + 1 == element;
            return Ok(if empty { Value::Array(Vec::new()) } else { Value::Null });
        }
        let mut values = vec![self.string(definition, &mut bytes)?];
        while let Some((repetition, definition)) = self.peek()? {
            if repetition == 0 {
                break;
            }
            self.peeked = None;
            if values.len() == MOST_ELEMENTS {
                return Err(format!("a list of more than {MOST_ELEMENTS} elements"));
            }
            values.push(self.string(definition, &mut bytes)?);
        }
        Ok(Value::Array(values))
    }

    /// The string at hand, or null where it is not there. `bytes` counts what the cell has.
    fn string(&mut self, definition: u32, bytes: &mut usize) -> Result<Value> {
        if definition < self.column.max_definition {
            return Ok(Value::Null);
        }
        let page = self.page.as_mut().ok_or("a value without a page")?;
        page.value(&self.dictionary, &mut self.value)?;
        *bytes += self.value.len();
        if *bytes > LONGEST_CELL {
            return Err(format!("a cell of more than {LONGEST_CELL} bytes"));
        }
        let text = str::from_utf8(&self.value).map_err(|_| "a string is no UTF-8".to_owned())?;
        Ok(Value::String(text.to_owned()))
    }

    fn levels(&mut self) -> Result<(u32, u32)> {
        self.peek()?;
        self.peeked.take().ok_or_else(|| "it has less values than rows".to_owned())
    }

    /// The next value's levels; `None` at the column's end.
    fn peek(&mut self) -> Result<Option<(u32, u32)>> {
        if self.peeked.is_none() {
            while self.page.as_ref().is_none_or(|page| page.left == 0) {
                if self.left == 0 || self.position >= self.bytes.len() {
                    return Ok(None);
                }
                match read(self.bytes, &mut self.position, self.codec, self.column)? {
                    Found::Dictionary(dictionary) => self.dictionary = dictionary,
                    Found::Page(page) => {
                        self.left = self.left.saturating_sub(page.left);
                        self.page = Some(page);
                        self.value.clear();
                    }
                    Found::Nothing => {}
                }
            }
            self.peeked = self.page.as_mut().map(Page::levels).transpose()?;
        }
        Ok(self.peeked)
    }
}
