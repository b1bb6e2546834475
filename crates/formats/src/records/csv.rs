//! Records out of CSV (RFC 4180): the first row has the members' names.

use std::path::Path;

use csv::{ByteRecord, ErrorKind, ReaderBuilder};
use serde_json::{Map, Value};

use super::files::{NO_UTF8, open};
use super::json::Limited;
use super::{OnRecord, Place, Unit, wrong_file};
use crate::Error;

pub(super) fn rows<'a, E: From<Error>>(
    path: &'a Path,
    on_record: &mut OnRecord<'_, 'a, E>,
) -> Result<(), E> {
    let (limited, left) = Limited::new(open(path)?);
    let mut reader = ReaderBuilder::new().from_reader(limited);
    let header = reader.byte_headers().map_err(|error| wrong_file(path, explain(&error)))?;
    let names = names(header).map_err(|reason| wrong_file(path, reason))?;
    let mut row = ByteRecord::new();
    for number in 1.. {
        left.refill();
        let place = Place { path, unit: Unit::Row, number };
        if !reader.read_byte_record(&mut row).map_err(|error| place.wrong(explain(&error)))? {
            break;
        }
        let mut record = Map::new();
        for (name, cell) in names.iter().zip(&row) {
            let text = str::from_utf8(cell);
            let text = text.map_err(|_| place.wrong(format!("`{name}` is {NO_UTF8}")))?;
            record.insert(name.clone(), text.into());
        }
        on_record(place, Value::Object(record))?;
    }
    Ok(())
}

/// The names in the first row, each of them once.
fn names(header: &ByteRecord) -> Result<Vec<String>, String> {
    let mut names: Vec<String> = Vec::new();
    for cell in header {
        let name = str::from_utf8(cell).map_err(|_| format!("its first row is {NO_UTF8}"))?.trim();
        if !name.is_empty() && names.iter().any(|other| other == name) {
            return Err(format!("its first row has the name `{name}` twice; rename one column"));
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

/// Without the place, which is said before it.
fn explain(error: &csv::Error) -> String {
    match error.kind() {
        ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
            "it has {len} cells, and the first row {expected_len}; a cell with a comma or a quote in it stands in quotes"
        ),
        _ => error.to_string(),
    }
}
