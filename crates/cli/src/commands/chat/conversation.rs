//! The messages of a conversation, and the prompt they make.

use anyhow::{Result, bail};
use bevel_model::chat::{ChatTemplate, Message};
use bevel_model::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Turn {
    pub(super) role: String,
    pub(super) content: String,
}

/// Messages that alternate between `user` and `assistant`, after instructions, if any.
pub(super) struct Conversation<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    system: Option<String>,
    turns: Vec<Turn>,
    context: usize,
    dropped: usize,
}

/// What a saved conversation looks like.
#[derive(Serialize, Deserialize)]
struct Saved {
    messages: Vec<Turn>,
}

impl<'a> Conversation<'a> {
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        system: Option<String>,
        context: usize,
    ) -> Self {
        Self { tokenizer, template, system, turns: Vec::new(), context, dropped: 0 }
    }

    pub(super) fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    pub(super) fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// Messages that were dropped so far.
    pub(super) fn dropped(&self) -> usize {
        self.dropped
    }

    pub(super) fn push(&mut self, role: &str, content: &str) {
        self.turns.push(Turn { role: role.to_owned(), content: content.to_owned() });
    }

    /// Takes back a message of the user that could not be answered.
    pub(super) fn pop_unanswered(&mut self) {
        self.turns.pop_if(|turn| turn.role == "user");
    }

    /// Forgets the last answer; false where there is none.
    pub(super) fn forget_answer(&mut self) -> bool {
        self.turns.pop_if(|turn| turn.role == "assistant").is_some()
    }

    pub(super) fn clear(&mut self) {
        self.turns.clear();
    }

    pub(super) fn set_system(&mut self, text: Option<String>) {
        self.system = text;
    }

    /// The prompt's tokens. The oldest turns are dropped until there is room for an answer: a quarter
    /// of the context, or 256 tokens where that is less.
    ///
    /// # Errors
    /// Where the last message alone does not fit, and those of the template.
    pub(super) fn prompt(&mut self) -> Result<Vec<u32>> {
        let room = (self.context / 4).clamp(1, 256);
        loop {
            let tokens = self.encode()?;
            if tokens.len() + room <= self.context {
                return Ok(tokens);
            }
            // A turn is a message of the user with all that follows up to the next one.
            let next = self.turns.iter().skip(1).position(|turn| turn.role == "user");
            let Some(next) = next else {
                bail!(
                    "the message is too long: with it the prompt has {} tokens, the context holds {} and an answer needs some; shorten it, or start with a larger --ctx",
                    tokens.len(),
                    self.context
                );
            };
            self.turns.drain(..=next);
            self.dropped += next + 1;
        }
    }

    fn encode(&self) -> Result<Vec<u32>> {
        let messages: Vec<Message> =
            self.all().map(|t| Message::new(&t.role, &t.content)).collect();
        let text = self.template.render(&messages, None, true, Default::default())?;
        Ok(self.tokenizer.encode(&text, false, true)?)
    }

    /// All messages, the instructions first.
    fn all(&self) -> impl Iterator<Item = Turn> {
        let system = self
            .system
            .iter()
            .map(|text| Turn { role: "system".to_owned(), content: text.clone() });
        system.chain(self.turns.iter().cloned())
    }

    pub(super) fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(&Saved { messages: self.all().collect() })?;
        text.push('\n');
        Ok(text)
    }

    /// Takes over a saved conversation and returns the number of its messages.
    pub(super) fn load_json(&mut self, text: &str) -> Result<usize> {
        let Saved { messages } = serde_json::from_str(text)?;
        let count = messages.len();
        let mut turns = messages.into_iter().peekable();
        let system = turns.next_if(|turn| turn.role == "system").map(|turn| turn.content);
        let turns: Vec<Turn> = turns.collect();
        if let Some(turn) = turns.iter().find(|t| t.role != "user" && t.role != "assistant") {
            bail!("it has a message of role `{}`; expected `user` or `assistant`", turn.role);
        }
        (self.system, self.turns) = (system, turns);
        Ok(count)
    }
}
