//! A Hugging Face directory to another one: other types, other shards, everything else the same.
//! Linear layers that are stored as codes become plain tensors.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use bevel_base::{DType, Shape};
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
    let tensors = Tensor::all(checkpoint, &files)?;
    let tied = checkpoint.config().tied;
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|t| {
            // Where no type is asked for, codes become what packed types become.
            let from = if t.coded.is_some() { DType::F16 } else { t.dtype };
            TensorSpec::new(&t.name, hf_type(recipe, &t.name, tied, from), t.shape.clone())
        })
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
    let total = tensors.iter().map(Tensor::byte_len).sum();
    let mut meter = Meter { stage: Stage::Write, done: 0, total, on_progress };
    let mut transcoder = Transcoder::new(cpu.pool());
    for (tensor, spec) in tensors.iter().zip(&specs) {
        let (from, stored) = (tensor.dtype, tensor.stored_len(&files));
        let data = tensor.read(checkpoint, &files)?;
        let mut write = |data: &[u8]| Ok(writer.write(&spec.name, data)?);
        let tally = if from.is_weight() {
            let job = Job::new(&spec.name, from, spec.dtype, spec.shape.row_len());
            let release = || tensor.release(&files);
            transcoder.run(&job, &data, &mut meter, &release, &mut write)?
        } else {
            write(&data)?;
            meter.advance(&spec.name, data.len())?;
            Tally::default()
        };
        report.push_converted(spec, from, stored, tally, options)?;
        tensor.release(&files);
    }
    let written = writer.finish()?;
    report.files =
        written.iter().map(|file| out.join(file.file_name().unwrap_or_default())).collect();

    copy_side_files(dir, directory.workspace())?;
    write_config(dir, recipe, directory.workspace())?;
    directory.finish()?;
    Ok(report)
}

/// A tensor of the new directory: one of the old one, or a linear layer's weight whose codes and
/// scales are several.
struct Tensor {
    name: String,
    /// The type its values are read in.
    dtype: DType,
    shape: Shape,
    /// The names of codes and scales.
    coded: Option<Vec<String>>,
}

impl Tensor {
    /// In file order; a weight of codes stands where the first of its tensors stood.
    fn all(checkpoint: &Checkpoint, files: &safetensors::Checkpoint) -> Result<Vec<Self>> {
        let mut weight_of: HashMap<String, usize> = HashMap::new();
        let mut coded = Vec::new();
        if let Some(scheme) = checkpoint.scheme() {
            for module in scheme.modules(files)? {
                let Some(shape) = scheme.module_shape(files, &module)? else { continue };
                let parts = scheme.module_tensors(files, &module);
                weight_of.extend(parts.iter().map(|part| (part.clone(), coded.len())));
                coded.push(Some(Self {
                    name: format!("{module}.weight"),
                    dtype: DType::F32,
                    shape: shape.into(),
                    coded: Some(parts),
                }));
            }
        }
        let mut tensors = Vec::new();
        for (name, info) in files.tensors() {
            match weight_of.get(name) {
                Some(&index) => tensors.extend(coded[index].take()),
                None => tensors.push(Self {
                    name: name.clone(),
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    coded: None,
                }),
            }
        }
        Ok(tensors)
    }

    /// Bytes of the values.
    fn byte_len(&self) -> u64 {
        self.shape.byte_len(self.dtype).map_or(u64::MAX, |len| len as u64)
    }

    fn stored_len(&self, files: &safetensors::Checkpoint) -> u64 {
        let len = |name: &String| files.tensors()[name].byte_len() as u64;
        self.coded.as_ref().map_or_else(|| len(&self.name), |parts| parts.iter().map(len).sum())
    }

    /// The values.
    fn read<'a>(
        &self,
        checkpoint: &Checkpoint,
        files: &'a safetensors::Checkpoint,
    ) -> Result<Cow<'a, [u8]>> {
        let (Some(scheme), Some(_)) = (checkpoint.scheme(), &self.coded) else {
            return Ok(files.tensor(&self.name)?.data().into());
        };
        let module = self.name.strip_suffix(".weight").unwrap_or(&self.name);
        let values = scheme.read(files, module)?.dequantize();
        Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into())
    }

    fn release(&self, files: &safetensors::Checkpoint) {
        let parts = self.coded.as_deref().unwrap_or(std::slice::from_ref(&self.name));
        parts.iter().for_each(|name| files.release(name));
    }
}

/// Copies what is neither weights nor `config.json`: the tokenizer's files, texts, templates.
pub(super) fn copy_side_files(from: &Path, to: &Path) -> Result<()> {
    const KINDS: [&str; 5] = ["json", "txt", "jinja", "model", "md"];
    /// Where GPTQ and AWQ programs repeat how the old weights were quantized.
    const QUANTIZATION: [&str; 2] = ["quantize_config.json", "quant_config.json"];
    let entries = fs::read_dir(from).map_err(Error::io("read", from))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_owned();
        let shown = name.to_string_lossy();
        let kind = path.extension().unwrap_or_default().to_string_lossy();
        let is_side = KINDS.contains(&kind.as_ref())
            && shown != "config.json"
            && !QUANTIZATION.contains(&shown.as_ref())
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

/// Copies `config.json`, with the new type where there is one, and without a word on how the old
/// weights were quantized.
fn write_config(from: &Path, recipe: &Recipe, to: &Path) -> Result<()> {
    const QUANTIZATION: [&str; 3] = ["quantization_config", "quantization", "compression_config"];
    let path = from.join("config.json");
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let wrong = |e: serde_json::Error| Error::io("read", &path)(e.into());
    let mut config: Value = serde_json::from_slice(&text).map_err(wrong)?;
    let is_coded = QUANTIZATION.iter().any(|key| config.get(key).is_some());
    let mix = if let Base::Mix(mix) = recipe.base { Some(mix) } else { None };
    if mix.is_none() && !is_coded {
        let copy = to.join("config.json");
        return fs::write(&copy, text).map_err(Error::io("write", &copy));
    }
    if let Some(config) = config.as_object_mut() {
        config.retain(|key, _| !QUANTIZATION.contains(&key.as_str()));
    }
    if let Some(mix) = mix {
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
    }
    write_json(&to.join("config.json"), &config)
}
