//! `training.jsonl`: a line for each step, there as soon as the step is done.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::{Error, Result, StepReport};

/// Writes the figures of a run, a line of JSON a step.
#[derive(Debug)]
pub struct StepLog {
    file: File,
    path: PathBuf,
}

impl StepLog {
    /// A new file in the place of any that is there.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path);
        let file = file.map_err(|error| Error::Io { path: path.display().to_string(), error })?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        let line = json!({
            "step": report.step,
            "loss": report.loss,
            "held_out_loss": report.held_out,
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            "tokens": report.tokens,
            "seconds": report.time.as_secs_f64(),
        });
        // One write: whoever follows the file sees whole lines.
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        written.map_err(|error| Error::Io { path: self.path.display().to_string(), error })
    }
}
