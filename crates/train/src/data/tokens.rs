//! Texts and conversations to tokens, of which some are to be learnt.

use bevel_model::chat::Message;
use serde_json::{Map, Value};

use super::read::Made;
use super::shape::{Chat, Shape};
use super::{Example, Reader};

/// Text, and whether it is to be learnt.
pub(super) struct Part {
    pub(super) text: String,
    pub(super) learnt: bool,
}

impl Reader<'_> {
    /// The tokens of what a record says; `None` where that is nothing to be learnt.
    pub(super) fn example(&self, shape: Shape) -> Result<Option<Example>, String> {
        let part = |text, learnt| Part { text, learnt };
        match shape {
            Shape::Text(text) => self.plain(vec![part(text, true)]),
            Shape::Completion { prompt, completion } => {
                self.plain(vec![part(prompt, self.whole), part(completion, true)])
            }
            Shape::Chat(chat) => self.conversation(&chat, self.whole),
        }
    }

    /// Cuts an example off at the context.
    pub(super) fn limited(&self, mut example: Example) -> Made<Example> {
        let cut = example.tokens.len() > self.context;
        example.tokens.truncate(self.context);
        example.learnt.truncate(self.context);
        if let Some(first) = example.learnt.first_mut() {
            *first = false;
        }
        Made { item: example.learnt.contains(&true).then_some(example), cut }
    }

    /// Texts one after the other, and the end of a text. `None` where what is to be learnt is blank.
    pub(super) fn plain(&self, parts: Vec<Part>) -> Result<Option<Example>, String> {
        if parts.iter().all(|part| !part.learnt || part.text.trim().is_empty()) {
            return Ok(None);
        }
        let mut example = self.encoded(parts, true)?;
        if let Some(end) = self.tokenizer.eos() {
            example.tokens.push(end);
            example.learnt.push(true);
        }
        Ok(Some(example))
    }

    /// A conversation as the template renders it. An answer is what a rendering has more with the assistant's
    /// message than without, where it was to begin. `None` where all answers are blank.
    pub(super) fn conversation(&self, chat: &Chat, whole: bool) -> Result<Option<Example>, String> {
        let Chat { messages, tools, from } = chat;
        let template =
            self.template.ok_or("the model has no chat template: give one by --chat-template")?;
        if tools.is_some() && !template.source().contains("tools") {
            return Err(
                "the chat template has no place for `tools`: give another one by --chat-template"
                    .to_owned(),
            );
        }
        let render = |messages: &[Message], begin: bool| {
            let rendered = template.render(messages, tools.as_ref(), begin, Map::new());
            rendered.map_err(|error| error.to_string())
        };
        let is_answer = |message: &Message| message.role == "assistant";
        let answers = messages[*from..].iter().filter(|message| is_answer(message));
        if answers.clone().count() == 0 {
            return Err("no message that is to be learnt is the assistant's".to_owned());
        }
        if !whole && answers.into_iter().all(is_blank) {
            return Ok(None);
        }
        let (mut parts, mut done) = (Vec::new(), String::new());
        for (i, message) in messages.iter().enumerate().skip(*from) {
            if !is_answer(message) {
                continue;
            }
            let (before, after) = (render(&messages[..i], true)?, render(&messages[..=i], false)?);
            let asked = before.strip_prefix(&done);
            let (Some(asked), Some(answer)) = (asked, after.strip_prefix(&before)) else {
                return Err(format!(
                    "the chat template renders what comes before message {} in another way after it",
                    i + 1
                ));
            };
            parts.push(Part { text: asked.to_owned(), learnt: whole });
            parts.push(Part { text: answer.to_owned(), learnt: true });
            done = after;
        }
        self.encoded(parts, false).map(Some)
    }

    /// The tokens of each part. A template's marks become what they stand for; in `plain` text they are text.
    fn encoded(&self, parts: Vec<Part>, plain: bool) -> Result<Example, String> {
        let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
        for (i, Part { text, learnt: is_learnt }) in parts.into_iter().enumerate() {
            let begins = plain && i == 0;
            let encoded = self.tokenizer.encode(&text, begins, !plain);
            tokens.extend(encoded.map_err(|error| error.to_string())?);
            learnt.resize(tokens.len(), is_learnt);
        }
        Ok(Example { tokens, learnt })
    }
}

/// Whether an answer neither says nor calls anything.
fn is_blank(message: &Message) -> bool {
    let says = match &message.content {
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(parts) => !parts.is_empty(),
        _ => false,
    };
    !says && message.extra.values().all(Value::is_null)
}
