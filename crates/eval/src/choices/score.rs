use std::ops::Range;

use bevel_kernels::{Cpu, log_sum_exp};
use bevel_model::Session;
use bevel_model::chat::ChatTemplate;
use bevel_model::tokenizer::Tokenizer;
use serde_json::Map;

use super::Question;
use crate::windows::Window;
use crate::{Error, Result};

/// A question as tokens: for each choice the prompt with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Prompt and choice, `[choices]`.
    tokens: Vec<Vec<u32>>,
    /// Tokens that all begin with, and that are part of the prompt; the rest of each is scored.
    shared: usize,
}

impl Encoded {
    /// Cuts a question into tokens.
    ///
    /// Without a template, a space stands between prompt and choice unless one of them brings white space.
    /// With one, the choice begins the assistant's answer.
    ///
    /// # Errors
    /// [`Error::Question`] where nothing stands before the choices, and those of tokenizer and template.
    pub fn new(
        question: &Question,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Self> {
        let prompt = match template {
            Some(template) => template.render(&[question.ask.message()], None, true, Map::new())?,
            None => question.ask.prompt(),
        };
        // A template writes the token that begins a text itself.
        let bos = tokenizer.bos().filter(|_| template.is_none() && tokenizer.adds_bos());
        let encode = |text: &str| -> Result<Vec<u32>> {
            let mut tokens = Vec::from_iter(bos);
            tokens.extend(tokenizer.encode(text, false, template.is_some())?);
            Ok(tokens)
        };
        let before = encode(&prompt)?;
        let space = |choice: &str| {
            let apart = prompt.ends_with(char::is_whitespace)
                || choice.starts_with(char::is_whitespace)
                || prompt.is_empty();
            if template.is_some() || apart { "" } else { " " }
        };
        let tokens = question
            .choices
            .iter()
            .map(|choice| encode(&format!("{prompt}{}{choice}", space(choice))))
            .collect::<Result<Vec<_>>>()?;
        let shared = tokens.iter().map(|all| common(all, &before)).min().unwrap_or(0);
        if shared == 0 {
            let problem = "nothing stands before the choices: the prompt is empty, and the model has no token that begins a text".to_owned();
            return Err(Error::Question { line: question.line, problem });
        }
        Ok(Self { tokens, shared })
    }

    /// Tokens that a context must hold; the last token of a choice is predicted, not run.
    pub fn context(&self) -> usize {
        self.tokens.iter().map(|tokens| tokens.len() - 1).max().unwrap_or(0)
    }

    /// Tokens of choice `i` that are scored.
    pub fn scored(&self, i: usize) -> usize {
        self.tokens[i].len() - self.shared
    }

    /// The tokens of prompt and choice `i`, and which of them are scored.
    pub fn tokens(&self, i: usize) -> (&[u32], Range<usize>) {
        (&self.tokens[i], self.shared..self.tokens[i].len())
    }

    /// The log-likelihood of each choice in nats, and how many tokens had to be run for it: what the session
    /// holds already is used again.
    pub(super) fn score(
        &self,
        session: &mut Session<'_>,
        vocab: usize,
        cpu: &Cpu,
    ) -> Result<(Vec<f64>, usize)> {
        let (mut sums, mut run) = (Vec::with_capacity(self.tokens.len()), 0);
        for tokens in &self.tokens {
            // The prompt's last token gives the logits for the first that is scored.
            session.reuse(&tokens[..self.shared]);
            let kept = session.tokens().len();
            let window = Window { tokens: kept..tokens.len(), scored: self.shared..tokens.len() };
            let rest = &tokens[kept..];
            run += rest.len() - 1;
            let mut sum = 0.0;
            for step in window.steps(vocab) {
                let logits = session.step(&rest[step.tokens], &step.outputs)?;
                let next = &rest[step.next];
                let mut logs = vec![0.0; next.len()];
                cpu.pool().run_chunks(&mut logs, 1, |row, out| {
                    let logits = &logits[row * vocab..][..vocab];
                    out[0] = f64::from(logits[next[row] as usize]) - log_sum_exp(cpu, logits);
                });
                sum += logs.iter().sum::<f64>();
            }
            sums.push(sum);
        }
        Ok((sums, run))
    }
}

/// How many tokens `a` and `b` begin with in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
