//! How texts begin that a model writes itself, and what follows when one ends.

use bevel_model::chat::Message;
use bevel_model::tokenizer::{TokenKind, Tokenizer};

use super::choice::Random;
use super::records::fixed_template;
use crate::Result;

/// Beginnings for a model's texts.
///
/// Where the model has a chat template, every second sequence is a conversation: the template up to
/// where the user speaks, the model's idea of a question, the template up to the answer, the answer
/// (Magpie, arXiv 2406.08464). The others begin with the mark that begins a text, with the one that
/// parts texts, or, for a model that knows neither, with any token (LLM-QAT, arXiv 2305.17888).
pub(super) struct Script {
    /// The tokens before a plain text; empty: any token.
    start: Vec<u32>,
    chat: Option<Chat>,
    /// Tokens that a text may begin with where nothing marks beginnings.
    words: Vec<u32>,
}

struct Chat {
    /// Before the question.
    head: Vec<u32>,
    /// Between question and answer.
    between: Vec<u32>,
    /// After the answer.
    tail: Vec<u32>,
}

/// Where a sequence is in its script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Plain,
    Question,
    Answer,
}

impl Script {
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let mark = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        let separator = || {
            tokenizer.id("<|endoftext|>").filter(|&id| tokenizer.is_special(id)).or(tokenizer.eos())
        };
        let start: Vec<u32> = mark.or_else(separator).into_iter().collect();
        let is_word = |&id: &u32| tokenizer.kind(id) == Some(TokenKind::Normal);
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let words = if start.is_empty() { ids.filter(is_word).collect() } else { Vec::new() };
        Ok(Self { start, chat: Chat::new(tokenizer)?, words })
    }

    /// The tokens that sequence `index` begins with.
    pub(super) fn begin(&self, index: usize, random: &mut Random) -> (Turn, Vec<u32>) {
        match &self.chat {
            Some(chat) if index.is_multiple_of(2) => (Turn::Question, chat.head.clone()),
            _ => (Turn::Plain, self.start_of_text(random)),
        }
    }

    /// The tokens after a text that ended, with `end` where the model ended it itself.
    pub(super) fn go_on(
        &self,
        turn: Turn,
        end: Option<u32>,
        random: &mut Random,
    ) -> (Turn, Vec<u32>) {
        match (&self.chat, turn) {
            (Some(chat), Turn::Question) => (Turn::Answer, chat.between.clone()),
            (Some(chat), Turn::Answer) => {
                (Turn::Question, [chat.tail.as_slice(), &chat.head].concat())
            }
            _ => {
                let start = self.start_of_text(random);
                let mut next: Vec<u32> =
                    end.filter(|id| start.first() != Some(id)).into_iter().collect();
                next.extend(start);
                (Turn::Plain, next)
            }
        }
    }

    fn start_of_text(&self, random: &mut Random) -> Vec<u32> {
        match self.words.is_empty() {
            true => self.start.clone(),
            false => vec![self.words[random.below(self.words.len() as u64) as usize]],
        }
    }
}

impl Chat {
    /// Takes the template apart around a question and an answer; `None` where there is none, or one
    /// that does not write them as they are.
    fn new(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        const QUESTION: &str = "QUESTION7361";
        const ANSWER: &str = "ANSWER7361";
        let Ok(template) = fixed_template(tokenizer) else { return Ok(None) };
        let messages = [Message::new("user", QUESTION), Message::new("assistant", ANSWER)];
        let Ok(text) = template.render(&messages, None, false, Default::default()) else {
            return Ok(None);
        };
        let Some((head, rest)) = text.split_once(QUESTION) else { return Ok(None) };
        let Some((between, tail)) = rest.split_once(ANSWER) else { return Ok(None) };
        if tail.contains(QUESTION) || head.is_empty() || between.is_empty() {
            return Ok(None);
        }
        let encode = |text| tokenizer.encode(text, false, true);
        Ok(Some(Self { head: encode(head)?, between: encode(between)?, tail: encode(tail)? }))
    }
}
