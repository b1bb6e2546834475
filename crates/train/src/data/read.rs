//! Files to examples: records are read one after another, and become tokens on all threads.

use bevel_base::Pool;
use bevel_formats::parquet::ParquetFile;
use bevel_formats::records::{self, DataFile, Kind, Place};
use serde_json::Value;

use super::shape::Shape;
use super::{Example, Examples, Reader};
use crate::{Error, Result};

/// Records that are in memory before they become tokens.
const TOGETHER: usize = 512;

/// What a record becomes.
pub(super) trait Item: Sized + Send {
    /// The members that are looked at.
    const MEMBERS: &'static [&'static str];

    /// Makes one of a record.
    ///
    /// # Errors
    /// Says what the record should have.
    fn of(reader: &Reader<'_>, record: Value) -> Result<Made<Self>, String>;

    /// What it consists of, for a cache.
    fn examples(&self) -> Vec<&Example>;

    /// One of the next examples of a cache; `None` where there are none.
    fn from_examples(next: &mut dyn FnMut() -> Option<Example>) -> Option<Self>;

    /// Those of a text; `None` for what is not made of texts.
    fn of_text(reader: &Reader<'_>, text: &str, source: &str) -> Option<Result<Examples<Self>>>;
}

/// An item, if there is something to be learnt of it.
pub(super) struct Made<T> {
    pub(super) item: Option<T>,
    /// It was longer than the context.
    pub(super) cut: bool,
}

impl<T> Examples<T> {
    pub(super) fn push(&mut self, made: Made<T>) {
        self.cut += usize::from(made.cut);
        match made.item {
            Some(item) => self.all.push(item),
            None => self.empty += 1,
        }
    }
}

pub(super) fn files<T: Item>(
    reader: &Reader<'_>,
    files: &[DataFile],
    pool: &Pool,
) -> Result<Examples<T>> {
    let mut examples = Examples::default();
    for file in files {
        if file.kind == Kind::Text {
            let source = file.path.display().to_string();
            let found = T::of_text(reader, &records::text(&file.path)?, &source);
            let found = found.ok_or_else(|| bevel_formats::Error::Record {
                place: source.clone(),
                reason: format!("a text is none; expected records with {}", listed(T::MEMBERS)),
            })??;
            examples.all.extend(found.all);
            examples.cut += found.cut;
            examples.empty += found.empty;
            continue;
        }
        let mut batch = Batch { reader, pool, slots: Vec::new(), examples: &mut examples };
        let outcome = records::read(file, &columns::<T>, &mut |place, record| {
            batch.slots.push(Slot { place, record, made: None });
            if batch.slots.len() == TOGETHER { batch.flush() } else { Ok(()) }
        });
        // What is wrong with an earlier record is said first.
        batch.flush()?;
        outcome?;
    }
    Ok(examples)
}

/// Names in backticks.
pub(super) fn listed(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

/// The columns of a table that examples are made of.
fn columns<T: Item>(file: &ParquetFile) -> Result<Vec<String>> {
    for member in T::MEMBERS {
        if let Some(path) = file.unread_text(member) {
            return Err(bevel_formats::Error::Record {
                place: file.path().display().to_string(),
                reason: format!(
                    "`{path}` is a list in a list, which bevel does not read of Parquet; save the rows as JSON Lines"
                ),
            }
            .into());
        }
    }
    Ok(T::MEMBERS.iter().map(|&name| name.to_owned()).collect())
}

/// A record, and then what it became.
struct Slot<'a, T> {
    place: Place<'a>,
    record: Value,
    made: Option<Result<Made<T>, String>>,
}

struct Batch<'a, 'r, T> {
    reader: &'r Reader<'r>,
    pool: &'r Pool,
    slots: Vec<Slot<'a, T>>,
    examples: &'r mut Examples<T>,
}

impl<T: Item> Batch<'_, '_, T> {
    /// Makes tokens of the records, in their order.
    fn flush(&mut self) -> Result<()> {
        let reader = self.reader;
        self.pool.run_chunks(&mut self.slots, 1, |_, slots| {
            for slot in slots {
                slot.made = Some(T::of(reader, slot.record.take()));
            }
        });
        for Slot { place, made, .. } in self.slots.drain(..) {
            let made = made.expect("every task was run").map_err(|reason| place.wrong(reason))?;
            self.examples.push(made);
        }
        Ok::<_, Error>(())
    }
}

impl Item for Example {
    const MEMBERS: &'static [&'static str] = &[
        "text",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "tools",
    ];

    fn of(reader: &Reader<'_>, record: Value) -> Result<Made<Self>, String> {
        let example = match Shape::of(record)? {
            Some(shape) => reader.example(shape)?,
            None => None,
        };
        Ok(example.map_or(Made { item: None, cut: false }, |e| reader.limited(e)))
    }

    fn examples(&self) -> Vec<&Example> {
        vec![self]
    }

    fn from_examples(next: &mut dyn FnMut() -> Option<Example>) -> Option<Self> {
        next()
    }

    fn of_text(reader: &Reader<'_>, text: &str, source: &str) -> Option<Result<Examples>> {
        Some(reader.text(text, source))
    }
}
