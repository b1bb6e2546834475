use std::ops::ControlFlow;

use crate::{Error, Result};

/// How far a run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// What is being done.
    pub stage: Stage,
    /// The file or tensor it is done to.
    pub name: &'a str,
    /// Bytes of the source that are done; of [`Stage::Measure`] and [`Stage::Calibrate`], passes of a sequence through a
    /// part of a layer.
    pub done: u64,
    /// How many there are in all.
    pub total: u64,
}

/// A part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The source is read and hashed.
    Hash,
    /// Sequences walk through the model to find what each tensor's type costs.
    Measure,
    /// Calibration sequences walk through the model.
    Calibrate,
    /// Tensors are read, changed and written.
    Write,
    /// Tensors are read and checked.
    Check,
}

/// Called now and then, from the thread that called. `Break` ends the run with [`Error::Stopped`];
/// nothing is left behind.
pub type OnProgress<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// Counts the bytes of a stage.
pub(crate) struct Meter<'a, 'b> {
    pub(crate) stage: Stage,
    pub(crate) done: u64,
    pub(crate) total: u64,
    pub(crate) on_progress: &'a mut OnProgress<'b>,
}

impl Meter<'_, '_> {
    pub(crate) fn advance(&mut self, name: &str, bytes: usize) -> Result<()> {
        self.done += bytes as u64;
        let progress = Progress { stage: self.stage, name, done: self.done, total: self.total };
        match (self.on_progress)(progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Stopped),
        }
    }
}
