//! Adapters as llama.cpp has them: a GGUF file with the matrices `NAME.weight.lora_a` and `NAME.weight.lora_b`, and
//! one α for all of them.

use std::path::Path;

use bevel_base::DType;
use bevel_formats::TensorSpec;
use bevel_formats::gguf::{GgufFile, GgufWriter, Metadata, Value};

use super::{AdapterFile, LowRank, common_type};
use crate::{ModelConfig, Result};

const TYPE: &str = "general.type";
const ARCHITECTURE: &str = "general.architecture";
const KIND: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
/// Words that switch an adapter on in the middle of a text (aLoRA).
const INVOCATION: &str = "adapter.alora.invocation_tokens";

pub(super) fn open(path: &Path, config: &ModelConfig) -> Result<AdapterFile> {
    let file = GgufFile::open(path)?;
    let mut adapter = AdapterFile::new(path.display().to_string());
    adapter.files = file.paths().to_vec();
    let text = |key: &str| file.metadata().get(key).and_then(Value::as_str).unwrap_or_default();
    for (key, expected) in [(TYPE, "adapter"), (KIND, "lora")] {
        if text(key) != expected {
            return Err(adapter.refused(format!(
                "its `{key}` is `{}`, and that of an adapter is `{expected}`",
                text(key)
            )));
        }
    }
    if text(ARCHITECTURE) != config.family.gguf {
        return Err(adapter.refused(format!(
            "it is for models of the architecture `{}`, and this one is `{}`",
            text(ARCHITECTURE),
            config.family.gguf
        )));
    }
    if file.metadata().contains_key(INVOCATION) {
        return Err(adapter.refused("it begins at certain words (aLoRA), which is not supported"));
    }
    let alpha = file.metadata().get(ALPHA).and_then(Value::as_f64).unwrap_or_default() as f32;
    for name in file.tensors().keys() {
        let Some(weight) = name.strip_suffix(".lora_a") else {
            let other = name.strip_suffix(".lora_b").map(|weight| format!("{weight}.lora_a"));
            match other.is_some_and(|other| file.tensors().contains_key(&other)) {
                true => continue,
                false => return Err(adapter.refused(unpaired(name))),
            }
        };
        let other = format!("{weight}.lora_b");
        if !file.tensors().contains_key(&other) {
            return Err(adapter.refused(unpaired(name)));
        }
        let wrap = |source| adapter.failed(name, source);
        let (a, b) = (file.tensor(name)?, file.tensor(&other)?);
        let rank = a.shape().rows();
        let matrix = LowRank {
            rank,
            // Without an α, llama.cpp adds B A as it is.
            alpha: if alpha == 0.0 { rank as f32 } else { alpha },
            rank_stabilized: false,
            dtype: common_type(a.dtype(), b.dtype()),
            a: a.to_f32().map_err(wrap)?,
            b: b.to_f32().map_err(wrap)?,
            magnitude: None,
        };
        adapter.insert_stored(config, weight, name, matrix)?;
    }
    Ok(adapter)
}

fn unpaired(name: &str) -> String {
    format!("`{name}` is no half of a pair of matrices, `lora_a` and `lora_b`, and cannot be run")
}

impl AdapterFile {
    /// Writes the adapter as a GGUF file.
    ///
    /// # Errors
    /// [`Error::Adapter`](crate::Error::Adapter) for one that such a file has no place for, and those of writing.
    pub fn write_gguf(&self, path: &Path, config: &ModelConfig) -> Result<()> {
        if self.matrices.values().any(|matrix| matrix.magnitude.is_some()) {
            return Err(self.refused(
                "GGUF files of adapters have no place for the lengths of rows (DoRA); merge it into the model instead",
            ));
        }
        if let Some(name) = self.tensors.keys().next() {
            return Err(self.refused(format!(
                "GGUF files of adapters have no place for whole tensors (`{name}`); merge it into the model instead"
            )));
        }
        // Where matrices differ in what α would have to be, B makes up for it.
        let alpha_of = |matrix: &LowRank| matrix.scale() * matrix.rank as f32;
        let alpha = self.matrices.values().map(alpha_of).find(|&alpha| alpha != 0.0).unwrap_or(1.0);
        let mut metadata = Metadata::new();
        for (key, value) in [(ARCHITECTURE, config.family.gguf), (TYPE, "adapter"), (KIND, "lora")]
        {
            metadata.insert(key.to_owned(), value.into());
        }
        metadata.insert(ALPHA.to_owned(), Value::F32(alpha));
        let mut tensors = Vec::with_capacity(2 * self.matrices.len());
        for (weight, matrix) in &self.matrices {
            let (rank, factor) = (matrix.rank, alpha_of(matrix) / alpha);
            let (cols, rows) = (matrix.a.len() / rank, matrix.b.len() / rank);
            let b: Vec<f32> = matrix.b.iter().map(|value| value * factor).collect();
            let kept = if factor == 1.0 { matrix.dtype } else { DType::F32 };
            for (kind, values, shape) in [("a", &matrix.a, [rank, cols]), ("b", &b, [rows, rank])] {
                let name = format!("{weight}.lora_{kind}");
                let spec = TensorSpec::new(&name, kept, shape);
                tensors.push((spec, self.packed(&name, values, kept)?));
            }
        }
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let mut writer = GgufWriter::create(path, &metadata, &specs, None)?;
        for (spec, bytes) in &tensors {
            writer.write(&spec.name, bytes)?;
        }
        writer.finish()?;
        Ok(())
    }
}
