//! The report that every run leaves: `report.json` and `report.html`, beside a file and in a directory.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bevel_formats::AtomicFile;

use crate::report::run::{RunReport, html};

/// Options of the report.
#[derive(Debug, clap::Args)]
pub(crate) struct Reporting {
    /// Write no report, and measure nothing
    #[arg(long, conflicts_with_all = ["report", "eval", "no_eval"])]
    no_report: bool,

    /// Measure quality and speed on this text for the report, or on `self`, text that the model writes
    /// [default: where calibrated, what calibration left of its data]
    #[arg(long, value_name = "TEXT")]
    pub(crate) eval: Option<String>,

    /// Do not measure quality and speed for the report
    #[arg(long, conflicts_with = "eval")]
    pub(crate) no_eval: bool,
}

/// Where a report goes.
pub(crate) struct Files {
    pub(crate) json: PathBuf,
    pub(crate) page: PathBuf,
}

impl Reporting {
    /// Where the report of a run goes that writes `output`; `named` is what `--report` says.
    pub(crate) fn files(&self, output: &Path, named: Option<&Path>) -> Option<Files> {
        if self.no_report {
            return None;
        }
        if let Some(named) = named {
            let is_page = named.extension().is_some_and(|e| e.eq_ignore_ascii_case("html"));
            let other = named.with_extension(if is_page { "json" } else { "html" });
            let (json, page) =
                if is_page { (other, named) } else { (named.to_owned(), other.as_path()) };
            return Some(Files { json, page: page.to_owned() });
        }
        let is_file = output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        let named = |kind: &str| match is_file {
            true => output.with_extension(format!("report.{kind}")),
            false => output.join("report").with_extension(kind),
        };
        Some(Files { json: named("json"), page: named("html") })
    }
}

impl Files {
    /// Refuses to replace the model, the output or, without `force`, anything.
    pub(crate) fn may_write(&self, model: &Path, output: &Path, force: bool) -> Result<()> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        for file in [&self.json, &self.page] {
            let shown = file.display();
            ensure!(
                ![model, output].map(real).contains(&real(file)),
                "`{shown}` cannot be a model and the report; choose another name for the report"
            );
            // A directory is replaced with all that is in it.
            if file.parent() == Some(output) {
                continue;
            }
            ensure!(
                force || !file.exists(),
                "the report `{shown}` exists; remove it, choose another name with --report, replace it with --force, or write none with --no-report"
            );
            // Dropped at once: only a place that cannot be written is to be noticed before the work. Of
            // the output's own place the output tells.
            if file.parent() != output.parent() {
                AtomicFile::create(file)?;
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, run: &RunReport) -> Result<()> {
        write(&self.json, serde_json::to_string_pretty(run)?.as_bytes())?;
        write(&self.page, html(run).as_bytes())
    }
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(file.finish()?)
}
