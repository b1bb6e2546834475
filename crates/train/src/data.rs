//! What is learnt from: a line of JSON an example, or a text.
//!
//! | members | what is learnt |
//! |---|---|
//! | `text` | all of it |
//! | `prompt`, `completion` | the completion |
//! | `messages`: `role`, `content` | what the assistant says, in the model's chat template |
//! | `conversations`: `from`, `value` (ShareGPT) | the same |
//! | `instruction`, `input`, `output` (Alpaca) | the same, of two messages |

use bevel_model::chat::{ChatTemplate, Message};
use bevel_model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::Map;

use crate::{Error, Result};

/// Tokens, and which of them are to be learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each is to be predicted. The first one never is.
    pub learnt: Vec<bool>,
}

/// What makes tokens of texts.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What conversations are rendered by.
    pub template: Option<&'a ChatTemplate>,
    /// Most tokens of an example; what is longer is cut off.
    pub context: usize,
    /// Prompts are learnt as well.
    pub whole: bool,
}

/// Examples, and what became of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    /// Those of which something can be learnt.
    pub all: Vec<Example>,
    /// How many were cut off.
    pub cut: usize,
    /// How many had nothing to be learnt, or nothing before they were cut off.
    pub empty: usize,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Text {
        text: String,
    },
    Prompt {
        prompt: String,
        completion: String,
    },
    Messages {
        messages: Vec<Message>,
    },
    ShareGpt {
        conversations: Vec<Turn>,
    },
    Alpaca {
        instruction: String,
        #[serde(default)]
        input: String,
        output: String,
    },
}

#[derive(Deserialize)]
struct Turn {
    from: String,
    value: String,
}

/// Text, and whether it is to be learnt.
struct Part {
    text: String,
    learnt: bool,
}

impl Reader<'_> {
    /// Examples of lines of JSON.
    ///
    /// # Errors
    /// [`Error::Data`] names the line.
    pub fn lines(&self, text: &str, source: &str) -> Result<Examples> {
        let mut examples = Examples::default();
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim().is_empty() {
                continue;
            }
            let wrong =
                |problem: String| Error::Data { source_name: source.to_owned(), number, problem };
            let line: Line = serde_json::from_str(line).map_err(|error| match error.classify() {
                serde_json::error::Category::Data => wrong(
                    "expected the members `text`, `prompt` and `completion`, `messages`, `conversations`, or \
                     `instruction` and `output`"
                        .to_owned(),
                ),
                _ => wrong(format!("it is not JSON: {error}")),
            })?;
            self.add(self.tokens(line).map_err(wrong)?, &mut examples);
        }
        Ok(examples)
    }

    /// Examples of a text: pieces of it as long as the context.
    ///
    /// # Errors
    /// Where the tokenizer fails.
    pub fn text(&self, text: &str, source: &str) -> Result<Examples> {
        let wrong = |problem| Error::Data { source_name: source.to_owned(), number: 1, problem };
        let tokens = self.tokenizer.encode(text, true, false).map_err(|e| wrong(e.to_string()))?;
        let mut examples = Examples::default();
        // The last token of a piece begins the next one, and is learnt once.
        for start in (0..tokens.len()).step_by(self.context.saturating_sub(1).max(1)) {
            let piece = &tokens[start..tokens.len().min(start + self.context)];
            self.add((piece.to_vec(), vec![true; piece.len()]), &mut examples);
        }
        Ok(examples)
    }

    fn add(&self, (mut tokens, mut learnt): (Vec<u32>, Vec<bool>), examples: &mut Examples) {
        if tokens.len() > self.context {
            examples.cut += 1;
            tokens.truncate(self.context);
            learnt.truncate(self.context);
        }
        if let Some(first) = learnt.first_mut() {
            *first = false;
        }
        match learnt.contains(&true) {
            true => examples.all.push(Example { tokens, learnt }),
            false => examples.empty += 1,
        }
    }

    fn tokens(&self, line: Line) -> Result<(Vec<u32>, Vec<bool>), String> {
        let text = |role: &str, text: &str| Message::new(role, text);
        let part = |text: String, learnt| Part { text, learnt };
        let messages = match line {
            Line::Text { text } => return self.plain(vec![part(text, true)]),
            Line::Prompt { prompt, completion } => {
                return self.plain(vec![part(prompt, self.whole), part(completion, true)]);
            }
            Line::Messages { messages } => messages,
            Line::ShareGpt { conversations } => conversations
                .iter()
                .map(|Turn { from, value }| match from.as_str() {
                    "human" | "user" => Ok(text("user", value)),
                    "gpt" | "assistant" => Ok(text("assistant", value)),
                    "system" | "tool" => Ok(text(from, value)),
                    _ => Err(format!("`from` is `{from}`, and not human, gpt or system")),
                })
                .collect::<Result<_, _>>()?,
            Line::Alpaca { instruction, input, output } => {
                let question = match input.trim() {
                    "" => instruction,
                    input => format!("{instruction}\n\n{input}"),
                };
                vec![text("user", &question), text("assistant", &output)]
            }
        };
        self.conversation(&messages)
    }

    /// Texts one after the other, and the end of a text.
    fn plain(&self, parts: Vec<Part>) -> Result<(Vec<u32>, Vec<bool>), String> {
        let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
        for (i, Part { text, learnt: is_learnt }) in parts.into_iter().enumerate() {
            let encoded = self.tokenizer.encode(&text, i == 0, false).map_err(|e| e.to_string())?;
            learnt.resize(learnt.len() + encoded.len(), is_learnt);
            tokens.extend(encoded);
        }
        if let Some(end) = self.tokenizer.eos() {
            tokens.push(end);
            learnt.push(true);
        }
        Ok((tokens, learnt))
    }

    /// A conversation as the template renders it. An answer is what a rendering has more with the assistant's
    /// message than without, where it was to begin.
    fn conversation(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<bool>), String> {
        let template =
            self.template.ok_or("the model has no chat template: give one by --chat-template")?;
        let render = |messages: &[Message], begin: bool| {
            template.render(messages, None, begin, Map::new()).map_err(|error| error.to_string())
        };
        let (mut parts, mut done) = (Vec::new(), String::new());
        for (i, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let (before, after) = (render(&messages[..i], true)?, render(&messages[..=i], false)?);
            let asked = before.strip_prefix(&done);
            let (Some(asked), Some(answer)) = (asked, after.strip_prefix(&before)) else {
                return Err(format!(
                    "the chat template renders what comes before message {i} in another way after it"
                ));
            };
            parts.push(Part { text: asked.to_owned(), learnt: self.whole });
            parts.push(Part { text: answer.to_owned(), learnt: true });
            done = after;
        }
        if parts.is_empty() {
            return Err("no message is the assistant's".to_owned());
        }
        let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
        for Part { text, learnt: is_learnt } in parts {
            let encoded = self.tokenizer.encode(&text, false, true).map_err(|e| e.to_string())?;
            learnt.resize(learnt.len() + encoded.len(), is_learnt);
            tokens.extend(encoded);
        }
        Ok((tokens, learnt))
    }
}
