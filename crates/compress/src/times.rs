//! Where the time of a run went.

use std::time::Instant;

use serde::Serialize;

/// Wall time of a run, step by step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// Seconds of each step, in the order in which they were first taken: `hash`, `types` (what a budget
    /// is spent on), `forward`, `statistics`, `scales` (AWQ's search), `solve`, `compare`, `keep` (for a run
    /// that goes on) and
    /// `write`. Where the run went on with another, they are of its own part.
    pub steps: Vec<(&'static str, f64)>,
    /// Operations of `statistics` in Gram and cross matrices, a multiplication and an addition being two.
    pub statistics_operations: f64,
    /// Parts of the model, layers and the output head, that a run before had done.
    pub taken_up: usize,
}

impl Times {
    /// Adds to a step.
    pub(crate) fn add(&mut self, step: &'static str, seconds: f64) {
        match self.steps.iter_mut().find(|(name, _)| *name == step) {
            Some((_, sum)) => *sum += seconds,
            None => self.steps.push((step, seconds)),
        }
    }

    /// Does a step's work.
    pub(crate) fn time<T>(&mut self, step: &'static str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.add(step, start.elapsed().as_secs_f64());
        done
    }

    /// Seconds of all steps.
    pub fn total(&self) -> f64 {
        self.steps.iter().map(|(_, seconds)| seconds).sum()
    }
}
