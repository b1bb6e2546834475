//! The data of a run: what is learnt, and what is held out.

use anyhow::{Result, bail};
use bevel_formats::hub::HubConfig;
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use bevel_model::chat::{CHATML, ChatTemplate, DateTime};
use bevel_train::Lessons;
use bevel_train::data::{Cached, Example, Examples, Pair, Reader};
use sha2::{Digest, Sha256};

use super::Args;
use crate::args::Global;
use crate::{model, text, training_data};

/// What is learnt, and what is held out.
pub(super) enum Data {
    Examples([Vec<Example>; 2]),
    Pairs([Vec<Pair>; 2]),
}

impl Data {
    pub(super) fn learnt(&self) -> usize {
        match self {
            Self::Examples([learnt, _]) => learnt.len(),
            Self::Pairs([learnt, _]) => learnt.len(),
        }
    }

    pub(super) fn held_out(&self) -> usize {
        match self {
            Self::Examples([_, held_out]) => held_out.len(),
            Self::Pairs([_, held_out]) => held_out.len(),
        }
    }

    pub(super) fn lessons(&self, beta: Option<f64>) -> (Lessons<'_>, Lessons<'_>) {
        match self {
            Self::Examples([learnt, held_out]) => {
                (Lessons::Examples(learnt), Lessons::Examples(held_out))
            }
            Self::Pairs([learnt, held_out]) => {
                let of = |pairs| Lessons::Pairs { pairs, beta: beta.unwrap_or(0.1) };
                (of(learnt), of(held_out))
            }
        }
    }

    /// Of all tokens, and of what is learnt of them.
    pub(super) fn hash(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |example: &Example| {
            hash.update(example.tokens.len().to_le_bytes());
            example.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
            example.learnt.iter().for_each(|&learnt| hash.update([u8::from(learnt)]));
        };
        match self {
            Self::Examples(all) => all.iter().flatten().for_each(&mut add),
            Self::Pairs(all) => all.iter().flatten().for_each(|pair| {
                add(&pair.chosen);
                add(&pair.rejected);
            }),
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Args {
    /// Some examples are held out: every n-th one, so that it does not matter how they are sorted.
    fn split<T>(&self, all: Vec<T>) -> Result<[Vec<T>; 2]> {
        let every = match self.held_out > 0.0 {
            true => (1.0 / self.held_out).round().max(2.0) as usize,
            false => usize::MAX,
        };
        let mut split = [Vec::new(), Vec::new()];
        for (index, example) in all.into_iter().enumerate() {
            split[usize::from((index + 1) % every == 0)].push(example);
        }
        if split[0].is_empty() {
            bail!("`{}` has no example to learn from", self.data.join("`, `"));
        }
        Ok(split)
    }

    /// Reads it.
    pub(super) fn data(&self, checkpoint: &Checkpoint, cpu: &Cpu, global: &Global) -> Result<Data> {
        let tokenizer = model::tokenizer(checkpoint, global)?;
        let source = match self.chat_template.as_deref() {
            None => tokenizer.chat_template(false).ok().map(|own| own.source().to_owned()),
            Some("chatml") => Some(CHATML.to_owned()),
            Some(file) => Some(text::read(file.as_ref())?),
        };
        // A template that writes the date writes the same one in every run.
        let clock = || DateTime::from_unix(1_735_689_600);
        let special = tokenizer.special_texts();
        let template =
            source.map(|source| ChatTemplate::with_clock(&source, special, clock)).transpose()?;
        let reader = Reader {
            tokenizer: &tokenizer,
            template: template.as_ref(),
            context: self.ctx as usize,
            whole: self.train_on_prompt,
        };
        let files = training_data::files(&self.data, global)?;
        if self.dpo.is_some() {
            let Examples { all, cut, empty } = reader.pairs(&files, cpu.pool())?;
            self.warn(cut, empty, global);
            return Ok(Data::Pairs(self.split(all)?));
        }
        let cache = HubConfig::from_env().bevel_cache.join("tokens");
        let (examples, cached) = reader.cached_examples(&files, cpu.pool(), &cache)?;
        if let Cached::Failed(error) = cached {
            global.warn(format!("the data's tokens could not be kept for the next run: {error}"));
        }
        self.warn(examples.cut, examples.empty, global);
        Ok(Data::Examples(self.split(examples.all)?))
    }

    fn warn(&self, cut: usize, empty: usize, global: &Global) {
        if cut > 0 {
            global.warn(format!(
                "{cut} examples are longer than {} tokens and were cut off: give a larger --ctx",
                self.ctx
            ));
        }
        if empty > 0 {
            global.warn(format!("{empty} examples have nothing to be learnt and were left out"));
        }
    }
}
