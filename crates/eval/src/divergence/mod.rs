//! How far a model's predictions have moved from those of the model it was made from, token by token, in
//! the statistics of llama.cpp's `--kl-divergence`.
//!
//! Perplexity asks how likely the text is and lets errors in both directions cancel; the Kullback–Leibler
//! divergence asks how different the distributions are, and nothing cancels. Base and model read the same
//! windows as [`Windows::HalfWindow`] lays them, and every scored token gives one row.

mod base_logits;
mod digest;
mod rows;
mod statistics;

use std::path::Path;
use std::time::Instant;

use bevel_kernels::{Cpu, KvType};
use bevel_model::{Model, Session};

use crate::windows::Step;
use crate::{Error, Mean, Perplexity, Result, Running, Text, Windows};

use base_logits::{Header, Origin, Writer};
use rows::{BaseRow, RowScore};

pub use base_logits::BaseLogits;
pub use digest::ModelDigest;
pub use statistics::{Divergence, Estimate, Quantiles};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct DivergenceConfig {
    /// Tokens of a window.
    pub context: usize,
    /// Storage of the model's keys and values.
    pub kv_type: KvType,
    /// Storage of the base's: the same, unless the question is what storage does to predictions.
    pub base_kv_type: KvType,
}

/// Where the base's predictions come from.
enum Base<'a> {
    /// The base itself, which runs beside the model.
    Model(Box<Session<'a>>),
    /// A file, read in order; how many rows of it have been, and room for the next.
    File { file: &'a BaseLogits, done: usize, rows: Vec<u8> },
}

impl DivergenceConfig {
    /// Measures how far `model` lies from `base`; both run side by side, and nothing is rounded.
    /// `progress` is called after every window.
    ///
    /// # Errors
    /// [`Error::Vocabulary`], [`Error::TextTooShort`], [`Error::Windows`], and those of the models.
    pub fn compare(
        &self,
        base: &Model,
        model: &Model,
        cpu: &Cpu,
        text: &Text,
        progress: &mut dyn FnMut(Running),
    ) -> Result<Divergence> {
        let (theirs, ours) = (base.config().vocab_size, model.config().vocab_size);
        if theirs != ours {
            return Err(Error::Vocabulary(format!(
                "the base has {theirs} tokens and the model {ours}; both must have one vocabulary"
            )));
        }
        let session = Session::new(base, cpu, self.context, self.base_kv_type)?;
        self.measure(Base::Model(Box::new(session)), model, cpu, text, progress)
    }

    /// As [`DivergenceConfig::compare`], against the predictions in a file.
    ///
    /// # Errors
    /// As [`DivergenceConfig::compare`], and [`Error::BaseLogits`] where the file does not belong to
    /// these windows or is damaged.
    pub fn compare_with_file(
        &self,
        base: &BaseLogits,
        model: &Model,
        cpu: &Cpu,
        text: &Text,
        progress: &mut dyn FnMut(Running),
    ) -> Result<Divergence> {
        base.check(self.context, self.base_kv_type, text, model.config().vocab_size)?;
        let base = Base::File { file: base, done: 0, rows: Vec::new() };
        self.measure(base, model, cpu, text, progress)
    }

    /// Runs `base` and writes its predictions to `path`, where they appear when they are complete.
    /// `progress` is called after every window.
    ///
    /// # Errors
    /// As [`DivergenceConfig::compare`], and those of writing.
    pub fn record(
        &self,
        base: &Model,
        cpu: &Cpu,
        text: &Text,
        path: &Path,
        progress: &mut dyn FnMut(Running),
    ) -> Result<()> {
        let windows = Windows::HalfWindow.lay(self.context, text.tokens.len())?;
        let vocab = base.config().vocab_size;
        let total = windows.len() * self.context;
        let model = ModelDigest::of(base.checkpoint(), cpu)?;
        let mut writer = Writer::create(
            path,
            &Header {
                vocabulary: vocab,
                context: self.context,
                tokens: text.tokens[..total].to_vec(),
                origin: Some(Origin { model, kv_type: self.base_kv_type, bos: text.bos }),
            },
        )?;
        let mut session = Session::new(base, cpu, self.context, self.base_kv_type)?;
        let (mut mean, mut done) = (Mean::default(), 0);
        for window in &windows {
            let tokens = Windows::HalfWindow.input(window, text);
            session.truncate(0);
            for step in window.steps(vocab) {
                let logits = session.step(&tokens[step.tokens], &step.outputs)?;
                let nats = writer.append(cpu, logits, &tokens[step.next])?;
                mean.extend(nats);
            }
            done += tokens.len();
            progress(Running { done, total, perplexity: Some(mean.mean().exp()), kl: None });
        }
        writer.finish()
    }

    fn measure(
        &self,
        mut base: Base<'_>,
        model: &Model,
        cpu: &Cpu,
        text: &Text,
        progress: &mut dyn FnMut(Running),
    ) -> Result<Divergence> {
        let windows = Windows::HalfWindow.lay(self.context, text.tokens.len())?;
        let vocab = model.config().vocab_size;
        let total = windows.len() * self.context;
        let mut session = Session::new(model, cpu, self.context, self.kv_type)?;
        let mut scores = Vec::new();
        let (mut kl, mut nats) = (Mean::default(), Mean::default());
        let (mut done, mut bytes) = (0, 0);
        let start = Instant::now();
        for window in &windows {
            let tokens = Windows::HalfWindow.input(window, text);
            session.truncate(0);
            base.begin_window();
            for step in window.steps(vocab) {
                let logits = session.step(&tokens[step.tokens.clone()], &step.outputs)?;
                let rows = base.scores(cpu, logits, vocab, &tokens, &step)?;
                kl.extend(rows.iter().map(|row| row.kl));
                nats.extend(rows.iter().map(|row| row.nats));
                scores.extend(rows);
            }
            bytes += window.scored_bytes(text);
            done += tokens.len();
            let perplexity = Some(nats.mean().exp());
            progress(Running { done, total, perplexity, kl: Some(kl.mean()) });
        }
        let elapsed = start.elapsed();
        let perplexity = Perplexity::new(&nats, bytes, windows.len(), done as u64, elapsed);
        Ok(Divergence::new(perplexity, &scores))
    }
}

impl Base<'_> {
    fn begin_window(&mut self) {
        if let Base::Model(session) = self {
            session.truncate(0);
        }
    }

    /// Compares the rows of `logits` that `step` gave with the base's.
    fn scores(
        &mut self,
        cpu: &Cpu,
        logits: &[f32],
        vocab: usize,
        tokens: &[u32],
        step: &Step,
    ) -> Result<Vec<RowScore>> {
        let next = &tokens[step.next.clone()];
        let row = |i: usize| i * vocab..(i + 1) * vocab;
        match self {
            Base::Model(session) => {
                let base = session.step(&tokens[step.tokens.clone()], &step.outputs)?;
                let mut scores = vec![RowScore::default(); next.len()];
                cpu.pool().run_chunks(&mut scores, 1, |i, score| {
                    let base = BaseRow { logits: &base[row(i)], nats: None, as_they_are: false };
                    score[0] = RowScore::of(cpu, base, &logits[row(i)], next[i]);
                });
                Ok(scores)
            }
            Base::File { file, done, rows } => {
                let row_bytes = file.row_bytes();
                rows.resize(next.len() * row_bytes, 0);
                file.read(*done, rows)?;
                let mut scores: Vec<Result<RowScore>> =
                    next.iter().map(|_| Ok(RowScore::default())).collect();
                cpu.pool().run_chunks(&mut scores, 1, |i, score| {
                    let bytes = &rows[i * row_bytes..][..row_bytes];
                    let mut base = vec![0.0; vocab];
                    let base = file.unpack(*done + i, bytes, next[i], &mut base);
                    score[0] = base.map(|base| RowScore::of(cpu, base, &logits[row(i)], next[i]));
                });
                *done += next.len();
                scores.into_iter().collect()
            }
        }
    }
}
