//! What a model thinks before it answers, between `<think>` and `</think>`: Qwen3, DeepSeek-R1 and others.

use bevel_model::chat::ChatTemplate;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Takes what was thought out of an answer.
#[derive(Clone, Debug)]
pub(crate) struct ThoughtParser {
    state: State,
    /// What could be a mark, or white space around thoughts.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space came.
    Before,
    /// Nothing but white space was thought.
    Opened,
    Within,
    /// The answer has not begun.
    Ended,
    Answer,
}

impl ThoughtParser {
    /// For answers to `prompt` of a model with this template; `None` where it does not think.
    pub(crate) fn new(template: &ChatTemplate, prompt: &str) -> Option<Self> {
        if !template.source().contains(CLOSE) {
            return None;
        }
        // Some templates begin the thoughts.
        let begun = prompt.trim_end().ends_with(OPEN);
        let state = if begun { State::Opened } else { State::Before };
        Some(Self { state, held: String::new() })
    }

    /// Takes text, the last of it where `ended`: thoughts and answer that are certain now.
    pub(crate) fn push(&mut self, text: &str, ended: bool) -> (String, String) {
        self.held.push_str(text);
        let (mut thoughts, mut answer) = (String::new(), String::new());
        if self.state == State::Before {
            let written = self.held.trim_start();
            if let Some(rest) = written.strip_prefix(OPEN) {
                (self.held, self.state) = (rest.to_owned(), State::Opened);
            } else if ended || !OPEN.starts_with(written) {
                self.state = State::Answer;
            }
        }
        if self.state == State::Opened {
            self.held = self.held.trim_start().to_owned();
            if !self.held.is_empty() {
                self.state = State::Within;
            }
        }
        if self.state == State::Within {
            let found = self.held.find(CLOSE);
            let certain = match found {
                Some(at) => self.held[..at].trim_end().len(),
                None if ended => self.held.len(),
                None => {
                    let mark = (1..CLOSE.len()).rev().find(|&n| self.held.ends_with(&CLOSE[..n]));
                    self.held[..self.held.len() - mark.unwrap_or(0)].trim_end().len()
                }
            };
            thoughts = self.held.drain(..certain).collect();
            if found.is_some() {
                let mark = self.held.find(CLOSE).map_or(0, |at| at + CLOSE.len());
                self.held.drain(..mark);
                self.state = State::Ended;
            }
        }
        if self.state == State::Ended {
            self.held = self.held.trim_start().to_owned();
            if !self.held.is_empty() {
                self.state = State::Answer;
            }
        }
        if self.state == State::Answer {
            answer = std::mem::take(&mut self.held);
        }
        (thoughts, answer)
    }

    /// Whether the answer has not begun.
    pub(crate) fn is_thinking(&self) -> bool {
        matches!(self.state, State::Opened | State::Within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever pieces a text comes in, the same is found.
    #[track_caller]
    fn check(state: State, text: &str, expected: (&str, &str)) {
        for size in [1, 2, 3, 7, 1000] {
            let mut parser = ThoughtParser { state, held: String::new() };
            let (mut thoughts, mut answer) = (String::new(), String::new());
            let characters: Vec<char> = text.chars().collect();
            let pieces = characters.chunks(size).map(|piece| piece.iter().collect::<String>());
            for (piece, ended) in pieces.map(|piece| (piece, false)).chain([(String::new(), true)])
            {
                let (thought, said) = parser.push(&piece, ended);
                thoughts += &thought;
                answer += &said;
            }
            assert_eq!((&thoughts[..], &answer[..]), expected, "{text:?} in pieces of {size}");
        }
    }

    #[test]
    fn thoughts_are_told_from_answers() {
        use State::{Before, Opened};
        check(
            Before,
            "<think>\nWell, é < 5.\n\nYes.\n</think>\n\nHello.",
            ("Well, é < 5.\n\nYes.", "Hello."),
        );
        check(Before, "\n<think></think>Hello </think>.", ("", "Hello </think>."));
        check(Before, "Hello. <think>no</think>", ("", "Hello. <think>no</think>"));
        check(Before, " <thin ice", ("", " <thin ice"));
        check(Before, "<thi", ("", "<thi"));
        check(Opened, "\nSo: </thin </think> a\n", ("So: </thin", "a\n"));
        check(Opened, "cut off </thi", ("cut off </thi", ""));
        check(Opened, "\n\n", ("", ""));
        check(Before, "", ("", ""));
    }
}
