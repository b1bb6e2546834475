//! What is written of a run of training while it goes on, and its page at the end.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use bevel_formats::AtomicFile;
use bevel_train::{EventWriter, StepLog, StepReport};

use crate::args::Global;
use crate::report::training::{TrainingReport, html};

/// Keeps the figures of every step, and writes them at once: a run that is killed leaves them.
pub(crate) struct Recorder<'a> {
    global: &'a Global,
    log: Option<StepLog>,
    events: Option<EventWriter>,
    /// Those so far.
    pub(crate) steps: Vec<StepReport>,
}

impl<'a> Recorder<'a> {
    /// Into `training.jsonl` in a directory, and event files in another, if one is given. Of a run that goes on, the
    /// first steps, so many as are `done`, are kept.
    pub(crate) fn create(
        directory: &Path,
        tensorboard: Option<&Path>,
        done: usize,
        global: &'a Global,
    ) -> Result<Self> {
        let (log, steps) = StepLog::go_on(&directory.join("training.jsonl"), done)?;
        let events = tensorboard.map(EventWriter::create).transpose()?;
        Ok(Self { global, log: Some(log), events, steps })
    }

    /// The loss of what is held out, before the first step.
    pub(crate) fn before(&mut self, loss: f64) {
        let write = |events: &mut EventWriter| events.scalars(0, &[("eval/loss", loss)]);
        self.try_to(|own| own.events.as_mut().map_or(Ok(()), write));
    }

    pub(crate) fn step(&mut self, report: &StepReport) {
        self.steps.push(*report);
        self.try_to(|own| {
            own.log.as_mut().map_or(Ok(()), |log| log.step(report))?;
            own.events.as_mut().map_or(Ok(()), |events| events.step(report))
        });
    }

    /// A full disk is no reason to lose hours of training: it is told, once, and the run goes on.
    fn try_to(&mut self, write: impl FnOnce(&mut Self) -> bevel_train::Result<()>) {
        if let Err(error) = write(self) {
            self.global
                .warn(format!("{error}; the figures of the steps from here on are not written"));
            (self.log, self.events) = (None, None);
        }
    }
}

/// Writes `report.html` into a directory.
pub(crate) fn write_page(directory: &Path, report: &TrainingReport) -> Result<()> {
    let path = directory.join("report.html");
    let mut file = AtomicFile::create(&path)?;
    file.write_all(html(report).as_bytes())
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(file.finish()?)
}
