//! Chat templates: a conversation rendered as the text its model was trained on.
//!
//! A template is the Jinja source a model's publisher ships. It is rendered as `transformers`
//! renders it; one that does not parse, or that refuses the conversation, is an error.

mod environment;
mod json;
mod limits;
mod source;
mod time;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use time::DateTime;

/// The template of models without one that were trained on the ChatML format; by name only.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
    + (message['content'] or '') + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// What can go wrong with a chat template.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model came without a template.
    #[error(
        "the model has no chat template, so it was probably not trained to answer: complete text \
         with `run`, or give `chat` a template with `--template`"
    )]
    Missing,
    /// The template is no valid Jinja.
    #[error("the chat template does not parse: {0}")]
    Syntax(String),
    /// The template itself refuses this conversation.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the chat template failed: {0}")]
    Failed(String),
}

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever else the template knows.
    pub role: String,
    /// Text, or a list of parts; null where there are only tool calls.
    #[serde(default)]
    pub content: Value,
    /// Everything else: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of `text`.
    pub fn new(role: &str, text: &str) -> Self {
        Self { role: role.to_owned(), content: text.into(), extra: Map::new() }
    }

    /// A message as data sets have it: `role` and `content`, or ShareGPT's `from` and `value`.
    ///
    /// # Errors
    /// Says what it has instead.
    pub fn from_data(value: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = value else {
            return Err("it is no message with `role` and `content`".to_owned());
        };
        if let (Some(Value::String(from)), Some(value)) = (fields.get("from"), fields.get("value"))
        {
            let role = match from.as_str() {
                "human" => "user",
                "gpt" | "bard" | "model" => "assistant",
                other => other,
            };
            return Ok(Self { role: role.to_owned(), content: value.clone(), extra: Map::new() });
        }
        let Some(Value::String(role)) = fields.remove("role") else {
            return Err("it is no message with `role` and `content`: `role` is no text".to_owned());
        };
        let content = fields.remove("content").unwrap_or_default();
        Ok(Self { role, content, extra: fields })
    }
}

/// The special tokens' texts under the names templates know them by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are named as in `tokenizer_config.json`
pub struct SpecialTexts {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub unk_token: Option<String>,
    pub pad_token: Option<String>,
}

impl SpecialTexts {
    /// The names and texts of those that exist.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("unk_token", &self.unk_token),
            ("pad_token", &self.pad_token),
        ]
        .into_iter()
        .filter_map(|(name, text)| Some((name, text.as_deref()?)))
    }
}

/// A compiled chat template.
///
/// ```
/// use bevel_model::chat::{CHATML, ChatTemplate, Message, SpecialTexts};
///
/// let template = ChatTemplate::new(CHATML, SpecialTexts::default())?;
/// let text = template.render(&[Message::new("user", "Hello")], None, true, Default::default())?;
/// assert_eq!(text, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n");
/// # Ok::<(), bevel_model::chat::TemplateError>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    environment: minijinja::Environment<'static>,
    source: String,
    special: SpecialTexts,
}

impl ChatTemplate {
    /// Compiles `source`; `strftime_now` tells the time of the system's clock, in UTC.
    ///
    /// # Errors
    /// Where `source` is no valid Jinja.
    pub fn new(source: &str, special: SpecialTexts) -> Result<Self, TemplateError> {
        Self::with_clock(source, special, DateTime::now)
    }

    /// As [`ChatTemplate::new`], with another clock.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_clock(
        source: &str,
        special: SpecialTexts,
        clock: fn() -> DateTime,
    ) -> Result<Self, TemplateError> {
        let environment = environment::new(source, clock)?;
        Ok(Self { environment, source: source.to_owned(), special })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation.
    ///
    /// `tools` is a list of JSON schemas. `add_generation_prompt` ends the text where the
    /// assistant's answer begins. `extra` holds what this one template understands, such as
    /// `enable_thinking`. Encode the result with `parse_special` and without `add_special`: the
    /// template writes the token that begins a sequence itself.
    ///
    /// # Errors
    /// Where the template refuses the conversation or fails on it.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: Map<String, Value>,
    ) -> Result<String, TemplateError> {
        let mut context = Map::new();
        for (name, text) in self.special.iter() {
            context.insert(name.to_owned(), text.into());
        }
        context.extend(extra);
        context.insert("messages".to_owned(), messages.iter().map(plain).collect());
        context.insert("tools".to_owned(), tools.cloned().unwrap_or_default());
        context
            .insert("documents".to_owned(), context.get("documents").cloned().unwrap_or_default());
        context.insert("add_generation_prompt".to_owned(), add_generation_prompt.into());
        environment::render(&self.environment, &context)
    }
}

/// The message as templates see it: without nulls, and with the reasoning under every name that
/// some template reads it by.
fn plain(message: &Message) -> Value {
    let mut fields = Map::new();
    fields.insert("role".to_owned(), message.role.as_str().into());
    fields.insert("content".to_owned(), message.content.clone());
    fields.extend(message.extra.clone());
    fields.retain(|_, value| !value.is_null());
    let names = ["reasoning_content", "thinking", "reasoning"];
    if let Some(reasoning) = names.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    Value::Object(fields)
}
