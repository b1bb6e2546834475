use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// A question with its possible answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Line of the file, from 1.
    pub line: usize,
    /// Its name, where it has one.
    pub id: Option<String>,
    /// What it is about, where that is said.
    pub subject: Option<String>,
    /// What is asked.
    pub ask: Ask,
    /// Possible answers, at least two, none of them empty.
    pub choices: Vec<String>,
    /// Position of the right one.
    pub answer: usize,
}

/// What a model is shown before a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A text that the choices continue.
    Prompt(String),
    /// A question that the choices answer.
    Question(String),
}

#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    subject: Option<String>,
    question: Option<String>,
    prompt: Option<String>,
    choices: Vec<String>,
    answer: Value,
}

impl Question {
    /// Reads questions, one JSON object a line; empty lines are left out.
    ///
    /// # Errors
    /// [`Error::Question`] with the line that is none.
    pub fn parse_jsonl(text: &str) -> Result<Vec<Self>> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let questions: Vec<Self> = lines
            .map(|(i, line)| {
                let line_number = i + 1;
                Self::parse(line, line_number)
                    .map_err(|problem| Error::Question { line: line_number, problem })
            })
            .collect::<Result<_>>()?;
        if questions.is_empty() {
            let problem = "there is no question; each line is one as a JSON object".to_owned();
            return Err(Error::Question { line: 1, problem });
        }
        Ok(questions)
    }

    fn parse(text: &str, line: usize) -> Result<Self, String> {
        let parsed: Line = serde_json::from_str(text).map_err(|error| {
            // Within one line, the parser's own line number says nothing.
            let told = error.to_string();
            let told = told.split(" at line ").next().unwrap_or_default();
            format!("{told} (column {})", error.column())
        })?;
        let ask = match (parsed.question, parsed.prompt) {
            (Some(question), None) => Ask::Question(question),
            (None, Some(prompt)) => Ask::Prompt(prompt),
            (None, None) => return Err("it has neither `question` nor `prompt`".to_owned()),
            (Some(_), Some(_)) => {
                return Err("it has both `question` and `prompt`; one of them is asked".to_owned());
            }
        };
        let count = parsed.choices.len();
        if count < 2 {
            return Err(format!("`choices` has {count} entries; expected at least 2"));
        }
        if let Some(i) = parsed.choices.iter().position(|choice| choice.trim().is_empty()) {
            return Err(format!("choice {i} is empty"));
        }
        let answer =
            position(&parsed.answer).filter(|&answer| answer < count).ok_or_else(|| {
                format!(
                    "`answer` is {}; expected a number from 0 to {} or a letter from A to {}",
                    parsed.answer,
                    count - 1,
                    char::from(b'A' + (count - 1).min(25) as u8)
                )
            })?;
        let id = parsed.id.map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_owned));
        Ok(Self { line, id, subject: parsed.subject, ask, choices: parsed.choices, answer })
    }
}

/// The position that a number, counted from 0, or a letter stands for.
fn position(answer: &Value) -> Option<usize> {
    match answer {
        Value::Number(number) => usize::try_from(number.as_u64()?).ok(),
        Value::String(text) => match text.trim().as_bytes() {
            [letter] if letter.is_ascii_alphabetic() => {
                Some(usize::from(letter.to_ascii_uppercase() - b'A'))
            }
            _ => None,
        },
        _ => None,
    }
}
