//! What a record says: which of the shapes it has, and whether its members are of the right kind.

use bevel_model::chat::Message;
use serde_json::{Map, Value};

use super::read::listed;

/// A record that something can be learnt from.
#[derive(Debug, PartialEq)]
pub(super) enum Shape {
    /// All is learnt.
    Text(String),
    /// The completion is learnt.
    Completion { prompt: String, completion: String },
    /// What the assistant says is learnt.
    Chat(Chat),
}

/// A conversation.
#[derive(Debug, PartialEq)]
pub(super) struct Chat {
    pub(super) messages: Vec<Message>,
    /// The functions that the assistant may call.
    pub(super) tools: Option<Value>,
    /// Messages before this one are not learnt.
    pub(super) from: usize,
}

/// The members of each shape, the first shape first.
const SHAPES: [&[&str]; 5] = [
    &["text"],
    &["prompt", "completion"],
    &["messages"],
    &["conversations"],
    &["instruction", "output"],
];

/// The roles that data sets of `from` and `value` know.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

impl Shape {
    /// What a record says; `None` where its members are there, but null or an empty list.
    ///
    /// # Errors
    /// Says what was expected.
    pub(super) fn of(record: Value) -> Result<Option<Self>, String> {
        let mut record = Record::new(record)?;
        let shape = SHAPES.iter().find(|shape| shape.iter().all(|name| record.has(name)));
        let Some(shape) = shape else {
            let named = |shape: &&[&str]| shape.iter().all(|name| record.0.contains_key(*name));
            if SHAPES.iter().any(named) {
                return Ok(None);
            }
            return Err(record.lacks(
                "expected the members `text`, `prompt` and `completion`, `messages`, `conversations`, or \
                 `instruction` and `output`",
            ));
        };
        let tools = record.tools()?;
        let chat = |messages, from| Ok(Some(Self::Chat(Chat { messages, tools, from })));
        match shape[0] {
            "text" => Ok(Some(Self::Text(record.text("text")?))),
            "prompt" if record.is_list("prompt") || record.is_list("completion") => {
                let mut messages = record.messages("prompt")?;
                let from = messages.len();
                messages.extend(record.messages("completion")?);
                chat(messages, from)
            }
            "prompt" => Ok(Some(Self::Completion {
                prompt: record.text("prompt")?,
                completion: record.text("completion")?,
            })),
            "instruction" => {
                let mut question = record.text("instruction")?;
                if record.has("input") {
                    let input = record.text("input")?;
                    if !input.trim().is_empty() {
                        question = format!("{question}\n\n{}", input.trim());
                    }
                }
                let answer = record.text("output")?;
                let messages =
                    vec![Message::new("user", &question), Message::new("assistant", &answer)];
                chat(messages, 0)
            }
            name if record.0[name] == Value::Array(Vec::new()) => Ok(None),
            name => {
                let messages = record.messages(name)?;
                let known = |message: &&Message| ROLES.contains(&message.role.as_str());
                if name == "conversations"
                    && let Some(other) = messages.iter().find(|message| !known(message))
                {
                    return Err(format!(
                        "`from` is `{}`, and not human, gpt, system or tool",
                        other.role
                    ));
                }
                chat(messages, 0)
            }
        }
    }
}

/// A record's members. One that is null is none.
pub(super) struct Record(Map<String, Value>);

impl Record {
    pub(super) fn new(record: Value) -> Result<Self, String> {
        match record {
            Value::Object(members) => Ok(Self(members)),
            other => Err(format!("expected an object with members, and not {}", kind(&other))),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    pub(super) fn is_list(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_array)
    }

    /// What was expected, and what there is.
    pub(super) fn lacks(&self, expected: &str) -> String {
        let names: Vec<&str> = self.0.keys().take(12).map(String::as_str).collect();
        match names.is_empty() {
            true => format!("{expected}; it has none"),
            false => format!("{expected}; it has {}", listed(&names)),
        }
    }

    /// A member that is a text.
    pub(super) fn text(&mut self, name: &str) -> Result<String, String> {
        match self.0.remove(name) {
            Some(Value::String(text)) => Ok(text),
            other => {
                let found = other.unwrap_or_default();
                Err(format!("`{name}` is {}; expected a text", kind(&found)))
            }
        }
    }

    /// A member that is a list of messages.
    pub(super) fn messages(&mut self, name: &str) -> Result<Vec<Message>, String> {
        let list = match self.0.remove(name) {
            Some(Value::Array(list)) => list,
            other => {
                let found = other.unwrap_or_default();
                return Err(format!("`{name}` is {}; expected a list of messages", kind(&found)));
            }
        };
        if list.is_empty() {
            return Err(format!("`{name}` has no message"));
        }
        let message = |(number, value)| {
            let wrong = |reason| format!("`{name}`, message {number}: {reason}");
            let message = Message::from_data(value).map_err(wrong)?;
            match &message.content {
                Value::String(_) | Value::Array(_) | Value::Null => Ok(message),
                other => Err(wrong(format!("its content is {}; expected a text", kind(other)))),
            }
        };
        (1..).zip(list).map(message).collect()
    }

    /// `tools`: a list of JSON schemas, or that list written as a text.
    pub(super) fn tools(&mut self) -> Result<Option<Value>, String> {
        let tools = match self.0.remove("tools") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
            Some(Value::String(text)) => serde_json::from_str(&text)
                .map_err(|error| format!("`tools` is a text, but no JSON: {error}"))?,
            Some(tools) => tools,
        };
        match tools {
            Value::Array(list) if list.is_empty() => Ok(None),
            Value::Array(list) => Ok(Some(Value::Array(list))),
            other => Err(format!("`tools` is {}; expected a list of functions", kind(&other))),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
