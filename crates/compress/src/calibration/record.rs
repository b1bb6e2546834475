//! What of a record is text: a document, or a conversation.

use bevel_model::chat::Message;
use serde_json::{Map, Value};

/// Fields that hold a document by themselves, the first that is there.
const WHOLE: [&str; 3] = ["text", "messages", "conversations"];
/// Fields that hold a question and its answer.
const PAIRS: [(&str, &str); 2] = [("prompt", "completion"), ("instruction", "output")];

/// Of a table's columns those that [`Document::of`] looks at.
pub(super) fn columns<'a>(available: &[&'a str], field: Option<&'a str>) -> Vec<&'a str> {
    let has = |name: &&str| available.contains(name);
    if let Some(name) = field.or_else(|| WHOLE.into_iter().find(has)) {
        return vec![name];
    }
    let pair = PAIRS.into_iter().find(|(ask, answer)| has(ask) && has(answer));
    match pair {
        Some((ask, answer)) => vec![ask, answer, "input"],
        None => vec![WHOLE[0], WHOLE[1]],
    }
}

/// The text of a record.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    /// To be read as it is.
    Text(String),
    /// To be rendered by the model's chat template.
    Chat(Vec<Message>),
}

impl Document {
    /// The document in a record, from `field` or from where records usually have it; `None` where
    /// that is empty or null.
    ///
    /// # Errors
    /// Says what the record lacks.
    pub(super) fn of(record: Value, field: Option<&str>) -> Result<Option<Self>, String> {
        let Value::Object(mut record) = record else {
            return match record {
                Value::String(text) => Ok(text_document(text)),
                _ => Err("a record is an object with fields, or a string".to_owned()),
            };
        };
        if let Some(field) = field {
            let value =
                record.remove(field).ok_or_else(|| lacks(&format!("`{field}`"), &record))?;
            return from_value(value, field);
        }
        for field in WHOLE {
            if let Some(value) = record.remove(field) {
                return from_value(value, field);
            }
        }
        for (asks, answers) in PAIRS {
            if !record.contains_key(asks) || !record.contains_key(answers) {
                continue;
            }
            let (ask, answer) = (record.remove(asks), record.remove(answers));
            let mut messages = turn(ask.unwrap_or_default(), "user", asks)?;
            if let (Some(Value::String(input)), Some(first)) =
                (record.get("input"), messages.first_mut())
                && let (Value::String(text), false) = (&mut first.content, input.is_empty())
            {
                text.push_str("\n\n");
                text.push_str(input);
            }
            messages.extend(turn(answer.unwrap_or_default(), "assistant", answers)?);
            return Ok((messages.len() > 1).then_some(Self::Chat(messages)));
        }
        let expected =
            "`text`, `messages`, `prompt` with `completion`, or `instruction` with `output`";
        Err(lacks(expected, &record))
    }

    /// Bytes of text.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Chat(messages) => messages.iter().map(|m| 16 + value_bytes(&m.content)).sum(),
        }
    }
}

fn value_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(parts) => parts.iter().map(value_bytes).sum(),
        Value::Object(fields) => fields.values().map(value_bytes).sum(),
        _ => 0,
    }
}

fn lacks(expected: &str, record: &Map<String, Value>) -> String {
    let names: Vec<String> = record.keys().take(12).map(|name| format!("`{name}`")).collect();
    format!(
        "the record has no {expected}; it has {}. Name the field that holds the text (`--calib-field`)",
        if names.is_empty() { "no field".to_owned() } else { names.join(", ") }
    )
}

fn text_document(text: String) -> Option<Document> {
    (!text.is_empty()).then_some(Document::Text(text))
}

fn from_value(value: Value, field: &str) -> Result<Option<Document>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(text_document(text)),
        Value::Array(items) if items.iter().all(Value::is_string) => {
            let texts = items.iter().filter_map(Value::as_str);
            Ok(text_document(texts.collect::<Vec<_>>().join("\n")))
        }
        Value::Array(items) => {
            let messages: Result<Vec<_>, _> =
                items.into_iter().map(|item| message(item, field)).collect();
            Ok(Some(messages?).filter(|m| !m.is_empty()).map(Document::Chat))
        }
        _ => Err(format!("`{field}` is neither a string nor a list of messages")),
    }
}

/// One side of an exchange: a string, or messages.
fn turn(value: Value, role: &str, field: &str) -> Result<Vec<Message>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![Message::new(role, &text)]),
        Value::Array(items) => items.into_iter().map(|item| message(item, field)).collect(),
        _ => Err(format!("`{field}` is neither a string nor a list of messages")),
    }
}

fn message(item: Value, field: &str) -> Result<Message, String> {
    Message::from_data(item).map_err(|reason| format!("an element of `{field}`: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn chat(record: Value, field: Option<&str>, expected: &[(&str, &str)]) {
        let messages = expected.iter().map(|(role, text)| Message::new(role, text)).collect();
        assert_eq!(Document::of(record, field), Ok(Some(Document::Chat(messages))));
    }

    #[track_caller]
    fn text(record: Value, field: Option<&str>, expected: Option<&str>) {
        let expected = expected.map(|text| Document::Text(text.to_owned()));
        assert_eq!(Document::of(record, field), Ok(expected));
    }

    #[test]
    fn documents_are_where_records_usually_have_them() {
        text(json!({"id": 1, "text": "a"}), None, Some("a"));
        text(json!({"text": "a", "body": "b"}), Some("body"), Some("b"));
        text(json!({"text": ""}), None, None);
        text(json!({"text": null}), None, None);
        text(json!("bare"), None, Some("bare"));
        text(json!({"lines": ["a", "b"]}), Some("lines"), Some("a\nb"));
        let asked = [("user", "q"), ("assistant", "a")];
        let messages =
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        chat(json!({"messages": messages}), None, &asked);
        chat(json!({"chat": messages}), Some("chat"), &asked);
        let sharegpt = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
        chat(json!({"conversations": sharegpt}), None, &asked);
        chat(json!({"prompt": "q", "completion": "a"}), None, &asked);
        chat(json!({"prompt": [messages[0]], "completion": [messages[1]]}), None, &asked);
        chat(json!({"instruction": "q", "input": "", "output": "a"}), None, &asked);
        let with_input = [("user", "q\n\nx"), ("assistant", "a")];
        chat(json!({"instruction": "q", "input": "x", "output": "a"}), None, &with_input);
    }

    #[test]
    fn what_is_missing_is_said() {
        for (record, field, part) in [
            (json!({"body": "b"}), None, "it has `body`"),
            (json!({"text": "b"}), Some("body"), "no `body`; it has `text`"),
            (json!({}), None, "no field"),
            (json!({"text": 3}), None, "neither a string nor"),
            (json!({"messages": [{"content": "x"}]}), None, "no message with `role`"),
            (json!([1]), None, "an object"),
            (json!({"prompt": 1, "completion": "a"}), None, "`prompt` is neither"),
        ] {
            let message = Document::of(record, field).unwrap_err();
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}
