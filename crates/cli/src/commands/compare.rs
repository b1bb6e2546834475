//! `bevel compare`: one page over several measured models.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use bevel_formats::AtomicFile;
use serde_json::Value;

use crate::args::Global;
use crate::report::comparison::{self, Comparison, Run};
use crate::text;
use crate::ui::print_json;

const EXPLANATION: &str = "\
Each REPORT is the `report.json` that `bevel quantize` left, or what `bevel eval MODEL --against BASE --text FILE \
--json` printed; all must be about one base, text and window. What `bevel bench MODEL --json` printed adds the \
speed of the MODEL it names.";

/// Options of `bevel compare`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// Reports of `bevel quantize`, of `bevel eval --against … --json`, and of `bevel bench --json`
    #[arg(value_name = "REPORT", required = true)]
    reports: Vec<PathBuf>,

    /// The page to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Replace a page that exists
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let shown = args.output.display();
    ensure!(
        args.force || !args.output.exists(),
        "`{shown}` exists; remove it, choose another name, or replace it with --force"
    );
    ensure!(!args.reports.contains(&args.output), "`{shown}` cannot be a report and the page");
    let comparison = read(&args.reports)?;
    let mut file = AtomicFile::create(&args.output)?;
    file.write_all(comparison::html(&comparison).as_bytes())
        .with_context(|| format!("cannot write `{shown}`"))?;
    file.finish()?;
    if global.json {
        return print_json(&comparison);
    }
    global.note(format!("wrote {shown}"));
    Ok(())
}

/// Reads reports and checks that they can be compared.
fn read(paths: &[PathBuf]) -> Result<Comparison> {
    let mut runs: Vec<(&Path, Run)> = Vec::new();
    // Models and their tokens per second.
    let mut speeds: Vec<(String, f64)> = Vec::new();
    for path in paths {
        let failed = || format!("`{}`", path.display());
        let mut value: Value = serde_json::from_str(&text::read(path)?).with_context(failed)?;
        if value.get("tensors").is_some() && value.get("measured").is_some() {
            let why = value["not_measured"].take();
            value = value["measured"].take();
            ensure!(
                !value.is_null(),
                "`{}` tells of no quality: {}; `bevel eval --against … --json` measures it",
                path.display(),
                why.as_str().unwrap_or("it was not measured")
            );
        }
        if value.get("kl").is_some() {
            runs.push((path, serde_json::from_value(value).with_context(failed)?));
        } else if let (Some(model), Some(speed)) =
            (value["model"].as_str(), value["decode"]["median"].as_f64())
        {
            speeds.push((model.to_owned(), speed));
        } else {
            bail!(
                "`{}` is no report of `bevel quantize` or `bevel eval --against … --json`, nor one of `bevel bench --json` with a decode speed",
                path.display()
            );
        }
    }
    let Some((first_path, first)) = runs.first() else {
        bail!(
            "there is no report of `bevel quantize` or `bevel eval --against … --json` among the files"
        );
    };
    for (path, run) in &runs {
        if let Some(difference) = first.differs_from(run) {
            bail!(
                "`{}` and `{}` cannot be compared: {difference}",
                first_path.display(),
                path.display()
            );
        }
    }
    for (model, speed) in speeds {
        let run = runs.iter_mut().find(|(_, run)| run.model == model).with_context(|| {
            format!("a speed was measured of `{model}`, of which there is no other report")
        })?;
        run.1.decode_tokens_per_second = Some(speed);
    }
    let mut runs: Vec<Run> = runs.into_iter().map(|(_, run)| run).collect();
    runs.sort_by(|a, b| b.file.bytes.cmp(&a.file.bytes).then_with(|| a.name().cmp(&b.name())));
    Ok(Comparison { runs })
}
