//! Reading fields of a quantization's description in `config.json`, with errors that name them.

use serde_json::Value;

/// A JSON object and its place in `config.json`.
#[derive(Clone, Debug)]
pub(super) struct Settings<'a> {
    place: String,
    value: &'a Value,
}

impl<'a> Settings<'a> {
    pub(super) fn new(place: impl Into<String>, value: &'a Value) -> Result<Self, String> {
        let place = place.into();
        match value.is_object() {
            true => Ok(Self { place, value }),
            false => Err(format!("`{place}` is no object")),
        }
    }

    /// A message about a field.
    pub(super) fn wrong(&self, field: &str, what: &str) -> String {
        format!("`{}.{field}` {what}", self.place)
    }

    /// The field's value, unless it is missing or null.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.value.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    /// The fields and their values.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let object = self.value.as_object().into_iter().flatten();
        object.map(|(key, value)| (key.as_str(), value))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>, String> {
        let text = |value: &'a Value| value.as_str().ok_or_else(|| self.wrong(field, "is no text"));
        self.get(field).map(text).transpose()
    }

    pub(super) fn integer(&self, field: &str) -> Result<Option<i64>, String> {
        let integer = |value: &Value| {
            value.as_i64().ok_or_else(|| self.wrong(field, &format!("is {value}, no integer")))
        };
        self.get(field).map(integer).transpose()
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Settings<'a>>, String> {
        let place = || format!("{}.{field}", self.place);
        self.get(field).map(|value| Settings::new(place(), value)).transpose()
    }

    /// Bits a code, one of `allowed`.
    pub(super) fn bits(&self, field: &str, allowed: &[u32]) -> Result<u32, String> {
        let bits = self.integer(field)?.ok_or_else(|| self.wrong(field, "is missing"))?;
        let known = allowed.iter().copied().find(|&known| i64::from(known) == bits);
        known.ok_or_else(|| self.wrong(field, &format!("is {bits}; bevel reads {allowed:?}")))
    }

    /// Columns in a group; `None` where a group is the whole row, which is written -1.
    pub(super) fn group_size(&self, field: &str) -> Result<Option<usize>, String> {
        match self.integer(field)? {
            None | Some(-1) => Ok(None),
            Some(size) => match usize::try_from(size) {
                Ok(size) if size > 0 => Ok(Some(size)),
                _ => Err(self.wrong(field, &format!("is {size}; it must be positive, or -1"))),
            },
        }
    }

    /// Rows and columns of a block.
    pub(super) fn block(&self, field: &str) -> Result<Option<[usize; 2]>, String> {
        let block = |value: &Value| {
            let sides: Vec<usize> = match value {
                Value::String(text) => text.split('x').filter_map(|s| s.parse().ok()).collect(),
                value => {
                    let sides = value.as_array().into_iter().flatten();
                    sides.filter_map(|side| side.as_u64()?.try_into().ok()).collect()
                }
            };
            match sides[..] {
                [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
                _ => Err(self.wrong(field, &format!("is {value}, not two positive integers"))),
            }
        };
        self.get(field).map(block).transpose()
    }
}

/// `groups of 128`, or `a group a row`.
pub(super) fn groups_in_words(group_size: Option<usize>) -> String {
    match group_size {
        Some(size) => format!("groups of {size}"),
        None => "a scale a row".to_owned(),
    }
}
