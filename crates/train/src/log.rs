//! `training.jsonl`: a line for each step, there as soon as the step is done.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

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

    /// The file of a run that goes on after so many steps: those of the file that is there are kept and returned, as far
    /// as they were written.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn go_on(path: &Path, steps: usize) -> Result<(Self, Vec<StepReport>)> {
        let before = match steps {
            0 => String::new(),
            _ => std::fs::read_to_string(path).unwrap_or_default(),
        };
        let reports = before.lines().filter_map(report).filter(|report| report.step <= steps);
        let reports: Vec<StepReport> = reports.collect();
        let mut log = Self::create(path)?;
        for report in &reports {
            log.step(report)?;
        }
        Ok((log, reports))
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
            "preferred": report.preferred,
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

/// A line as a step again; nothing where it is none, as one that was cut off.
fn report(line: &str) -> Option<StepReport> {
    let line: Value = serde_json::from_str(line).ok()?;
    let number = |name: &str| line[name].as_f64();
    Some(StepReport {
        step: line["step"].as_u64()? as usize,
        loss: number("loss")?,
        held_out: number("held_out_loss"),
        preferred: number("preferred"),
        gradient_norm: number("gradient_norm")?,
        learning_rate: number("learning_rate")?,
        tokens: line["tokens"].as_u64()? as usize,
        time: Duration::try_from_secs_f64(number("seconds")?).ok()?,
    })
}
