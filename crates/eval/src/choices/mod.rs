//! Multiple choice: which of several answers a model finds the likeliest.
//!
//! The log-likelihood of a choice is that of its tokens after the prompt. Prompt and choice are cut into
//! tokens together, as a text is, and every token after the longest beginning that all choices share with
//! the prompt counts: where a choice melts into the prompt's last token, all choices are scored from before
//! that token, and stay comparable.
//!
//! Long answers are less likely than short ones, so the sum is also divided by the choice's length. As in
//! lm-evaluation-harness, `acc` takes the greatest sum and `acc_norm` the greatest sum by length, here in
//! UTF-8 bytes; by tokens is a third way.

mod question;
mod score;

use std::time::Instant;

use bevel_kernels::{Cpu, KvType};
use bevel_model::chat::{ChatTemplate, Message};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Model, Session};
use serde::Serialize;

use crate::{Error, Estimate, Mean, Result};

pub use question::{Ask, Question};
pub use score::Encoded;

/// How questions are asked.
#[derive(Clone, Copy, Debug)]
pub struct ChoicesConfig {
    /// Tokens of the context; `None`: as many as the longest question takes.
    pub context: Option<usize>,
    /// Storage of keys and values.
    pub kv_type: KvType,
}

/// What a model answered.
#[derive(Clone, Debug, Serialize)]
pub struct Choices {
    /// Over all questions.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Over the questions of each subject, in order of appearance; empty where no question has one.
    pub subjects: Vec<Subject>,
    /// Each question's answer.
    pub answers: Vec<Answer>,
    /// Tokens run through the model; what questions and choices begin with in common runs once.
    pub tokens: u64,
    /// Wall time.
    pub seconds: f64,
}

/// How many questions were answered rightly, with the standard error of each part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// Questions asked.
    pub questions: u64,
    /// By log-likelihood.
    pub acc: Estimate,
    /// By log-likelihood divided by the choice's bytes.
    pub acc_norm: Estimate,
    /// By log-likelihood divided by the choice's tokens.
    pub acc_tokens: Estimate,
}

/// The questions of one subject.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Subject {
    /// Its name.
    pub subject: String,
    /// How well they were answered.
    #[serde(flatten)]
    pub accuracy: Accuracy,
}

/// What a model made of one question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The question's name, or its line in the file.
    pub id: String,
    /// The question's subject.
    pub subject: Option<String>,
    /// Position of the right choice.
    pub answer: usize,
    /// The choice with the greatest log-likelihood.
    pub chosen: usize,
    /// The same, divided by bytes.
    pub chosen_by_bytes: usize,
    /// The same, divided by tokens.
    pub chosen_by_tokens: usize,
    /// Of each choice, nats.
    pub log_likelihoods: Vec<f64>,
}

/// How far two models agree.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// The part of the questions for which both choose the same by log-likelihood.
    pub acc: Estimate,
    /// The same by log-likelihood divided by bytes.
    pub acc_norm: Estimate,
    /// acc of the model − acc of the base; the error is that of the difference of each question.
    pub acc_difference: Estimate,
    /// The same for acc_norm.
    pub acc_norm_difference: Estimate,
}

impl ChoicesConfig {
    /// Puts `questions` to `model`, through `template` where one is given. `progress` is told how many
    /// are done.
    ///
    /// # Errors
    /// [`Error::Question`] where a question does not fit into the context or nothing stands before its
    /// choices, and those of the model, the tokenizer and the template.
    pub fn run(
        &self,
        model: &Model,
        tokenizer: &Tokenizer,
        cpu: &Cpu,
        questions: &[Question],
        template: Option<&ChatTemplate>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Choices> {
        let start = Instant::now();
        let encoded = questions
            .iter()
            .map(|question| Encoded::new(question, tokenizer, template))
            .collect::<Result<Vec<_>>>()?;
        let needed = encoded.iter().map(Encoded::context).max().unwrap_or(1);
        let context = self.context.unwrap_or(needed);
        if let Some((question, _)) =
            questions.iter().zip(&encoded).find(|(_, encoded)| encoded.context() > context)
        {
            let problem = format!(
                "the question takes more than {context} tokens; give --ctx {needed}, or leave it out"
            );
            return Err(Error::Question { line: question.line, problem });
        }
        let mut session = Session::new(model, cpu, context, self.kv_type)?;
        let vocab = model.config().vocab_size;
        let (mut answers, mut tokens) = (Vec::with_capacity(questions.len()), 0);
        for (i, (question, encoded)) in questions.iter().zip(&encoded).enumerate() {
            let (log_likelihoods, run) = encoded.score(&mut session, vocab, cpu)?;
            tokens += run as u64;
            answers.push(Answer::new(question, encoded, log_likelihoods));
            progress(i + 1);
        }
        let seconds = start.elapsed().as_secs_f64();
        let (accuracy, subjects) = (Accuracy::of(answers.iter()), Subject::all(&answers));
        Ok(Choices { accuracy, subjects, answers, tokens, seconds })
    }
}

impl Choices {
    /// How far these answers agree with those of `base` to the same questions.
    ///
    /// # Panics
    /// Where the numbers of questions differ.
    pub fn agreement(&self, base: &Choices) -> Agreement {
        assert_eq!(self.answers.len(), base.answers.len(), "the same questions");
        let part = |value: &dyn Fn(&Answer, &Answer) -> f64| {
            let mut mean = Mean::default();
            mean.extend(self.answers.iter().zip(&base.answers).map(|(a, b)| value(a, b)));
            Estimate::of(&mean)
        };
        let right = |answer: &Answer, chosen: usize| one_if(answer.answer == chosen);
        Agreement {
            acc: part(&|a, b| one_if(a.chosen == b.chosen)),
            acc_norm: part(&|a, b| one_if(a.chosen_by_bytes == b.chosen_by_bytes)),
            acc_difference: part(&|a, b| right(a, a.chosen) - right(b, b.chosen)),
            acc_norm_difference: part(&|a, b| {
                right(a, a.chosen_by_bytes) - right(b, b.chosen_by_bytes)
            }),
        }
    }
}

impl Accuracy {
    fn of<'a>(answers: impl Iterator<Item = &'a Answer> + Clone) -> Self {
        let part = |chosen: fn(&Answer) -> usize| {
            let mut mean = Mean::default();
            mean.extend(answers.clone().map(|a| one_if(chosen(a) == a.answer)));
            Estimate::of(&mean)
        };
        Self {
            questions: answers.clone().count() as u64,
            acc: part(|a| a.chosen),
            acc_norm: part(|a| a.chosen_by_bytes),
            acc_tokens: part(|a| a.chosen_by_tokens),
        }
    }
}

impl Subject {
    fn all(answers: &[Answer]) -> Vec<Self> {
        let mut names: Vec<&str> = Vec::new();
        for name in answers.iter().filter_map(|a| a.subject.as_deref()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
            .into_iter()
            .map(|name| Self {
                subject: name.to_owned(),
                accuracy: Accuracy::of(
                    answers.iter().filter(|a| a.subject.as_deref() == Some(name)),
                ),
            })
            .collect()
    }
}

impl Answer {
    fn new(question: &Question, encoded: &Encoded, log_likelihoods: Vec<f64>) -> Self {
        let by = |length: &dyn Fn(usize) -> usize| {
            let score = |i: usize| log_likelihoods[i] / length(i) as f64;
            (1..log_likelihoods.len())
                .fold(0, |best, i| if score(i) > score(best) { i } else { best })
        };
        Self {
            id: question.id.clone().unwrap_or_else(|| question.line.to_string()),
            subject: question.subject.clone(),
            answer: question.answer,
            chosen: by(&|_| 1),
            chosen_by_bytes: by(&|i| question.choices[i].len()),
            chosen_by_tokens: by(&|i| encoded.scored(i)),
            log_likelihoods,
        }
    }
}

fn one_if(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

impl Ask {
    /// The text that a choice follows.
    fn prompt(&self) -> String {
        match self {
            Ask::Prompt(prompt) => prompt.clone(),
            Ask::Question(question) => format!("Question: {question}\nAnswer:"),
        }
    }

    /// What a user says who asks this.
    fn message(&self) -> Message {
        let (Ask::Prompt(text) | Ask::Question(text)) = self;
        Message::new("user", text)
    }
}
