//! A Hugging Face directory to another one: other types, other shards, everything else the same.

use std::fs;
use std::path::Path;

use bevel_base::DType;
use bevel_formats::TensorSpec;
use bevel_formats::safetensors::{self, SafetensorsWriter};
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use serde_json::{Value, json};

use super::from_gguf::{byte_len, write_json};
use super::{check_space, empty_report, hf_type, safetensors_metadata};
use crate::output::{AtomicDirectory, MORE_TEMPLATES};
use crate::progress::{Meter, OnProgress, Stage};
use crate::transcode::{Job, Tally, Transcoder};
use crate::{Base, Error, Options, Provenance, Recipe, Report, Result};

pub(super) fn convert(
    checkpoint: &Checkpoint,
    dir: &Path,
    recipe: &Recipe,
    out: &Path,
    options: &Options,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let files = safetensors::Checkpoint::open(dir)?;
    let specs: Vec<TensorSpec> = files
        .tensors()
        .iter()
        .map(|(name, t)| TensorSpec::new(name, hf_type(recipe, name, t.dtype), t.shape.clone()))
        .collect();
    check_space(out, specs.iter().map(byte_len))?;

    let provenance = Provenance::of(checkpoint, recipe, on_progress)?;
    let directory = AtomicDirectory::create(out)?;
    let mut metadata = files.metadata().clone();
    metadata.extend(safetensors_metadata(&provenance));
    let mut writer = SafetensorsWriter::create(
        &directory.workspace().join("model.safetensors"),
        &metadata,
        &specs,
        options.shard_bytes,
    )?;
    let mut report = empty_report(checkpoint, recipe, out, provenance, Vec::new());
    let total = files.tensors().values().map(|t| t.byte_len() as u64).sum();
    let mut meter = Meter { stage: Stage::Write, done: 0, total, on_progress };
    let mut transcoder = Transcoder::new(cpu.pool());
    for spec in &specs {
        let view = files.tensor(&spec.name)?;
        let (from, data) = (view.dtype(), view.data());
        let mut write = |data: &[u8]| Ok(writer.write(&spec.name, data)?);
        let tally = if from.is_weight() {
            let job = Job::new(&spec.name, from, spec.dtype, spec.shape.row_len());
            let release = || files.release(&spec.name);
            transcoder.run(&job, data, &mut meter, &release, &mut write)?
        } else {
            write(data)?;
            meter.advance(&spec.name, data.len())?;
            Tally::default()
        };
        report.push_converted(spec, from, data.len() as u64, tally, options)?;
        files.release(&spec.name);
    }
    let written = writer.finish()?;
    report.files =
        written.iter().map(|file| out.join(file.file_name().unwrap_or_default())).collect();

    copy_side_files(dir, directory.workspace())?;
    write_config(dir, recipe, directory.workspace())?;
    directory.finish()?;
    Ok(report)
}

/// Copies what is neither weights nor `config.json`: the tokenizer's files, texts, templates.
pub(super) fn copy_side_files(from: &Path, to: &Path) -> Result<()> {
    const KINDS: [&str; 5] = ["json", "txt", "jinja", "model", "md"];
    let entries = fs::read_dir(from).map_err(Error::io("read", from))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_owned();
        let shown = name.to_string_lossy();
        let kind = path.extension().unwrap_or_default().to_string_lossy();
        let is_side = KINDS.contains(&kind.as_ref())
            && shown != "config.json"
            && !shown.ends_with(".index.json")
            && !shown.starts_with('.');
        if path.is_file() && is_side {
            fs::copy(&path, to.join(&name)).map_err(Error::io("copy", &path))?;
        } else if path.is_dir() && shown == MORE_TEMPLATES {
            let inner = to.join(&name);
            fs::create_dir(&inner).map_err(Error::io("create", &inner))?;
            copy_side_files(&path, &inner)?;
        }
    }
    Ok(())
}

/// Copies `config.json`, with the new type where there is one.
fn write_config(from: &Path, recipe: &Recipe, to: &Path) -> Result<()> {
    let path = from.join("config.json");
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let Base::Mix(mix) = recipe.base else {
        let copy = to.join("config.json");
        return fs::write(&copy, text).map_err(Error::io("write", &copy));
    };
    let wrong = |e: serde_json::Error| Error::io("read", &path)(e.into());
    let mut config: Value = serde_json::from_slice(&text).map_err(wrong)?;
    let name = match mix.base {
        DType::F32 => "float32",
        DType::F16 => "float16",
        _ => "bfloat16",
    };
    // transformers 5 calls `dtype` what was `torch_dtype` before.
    for key in ["torch_dtype", "dtype"] {
        if key == "torch_dtype" || config.get(key).is_some() {
            config[key] = json!(name);
        }
    }
    write_json(&to.join("config.json"), &config)
}
