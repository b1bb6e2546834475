//! `bevel imatrix`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use bevel_compress::CalibrationConfig;
use serde_json::json;

use super::quantize::with_progress;
use crate::args::Global;
use crate::calibration::{self, CalibrationArgs};
use crate::model;
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::{plain, print_json, print_text};

const EXPLANATION: &str = "\
An importance matrix says how large the inputs of each weight are, on average, while a model reads a text: \
errors of weights with large inputs count more. `bevel quantize --imatrix` and llama.cpp's llama-quantize \
round with it; the methods `gptq` and `awq` of `bevel quantize` look closer, and need the text itself.

Give the model in full precision. FILE is written in the format of llama-imatrix: GGUF, or the older one \
where its name ends in `.dat`.";

/// Options of `bevel imatrix`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// The file to write: `.gguf`, or `.dat` for the older format
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    #[command(flatten)]
    calibration: CalibrationArgs,

    /// Look at the output head too, which llama.cpp advises against
    #[arg(long)]
    process_output: bool,

    /// Replace an output that exists
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let out = &args.output;
    let is_legacy = is_legacy(out)?;
    let shown = out.display();
    ensure!(
        args.force || !out.exists(),
        "`{shown}` exists; remove it, choose another name, or replace it with --force"
    );
    let mut config = CalibrationConfig::default();
    args.calibration.apply(&mut config, global)?;
    let checkpoint = model::open(&args.model, global)?;
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    ensure!(
        real(out) != real(checkpoint.path().as_ref()),
        "`{shown}` is the model itself; choose another name for the output"
    );
    let cpu = model::cpu(global)?;
    let _handler = interrupt::handle();
    let data = calibration::load(&config, &checkpoint, &cpu, global)?;
    let outcome = with_progress(global, "calibrating", |on_progress| {
        let with_head = args.process_output;
        bevel_compress::gather_imatrix(&checkpoint, &data, with_head, out, &cpu, on_progress)
    });
    let imatrix = match outcome {
        Err(bevel_compress::Error::Stopped) => return Err(Interrupted.into()),
        outcome => outcome?,
    };
    if is_legacy {
        imatrix.write_legacy(out)?
    } else {
        imatrix.write(out)?
    }
    let counts = || imatrix.entries.values().flat_map(|entry| &entry.counts);
    let unseen = counts().filter(|count| **count == 0).count();
    if unseen > 0 {
        let all = counts().count();
        global.warn(format!(
            "no token came to {unseen} of {all} matrices, which are experts: all of their columns will count the same; more calibration data helps"
        ));
    }
    let (tensors, tokens) = (imatrix.entries.len(), data.tokens());
    if global.json {
        return print_json(&json!({
            "output": out, "tensors": tensors, "tokens": tokens, "unseen_experts": unseen,
            "calibration": data.description,
        }));
    }
    print_text(&format!(
        "{tensors} tensors, {tokens} tokens: {}\nwrote {}\n",
        plain(&data.description),
        plain(&shown.to_string())
    ))
}

/// True for the older format, by the file's name.
fn is_legacy(out: &Path) -> Result<bool> {
    let extension = out.extension().unwrap_or_default();
    if extension.eq_ignore_ascii_case("dat") {
        return Ok(true);
    }
    if !extension.eq_ignore_ascii_case("gguf") {
        bail!("`{}`: the name of an importance matrix ends in `.gguf` or `.dat`", out.display());
    }
    Ok(false)
}
