//! Records out of JSON: one a line, or an array of them.

use std::cell::Cell;
use std::io::{BufRead, Read};
use std::path::Path;
use std::rc::Rc;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use super::files::{NO_UTF8, open};
use super::{LONGEST, OnRecord, Place, Unit, wrong_file};
use crate::Error;

/// JSON Lines: each line that is not blank is a record. `path` is used in messages.
///
/// # Errors
/// [`Error::Record`] names the line.
pub fn lines_of<'a, E: From<Error>>(
    reader: &mut dyn BufRead,
    path: &'a Path,
    on_record: &mut OnRecord<'_, 'a, E>,
) -> Result<(), E> {
    let mut line = Vec::new();
    for number in 1u64.. {
        let place = Place { path, unit: Unit::Line, number };
        line.clear();
        let limited = &mut (&mut *reader).take(LONGEST + 1);
        let read = limited.read_until(b'\n', &mut line);
        if read.map_err(|error| place.wrong(error.to_string()))? == 0 {
            return Ok(());
        }
        if line.len() as u64 > LONGEST {
            return Err(place.wrong(format!("the line is longer than {LONGEST} bytes")).into());
        }
        let text = match number {
            1 => line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line),
            _ => &line,
        };
        if text.trim_ascii().is_empty() {
            continue;
        }
        if str::from_utf8(text).is_err() {
            return Err(place.wrong(format!("the line is {NO_UTF8}")).into());
        }
        let record = serde_json::from_slice(text).map_err(|error| {
            place.wrong(format!("the line is no JSON: {}", without_line(&error)))
        })?;
        on_record(place, record)?;
    }
    Ok(())
}

/// A file with an array of records, or with records one after another.
pub(super) fn array<'a, E: From<Error>>(
    path: &'a Path,
    on_record: &mut OnRecord<'_, 'a, E>,
) -> Result<(), E> {
    let mut reader = open(path)?;
    let is_array = loop {
        let buffer = reader.fill_buf().map_err(|error| wrong_file(path, error.to_string()))?;
        match buffer.first() {
            None => return Ok(()),
            Some(b' ' | b'\n' | b'\r' | b'\t') => reader.consume(1),
            // A byte order mark.
            Some(0xef) => {
                let mark = 3.min(buffer.len());
                reader.consume(mark);
            }
            Some(&first) => break first == b'[',
        }
    };
    let (limited, left) = Limited::new(reader);
    let mut failed = None;
    let mut number = 0u64;
    let mut take = |record: Value| {
        left.refill();
        number += 1;
        let place = Place { path, unit: Unit::Record, number };
        on_record(place, record).map_err(|error| failed = Some(error)).is_ok()
    };
    let outcome = if is_array {
        let mut json = serde_json::Deserializer::from_reader(limited);
        json.deserialize_seq(Each(&mut take)).and_then(|()| json.end())
    } else {
        let records = serde_json::Deserializer::from_reader(limited).into_iter::<Value>();
        let mut outcome = Ok(());
        for record in records {
            match record {
                Ok(record) => {
                    if !take(record) {
                        break;
                    }
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        outcome
    };
    match (failed, outcome) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(wrong_file(path, format!("it is no JSON: {error}")).into()),
        (None, Ok(())) => Ok(()),
    }
}

/// Hands each element of an array on as soon as it is read; `false` ends the reading.
struct Each<'a, F>(&'a mut F);

impl<'de, F: FnMut(Value) -> bool> Visitor<'de> for Each<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(record) = elements.next_element()? {
            if !(self.0)(record) {
                return Err(serde::de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

/// Refuses a record longer than [`LONGEST`].
pub(super) struct Limited<R> {
    reader: R,
    left: Left,
}

/// Bytes that the current record may still have.
#[derive(Clone)]
pub(super) struct Left(Rc<Cell<u64>>);

impl Left {
    /// The next record begins.
    pub(super) fn refill(&self) {
        self.0.set(LONGEST);
    }
}

impl<R: Read> Limited<R> {
    pub(super) fn new(reader: R) -> (Self, Left) {
        let left = Left(Rc::new(Cell::new(LONGEST)));
        (Self { reader, left: left.clone() }, left)
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(buffer)? as u64;
        let left = self.left.0.get().checked_sub(read);
        let too_long = || std::io::Error::other(format!("a record of over {LONGEST} bytes"));
        self.left.0.set(left.ok_or_else(too_long)?);
        Ok(read as usize)
    }
}

/// The message without serde's own line number, which counts from the line's begin.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line 1 column ") {
        Some((what, column)) => format!("{what} at column {column}"),
        None => text,
    }
}
