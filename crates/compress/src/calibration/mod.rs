//! What a model is shown while it is measured: token sequences of equal length, from texts, records,
//! a hub's data sets, or sampled from the model itself.
//!
//! 1. `self`: the model writes the sequences, [`CalibrationConfig::sample`].
//! 2. Text files: pieces from all over the text. `text.rs`
//! 3. Records (JSON, JSON Lines, CSV, Parquet): documents or conversations chosen from all of them, one
//!    after another in a stream that is cut. `records.rs`, `choice.rs`
//!
//! All of it follows from the sources, the seed and the model's tokenizer alone, and holds a bounded
//! part of the sources in memory however long they are.

mod choice;
mod held_out;
mod input;
mod record;
mod records;
mod sampled;
mod script;
mod sequences;
mod text;

use std::collections::HashMap;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::str::FromStr;

use bevel_formats::hub::{self, RepoId};
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Model};
use sha2::{Digest, Sha256};

use crate::{Error, Result};
use input::Inputs;

/// What to show to a model.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationConfig {
    /// Where the tokens come from.
    pub source: Source,
    /// Sequences.
    pub samples: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Start of the random numbers that choose among the texts and sample from the model.
    pub seed: u64,
    /// The field of a record that holds its text or its messages. `None` looks for `text`,
    /// `messages`, `conversations`, `prompt` with `completion`, and `instruction` with `output`.
    pub field: Option<String>,
}

impl Default for CalibrationConfig {
    /// 128 sequences of 512 tokens, sampled from the model.
    fn default() -> Self {
        Self { source: Source::Sampled, samples: 128, tokens: 512, seed: 0, field: None }
    }
}

/// Where calibration tokens come from.
///
/// ```
/// use bevel_compress::Source;
/// assert_eq!("self".parse::<Source>()?, Source::Sampled);
/// assert_eq!("notes.txt".parse::<Source>()?, Source::Files(vec!["notes.txt".into()]));
/// assert_eq!("hub:owner/name:train".parse::<Source>()?.to_string(), "hub:owner/name:train");
/// # Ok::<(), bevel_compress::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The model itself: no text is needed.
    Sampled,
    /// Text files, records (`.jsonl`, `.json`, `.csv`, `.parquet`, with `.gz` or `.zst`), directories.
    Files(Vec<PathBuf>),
    /// A data set of a hub. The name's selection, if any, is the split.
    Hub(RepoId),
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.strip_prefix("hub:") {
            Some(name) => Ok(Self::Hub(name.parse::<RepoId>()?)),
            None if text == "self" => Ok(Self::Sampled),
            None => Ok(Self::Files(vec![PathBuf::from(text)])),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sampled => f.write_str("self"),
            Self::Hub(repo) => write!(f, "hub:{repo}"),
            Self::Files(paths) => {
                let names: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
                f.write_str(&names.join(", "))
            }
        }
    }
}

/// The tokens that a model is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// Token ids, in sequences of equal length.
    pub sequences: Vec<Vec<u32>>,
    /// The sha256 of the sequences: each one's length and ids as little-endian u32.
    pub fingerprint: [u8; 32],
    /// What they are, in words.
    pub description: String,
    /// What was odd about the sources, to be shown to the user.
    pub warnings: Vec<String>,
}

impl Calibration {
    /// No sequences.
    fn nothing() -> Self {
        Self::new(Vec::new(), "nothing".to_owned(), Vec::new())
    }

    /// Sequences of token ids, with what they are in words.
    pub fn new(sequences: Vec<Vec<u32>>, description: String, warnings: Vec<String>) -> Self {
        let mut hash = Sha256::new();
        for sequence in &sequences {
            hash.update((sequence.len() as u32).to_le_bytes());
            sequence.iter().for_each(|id| hash.update(id.to_le_bytes()));
        }
        Self { sequences, fingerprint: hash.finalize().into(), description, warnings }
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }
}

/// Brings a hub's data set to this machine: [`hub::fetch_data_set`] with settings. `compress` itself
/// opens no socket.
pub type Fetch<'a> = dyn FnMut(&RepoId) -> hub::Result<Vec<PathBuf>> + 'a;

/// Told how many tokens are sampled, of how many. `Break` ends the run with [`Error::Stopped`].
pub type OnTokens<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

impl CalibrationConfig {
    /// The sequences for a model. Its weights are loaded only where it samples them itself, and
    /// dropped afterwards.
    ///
    /// # Errors
    /// [`Error::Calibration`] where the sources hold too little or what they should not,
    /// [`Error::Hub`], and those of the model.
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        fetch: &mut Fetch<'_>,
        on_tokens: &mut OnTokens<'_>,
    ) -> Result<Calibration> {
        Ok(self.load_with_held_out(checkpoint, cpu, 0, fetch, on_tokens)?.0)
    }

    /// As [`CalibrationConfig::load`], with up to `count` sequences more that have no text in common
    /// with the others: to measure on what was calibrated. There are fewer where the sources hold
    /// little else.
    ///
    /// # Errors
    /// Those of [`CalibrationConfig::load`].
    pub fn load_with_held_out(
        &self,
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        count: usize,
        fetch: &mut Fetch<'_>,
        on_tokens: &mut OnTokens<'_>,
    ) -> Result<(Calibration, Calibration)> {
        // Other random numbers than the calibration's, whatever seed comes next to it.
        let other = |samples: usize| Self { samples, seed: self.seed ^ 1 << 63, ..self.clone() };
        let tokenizer = checkpoint.tokenizer()?;
        let paths = match &self.source {
            Source::Sampled => {
                let again = checkpoint.reopened()?;
                let model = Model::load(again, cpu, &mut |_| ())?;
                let (tokens, more) = (self.samples * self.tokens, count * self.tokens);
                let used = self.sample(&model, cpu, &tokenizer, &mut |done, _| {
                    on_tokens(done, tokens + more)
                })?;
                if count == 0 {
                    return Ok((used, Calibration::nothing()));
                }
                let mut rest = other(count).sample(&model, cpu, &tokenizer, &mut |done, _| {
                    on_tokens(tokens + done, tokens + more)
                })?;
                rest.description = "text that the model wrote, apart from calibration's".to_owned();
                return Ok((used, rest));
            }
            Source::Files(paths) => paths.clone(),
            Source::Hub(repo) => fetch(repo)?,
        };
        self.check(checkpoint.config().context)?;
        let used = self.read(&paths, &tokenizer)?;
        if count == 0 {
            return Ok((used, Calibration::nothing()));
        }
        // Some of them are those that were used.
        let found = other(self.samples + 4 * count).read(&paths, &tokenizer)?;
        let apart = held_out::apart(found.sequences, &used.sequences);
        let chosen = choice::spread(apart.len(), count, self.seed);
        let rest: Vec<Vec<u32>> = chosen.into_iter().map(|i| apart[i].clone()).collect();
        let description = format!("{}, apart from what calibration used", self.source);
        Ok((used, Calibration::new(rest, description, Vec::new())))
    }

    /// The sequences that files and directories hold.
    ///
    /// # Errors
    /// [`Error::Calibration`], [`Error::Format`] and [`Error::Io`].
    pub fn read(&self, paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Calibration> {
        self.check(usize::MAX)?;
        let (found, mut warnings) = match Inputs::find(paths)? {
            Inputs::Text(files) => text::read(self, &files, tokenizer)?,
            Inputs::Records(files) => records::read(self, &files, tokenizer)?,
        };
        let name = match &self.source {
            Source::Sampled => Source::Files(paths.to_vec()).to_string(),
            source => source.to_string(),
        };
        if found.is_empty() {
            let reason = format!(
                "it holds less than one sequence of {} tokens; give more text or ask for shorter sequences",
                self.tokens
            );
            return Err(Error::Calibration { data: name, reason });
        }
        if found.len() < self.samples {
            warnings.push(format!(
                "`{name}` holds {} of the {} calibration sequences asked for",
                found.len(),
                self.samples
            ));
        }
        if let Some(part) = monotony(&found) {
            warnings.push(format!(
                "{:.0} % of the calibration tokens are one and the same: the model sees next to nothing; give it text as it is going to be used on",
                part * 100.0
            ));
        }
        let description = format!("{} × {} tokens of {name}", found.len(), self.tokens);
        Ok(Calibration::new(found, description, warnings))
    }

    /// Sequences that the model writes itself: text as it would continue a beginning, each token
    /// drawn with its probability.
    ///
    /// Nothing has to be found, and what is measured is what the model says. Several sequences are
    /// sampled at a time; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Calibration`] for sequences that the model's context cannot hold,
    /// [`Error::Stopped`], and those of the model.
    pub fn sample(
        &self,
        model: &Model,
        cpu: &Cpu,
        tokenizer: &Tokenizer,
        on_tokens: &mut OnTokens<'_>,
    ) -> Result<Calibration> {
        self.check(model.config().context)?;
        sampled::sample(self, model, cpu, tokenizer, on_tokens)
    }

    /// Refuses numbers that make no sequences.
    fn check(&self, context: usize) -> Result<()> {
        let reason = if self.samples == 0 {
            "no calibration sequences are asked for; expected at least 1".to_owned()
        } else if self.tokens < 8 {
            format!("sequences of {} tokens measure nothing; expected at least 8", self.tokens)
        } else if self.tokens > context {
            format!(
                "sequences of {} tokens do not fit into the model's context of {context}",
                self.tokens
            )
        } else if self.samples.checked_mul(self.tokens).is_none_or(|n| n > 1 << 30) {
            format!("{} × {} tokens are too many", self.samples, self.tokens)
        } else {
            return Ok(());
        };
        Err(Error::Calibration { data: self.source.to_string(), reason })
    }
}

/// The part of the tokens that the commonest is, where it is more than half.
fn monotony(sequences: &[Vec<u32>]) -> Option<f64> {
    let mut counts: HashMap<u32, usize> = HashMap::new();
    sequences.iter().flatten().for_each(|&token| *counts.entry(token).or_default() += 1);
    let all: usize = counts.values().sum();
    let most = counts.values().copied().max()?;
    let part = most as f64 / all as f64;
    (part > 0.5).then_some(part)
}
