//! A model to a Hugging Face directory: names, the order of rows, norms and experts as transformers
//! has them.

use std::fs;
use std::path::Path;

use bevel_base::{DType, Shape, pack};
use bevel_formats::TensorSpec;
use bevel_formats::safetensors::SafetensorsWriter;
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Entry, Transform, regroup_rows};
use serde_json::{Map, Value, json};

use super::{check_space, empty_report, hf_type, safetensors_metadata};
use crate::output::AtomicDirectory;
use crate::progress::{Meter, OnProgress, Stage};
use crate::transcode::{Job, Tally, Transcoder};
use crate::{Error, Options, Provenance, Recipe, Report, Result, Storage, TensorReport};

/// A tensor of the file and what it becomes.
pub(crate) struct Piece<'a> {
    pub(crate) name: &'a str,
    pub(crate) entry: &'a Entry,
    /// One name, or one for each expert.
    pub(crate) specs: Vec<TensorSpec>,
    transform: Transform,
}

pub(super) fn convert(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    out: &Path,
    options: &Options,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let mut warnings = Vec::new();
    let pieces = pieces(checkpoint, recipe, &mut warnings);
    let source = Source::of(checkpoint, &mut warnings)?;
    options.accept(&warnings)?;
    let specs: Vec<TensorSpec> = pieces.iter().flat_map(|p| p.specs.iter().cloned()).collect();
    check_space(out, specs.iter().map(byte_len))?;

    let provenance = Provenance::of(checkpoint, recipe, on_progress)?;
    let directory = AtomicDirectory::create(out)?;
    let mut writer = SafetensorsWriter::create(
        &directory.workspace().join("model.safetensors"),
        &safetensors_metadata(&provenance),
        &specs,
        options.shard_bytes,
    )?;
    let mut report = empty_report(checkpoint, recipe, out, provenance, warnings);
    let total = pieces.iter().map(|p| p.entry.byte_len() as u64).sum();
    let mut meter = Meter { stage: Stage::Write, done: 0, total, on_progress };
    let mut transcoder = Transcoder::new(cpu.pool());
    for piece in &pieces {
        write_piece(
            checkpoint,
            piece,
            None,
            &mut writer,
            &mut transcoder,
            &mut meter,
            &mut report,
            options,
        )?;
    }
    let files = writer.finish()?;
    report.files =
        files.iter().map(|file| out.join(file.file_name().unwrap_or_default())).collect();

    source.write(checkpoint, &specs, Map::new(), directory.workspace())?;
    directory.finish()?;
    Ok(report)
}

/// Writes a tensor as what it becomes. `changed` is in the place of its values, in f32.
pub(crate) fn write_piece(
    checkpoint: &Checkpoint,
    piece: &Piece<'_>,
    changed: Option<Vec<u8>>,
    writer: &mut SafetensorsWriter,
    transcoder: &mut Transcoder<'_>,
    meter: &mut Meter<'_, '_>,
    report: &mut Report,
    options: &Options,
) -> Result<()> {
    let (dtype, bytes) = match changed {
        Some(values) => (DType::F32, values.into()),
        None => (piece.entry.dtype, checkpoint.read(piece.name)?),
    };
    let part_len = bytes.len() / piece.specs.len();
    for (spec, part) in piece.specs.iter().zip(bytes.chunks(part_len.max(1))) {
        let (from, part) = restore(checkpoint, piece, spec, dtype, part)?;
        let job = Job::new(&spec.name, from, spec.dtype, spec.shape.row_len());
        let mut write = |data: &[u8]| Ok(writer.write(&spec.name, data)?);
        let release = || checkpoint.release(piece.name);
        let tally = transcoder.run(&job, &part, meter, &release, &mut write)?;
        let stored = checkpoint.stored_dtype(piece.name);
        let stored_len = checkpoint.stored_len(piece.name) / piece.specs.len() as u64;
        report.push_converted(spec, stored, stored_len, tally, options)?;
    }
    drop(bytes);
    checkpoint.release(piece.name);
    Ok(())
}

/// What each tensor becomes. Those without a place in a checkpoint follow from the configuration,
/// or are left out with a warning.
pub(crate) fn pieces<'a>(
    checkpoint: &'a Checkpoint,
    recipe: &Recipe,
    warnings: &mut Vec<String>,
) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    for (name, entry) in checkpoint.tensors() {
        let Some(hf) = checkpoint.config().hf_tensor(name, "model.") else {
            if !name.starts_with("rope_f") {
                warnings.push(format!(
                    "tensor `{name}` has no place in a Hugging Face checkpoint and is left out"
                ));
            }
            continue;
        };
        let dims = entry.shape.dims();
        let is_stacked = name.contains("_exps");
        let shape = Shape::from(dims[usize::from(is_stacked)..].to_vec());
        let tied = checkpoint.config().tied;
        let dtype = hf_type(recipe, name, tied, checkpoint.stored_dtype(name));
        let specs =
            hf.names.into_iter().map(|name| TensorSpec::new(name, dtype, shape.clone())).collect();
        pieces.push(Piece { name, entry, specs, transform: hf.transform });
    }
    pieces
}

/// Undoes what a GGUF file changes about a tensor; the type of the result and its bytes.
fn restore<'a>(
    checkpoint: &Checkpoint,
    piece: &Piece<'_>,
    spec: &TensorSpec,
    dtype: DType,
    part: &'a [u8],
) -> Result<(DType, std::borrow::Cow<'a, [u8]>)> {
    Ok(match piece.transform {
        Transform::None => (dtype, part.into()),
        Transform::InterleaveRows { .. } => {
            let head_dim = checkpoint.config().head_dim;
            (dtype, regroup_rows(part, spec.shape.dims()[0], head_dim, false).into())
        }
        Transform::PlusOne => {
            let wrap = |source| Error::Tensor { tensor: piece.name.to_owned(), source };
            let mut values = vec![0.0; spec.shape.len()];
            pack::dequantize(dtype, part, &mut values).map_err(wrap)?;
            (
                DType::F32,
                values.iter().flat_map(|v| (v - 1.0).to_le_bytes()).collect::<Vec<u8>>().into(),
            )
        }
    })
}

impl Report {
    /// Adds a tensor, also to the totals.
    pub(super) fn push_converted(
        &mut self,
        spec: &TensorSpec,
        from: DType,
        bytes_before: u64,
        tally: Tally,
        options: &Options,
    ) -> Result<()> {
        let bytes_after = byte_len(spec);
        self.totals.add(spec.shape.len() as u64, bytes_before, bytes_after);
        self.push(
            TensorReport {
                name: spec.name.clone(),
                shape: spec.shape.clone(),
                from,
                to: Storage::Type(spec.dtype),
                wanted: None,
                bytes_before,
                bytes_after,
                relative_error: tally.relative_error(),
                saturated: tally.saturated,
                solved: Vec::new(),
            },
            options,
        )
    }
}

pub(crate) fn byte_len(spec: &TensorSpec) -> u64 {
    spec.shape.byte_len(spec.dtype).map_or(u64::MAX, |len| len as u64)
}

/// The type that takes the most bytes: a model's own.
pub(crate) fn main_type<'a>(specs: impl IntoIterator<Item = &'a TensorSpec>) -> DType {
    let types = [DType::F32, DType::F16, DType::BF16];
    let mut bytes = [0_u64; 3];
    for spec in specs {
        if let Some(i) = types.iter().position(|&dtype| dtype == spec.dtype) {
            bytes[i] = bytes[i].saturating_add(byte_len(spec));
        }
    }
    (0..3).max_by_key(|&i| bytes[i]).map_or(DType::BF16, |i| types[i])
}

/// Entries of a configuration that say how weights are quantized.
const QUANTIZATION: [&str; 3] = ["quantization_config", "quantization", "compression_config"];

/// Where a directory's configuration and tokenizer come from.
pub(crate) enum Source<'a> {
    /// A GGUF file; it may have no tokenizer.
    Gguf(Option<Box<Tokenizer>>),
    /// Another directory.
    Directory(&'a Path),
}

impl<'a> Source<'a> {
    pub(crate) fn of(checkpoint: &'a Checkpoint, warnings: &mut Vec<String>) -> Result<Self> {
        if let Some(dir) = checkpoint.hf_dir() {
            return Ok(Source::Directory(dir));
        }
        let metadata = checkpoint.gguf_metadata();
        let has_tokenizer =
            |m: &&bevel_formats::gguf::Metadata| m.contains_key("tokenizer.ggml.tokens");
        let Some(metadata) = metadata.filter(has_tokenizer) else {
            warnings.push("the model has no tokenizer, so the output has none".to_owned());
            return Ok(Source::Gguf(None));
        };
        let tokenizer = Tokenizer::from_gguf(metadata)?;
        warnings.extend(tokenizer.warnings().iter().cloned());
        Ok(Source::Gguf(Some(Box::new(tokenizer))))
    }

    /// Writes `config.json` with more `entries`, and the tokenizer's files. `specs` are the plain
    /// tensors.
    pub(crate) fn write(
        &self,
        checkpoint: &Checkpoint,
        specs: &[TensorSpec],
        entries: Map<String, Value>,
        dir: &Path,
    ) -> Result<()> {
        let main = main_type(specs);
        let mut config = match self {
            Source::Directory(from) => {
                super::from_hf::copy_side_files(from, dir)?;
                let path = from.join("config.json");
                let text = fs::read(&path).map_err(Error::io("read", &path))?;
                let wrong = |e: serde_json::Error| Error::io("read", &path)(e.into());
                let mut config: Map<String, Value> =
                    serde_json::from_slice(&text).map_err(wrong)?;
                config.retain(|key, _| !QUANTIZATION.contains(&key.as_str()));
                let name = match main {
                    DType::F32 => "float32",
                    DType::F16 => "float16",
                    _ => "bfloat16",
                };
                // transformers 5 calls `dtype` what was `torch_dtype` before.
                let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
                config.insert(key.to_owned(), json!(name));
                let tied = checkpoint.config().tied;
                config.insert("tie_word_embeddings".to_owned(), json!(tied));
                Value::Object(config)
            }
            Source::Gguf(tokenizer) => {
                let biases = specs.iter().filter(|s| s.name.ends_with(".bias"));
                let biases: Vec<String> = biases.map(|s| s.name.clone()).collect();
                let mut config = checkpoint.config().to_hf(main, &biases);
                if let Some(tokenizer) = tokenizer {
                    write_tokenizer(tokenizer, &mut config, dir)?;
                }
                config
            }
        };
        if let Some(map) = config.as_object_mut() {
            map.extend(entries);
        }
        write_json(&dir.join("config.json"), &config)
    }
}

/// Writes a tokenizer's files and `generation_config.json`; special tokens go to `config`.
fn write_tokenizer(tokenizer: &Tokenizer, config: &mut Value, dir: &Path) -> Result<()> {
    let mut generation = json!({ "_from_model_config": true });
    for (key, id) in [
        ("bos_token_id", tokenizer.bos()),
        ("eos_token_id", tokenizer.eos()),
        ("pad_token_id", tokenizer.padding()),
    ] {
        if let Some(id) = id {
            config[key] = json!(id);
            generation[key] = json!(id);
        }
    }
    match tokenizer.end_of_generation() {
        [] => {}
        [one] => generation["eos_token_id"] = json!(one),
        several => generation["eos_token_id"] = json!(several),
    }
    write_json(&dir.join("generation_config.json"), &generation)?;
    Ok(tokenizer.to_hf(dir)?)
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n")).map_err(Error::io("write", path))
}
