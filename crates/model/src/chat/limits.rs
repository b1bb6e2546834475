//! Bounds on the time and memory that a template may take. Templates come with models, from
//! anywhere; these bounds are far above what those in use need.

use std::io;

use indexmap::IndexMap;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

/// Instructions that one rendering may take: a second or so.
const STEPS: u64 = 10_000_000;

/// Bytes that one rendering may write, or keep in a namespace.
const SIZE: usize = 64 << 20;

/// The largest width or count that a filter may be asked for.
const WIDTH: usize = 10_000;

/// Lists in lists that a namespace may keep.
const DEPTH: usize = 64;

/// What the user is told where a template takes more than `STEPS`.
pub(super) const TOO_LONG: &str = "it did not come to an end after ten million steps";

/// What the user is told where a template writes more than `SIZE`.
pub(super) const TOO_LARGE: &str = "it wrote more than 64 MiB";

/// The filter that a value goes through before a namespace keeps it.
pub(super) const KEPT: &str = "kept_by_a_namespace";

pub(super) fn set(environment: &mut Environment<'_>) {
    environment.set_fuel(Some(STEPS));
    environment.add_filter(KEPT, |value: Value| copy(&value, 0, &mut 0));
    for (name, filter) in [
        ("batch", Value::from_function(filters::batch)),
        ("indent", Value::from_function(filters::indent)),
        ("slice", Value::from_function(filters::slice)),
        ("format", Value::from_function(filters::format)),
    ] {
        let bounded = move |state: &mut State<'_, '_>, args: Rest<Value>, named: Kwargs| {
            match (name, &args[..]) {
                ("format", [format, ..]) => check_format(format)?,
                (_, [_, options @ ..]) => options.iter().try_for_each(check_width)?,
                _ => {}
            }
            for option in named.args() {
                check_width(&named.get(option)?)?;
            }
            let mut args = args.0;
            if named.args().next().is_some() {
                args.push(named.into());
            }
            filter.call(state, &args)
        };
        environment.add_filter(name, bounded);
    }
}

/// The value without what could make it refer to its own namespace: lists and maps are copied,
/// and so is what computes its items only when it is asked for them, which a namespace does too.
///
/// A value that contained itself would be printed without an end.
fn copy(value: &Value, depth: usize, size: &mut usize) -> Result<Value, Error> {
    let refuse = |what: &str| Err(Error::new(ErrorKind::InvalidOperation, what.to_owned()));
    *size += size_of::<Value>() + value.as_str().map_or(0, str::len);
    if *size > SIZE {
        return refuse("a namespace is given more than 64 MiB");
    }
    if depth > DEPTH {
        return refuse("a namespace is given lists nested too deep");
    }
    Ok(match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| copy(&item, depth + 1, size));
            items.collect::<Result<Vec<Value>, Error>>()?.into()
        }
        ValueKind::Map => {
            let mut map = IndexMap::new();
            for key in value.try_iter()? {
                let item = copy(&value.get_item(&key)?, depth + 1, size)?;
                map.insert(copy(&key, depth + 1, size)?, item);
            }
            Value::from_object(map)
        }
        _ => value.clone(),
    })
}

/// Checks the call of a Python method.
pub(super) fn check_method(value: &Value, method: &str) -> Result<(), Error> {
    if method == "format" { check_format(value) } else { Ok(()) }
}

fn check_width(option: &Value) -> Result<(), Error> {
    let wide = option.is_number() && option.as_usize().is_none_or(|width| width > WIDTH);
    if wide { too_wide() } else { Ok(()) }
}

/// A format spells its widths, or takes them from its arguments, which no template in use does.
fn check_format(format: &Value) -> Result<(), Error> {
    let format = format.as_str().unwrap_or_default();
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let wide = numbers.map(str::parse).any(|width| width.unwrap_or(usize::MAX) > WIDTH);
    if wide || format.contains("%*") || format.contains(".*") { too_wide() } else { Ok(()) }
}

fn too_wide() -> Result<(), Error> {
    let message = format!("a width or a count is more than {WIDTH}");
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// What a template has written.
#[derive(Default)]
pub(super) struct Output(Vec<u8>);

impl Output {
    pub(super) fn into_text(self) -> String {
        // Templates write whole strings.
        String::from_utf8(self.0).unwrap_or_default()
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > SIZE {
            return Err(io::Error::other(TOO_LARGE));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
