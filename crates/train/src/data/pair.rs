//! Pairs for learning from preferences (DPO, arXiv 2305.18290): two answers to one prompt, of which the first was
//! preferred. The shapes are TRL's.

use bevel_model::chat::Message;
use serde_json::Value;

use super::read::{Item, Made};
use super::shape::{Chat, Record};
use super::tokens::Part;
use super::{Example, Examples, Reader};
use crate::Result;

/// Two examples that begin with the same prompt, of which nothing is learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The prompt and the answer that was preferred.
    pub chosen: Example,
    /// The prompt and the other answer.
    pub rejected: Example,
}

/// What a record says.
enum Shape {
    Text { prompt: String, answers: [String; 2] },
    Chats([Chat; 2]),
}

impl Shape {
    fn of(record: Value) -> Result<Self, String> {
        let mut record = Record::new(record)?;
        if !record.has("chosen") || !record.has("rejected") {
            return Err(record.lacks("expected the members `chosen` and `rejected`"));
        }
        let lists = record.is_list("chosen") || record.is_list("rejected");
        if !lists && !record.has("prompt") {
            return Err(record.lacks("expected `prompt` beside the texts `chosen` and `rejected`"));
        }
        if !lists && !record.is_list("prompt") {
            let prompt = record.text("prompt")?;
            return Ok(Self::Text {
                prompt,
                answers: [record.text("chosen")?, record.text("rejected")?],
            });
        }
        let tools = record.tools()?;
        let mut answers = [record.messages("chosen")?, record.messages("rejected")?];
        let alike = answers[0].iter().zip(&answers[1]).take_while(|(a, b)| a == b).count();
        let mut prompt: Vec<Message> = answers[0].drain(..alike).collect();
        answers[1].drain(..alike);
        if record.is_list("prompt") {
            let mut before = record.messages("prompt")?;
            before.append(&mut prompt);
            prompt = before;
        } else if prompt.is_empty() && record.has("prompt") {
            // Where the conversations have the prompt themselves, the text is the same once more.
            prompt.push(Message::new("user", &record.text("prompt")?));
        }
        if prompt.is_empty() {
            return Err(record.lacks(
                "expected `prompt`, or messages that `chosen` and `rejected` both begin with",
            ));
        }
        let from = prompt.len();
        Ok(Self::Chats(answers.map(|answer| {
            let messages = [prompt.as_slice(), &answer].concat();
            Chat { messages, tools: tools.clone(), from }
        })))
    }
}

impl Item for Pair {
    const MEMBERS: &'static [&'static str] = &["prompt", "chosen", "rejected", "tools"];

    fn of(reader: &Reader<'_>, record: Value) -> Result<Made<Self>, String> {
        let [chosen, rejected] = match Shape::of(record)? {
            Shape::Text { prompt, answers } => answers.map(|answer| {
                let part = |text, learnt| Part { text, learnt };
                reader.plain(vec![part(prompt.clone(), false), part(answer, true)])
            }),
            Shape::Chats(chats) => chats.map(|chat| match chat.messages.len() == chat.from {
                true => Ok(None),
                false => reader.conversation(&chat, false),
            }),
        };
        let (Some(chosen), Some(rejected)) = (chosen?, rejected?) else {
            return Ok(Made { item: None, cut: false });
        };
        let (chosen, rejected) = (reader.limited(chosen), reader.limited(rejected));
        let cut = chosen.cut || rejected.cut;
        let item =
            chosen.item.zip(rejected.item).map(|(chosen, rejected)| Self { chosen, rejected });
        // Nothing is to be learnt of two answers that are the same.
        Ok(Made { item: item.filter(|pair| pair.chosen != pair.rejected), cut })
    }

    fn examples(&self) -> Vec<&Example> {
        vec![&self.chosen, &self.rejected]
    }

    fn from_examples(next: &mut dyn FnMut() -> Option<Example>) -> Option<Self> {
        Some(Self { chosen: next()?, rejected: next()? })
    }

    fn of_text(_: &Reader<'_>, _: &str, _: &str) -> Option<Result<Examples<Self>>> {
        None
    }
}
