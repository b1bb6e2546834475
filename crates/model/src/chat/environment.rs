//! The Jinja environment of `transformers`, in minijinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::json::tojson;
use super::limits::{self, Output};
use super::source::prepare;
use super::{DateTime, TemplateError};

const NAME: &str = "chat_template";

/// Marks the errors that a template raises itself.
const RAISED: &str = "raised by the template: ";

pub(super) fn new(
    source: &str,
    clock: fn() -> DateTime,
) -> Result<Environment<'static>, TemplateError> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| TemplateError::Syntax(error.to_string()))?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(|state, value, method, args| {
        limits::check_method(value, method)?;
        unknown_method_callback(state, value, method, args)
    });
    limits::set(&mut environment);
    environment.add_filter("tojson", tojson);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        clock().format(format).ok_or_else(|| {
            let message = format!("strftime_now: unknown directive in `{format}`");
            Error::new(ErrorKind::InvalidOperation, message)
        })
    });
    environment
        .add_template_owned(NAME, prepare(source))
        .map_err(|error| TemplateError::Syntax(sentence(&error)))?;
    Ok(environment)
}

pub(super) fn render(
    environment: &Environment<'_>,
    context: &impl serde::Serialize,
) -> Result<String, TemplateError> {
    let mut output = Output::default();
    let rendered = environment
        .get_template(NAME)
        .and_then(|template| template.render_captured_to(Serde(context), &mut output).map(drop));
    rendered.map(|()| output.into_text()).map_err(|error| {
        let message = sentence(&error);
        match message.split_once(RAISED) {
            Some((_, raised)) => TemplateError::Refused(raised.to_owned()),
            None => TemplateError::Failed(message),
        }
    })
}

/// As in Python, what is undefined has no elements.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| {
        let message = format!("a {} has no length", value.kind());
        Error::new(ErrorKind::InvalidOperation, message)
    })
}

/// As in Python, text and what is undefined can be looped over and `none` cannot.
fn is_iterable(value: &Value) -> bool {
    value.is_undefined()
        || (!value.is_none() && value.try_iter().is_ok())
        || value.as_str().is_some()
}

/// As in Python, whatever has a length and can be indexed: text and maps too.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined()
        || matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

/// The error in one line: what happened and in which line of the template.
fn sentence(error: &Error) -> String {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => limits::TOO_LONG.to_owned(),
        ErrorKind::WriteFailure => limits::TOO_LARGE.to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    match error.line() {
        Some(_) if what.contains(RAISED) => what,
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}
