//! Adapters as PEFT has them: a directory with `adapter_config.json` and `adapter_model.safetensors`.

use std::io::Write;
use std::path::Path;

use bevel_base::DType;
use bevel_formats::{AtomicFile, TensorSpec, safetensors::SafetensorsWriter};
use bevel_model::{ModelConfig, Transform, regroup_rows};
use indexmap::IndexMap;
use serde_json::json;

use crate::lora::{LoraConfig, Target};
use crate::{Error, Parameters, Result};

/// Writes adapters of a model into a directory, which is made where it is not there. `base` is what the model is
/// called.
///
/// # Errors
/// [`Error::Fused`] for families whose projections PEFT knows as one, and those of writing.
pub fn write_adapter(
    directory: &Path,
    base: &str,
    model: &ModelConfig,
    lora: &LoraConfig,
    parameters: &Parameters,
) -> Result<()> {
    let mut tensors = Vec::new();
    for parameter in parameters.all() {
        let (stem, kind) = parameter.name.rsplit_once('.').expect("adapters have two names");
        let kind = if kind == "lora_a" { "lora_A" } else { "lora_B" };
        let source = model.hf_tensor(&format!("{stem}.weight"), "model.").ok_or(Error::Fused)?;
        let module = source.names[0].strip_suffix(".weight").unwrap_or(&source.names[0]);
        let values = &parameters.values[parameter.range.clone()];
        let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (rows, cols) = parameter.shape;
        // The rows of B are those of the weight.
        if let (Transform::InterleaveRows { .. }, "lora_B") = (source.transform, kind) {
            bytes = regroup_rows(&bytes, rows, model.head_dim, false);
        }
        let name = format!("base_model.model.{module}.{kind}.weight");
        tensors.push((TensorSpec { name, dtype: DType::F32, shape: [rows, cols].into() }, bytes));
    }
    std::fs::create_dir_all(directory).map_err(|error| io(directory, error))?;
    let metadata = IndexMap::from([("format".to_owned(), "pt".to_owned())]);
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let path = directory.join("adapter_model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &metadata, &specs, None)?;
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes)?;
    }
    writer.finish()?;
    let module = |target: &Target| {
        let tensor = model.family.layer.iter().find(|tensor| tensor.gguf == target.name());
        tensor.map(|tensor| tensor.hf.rsplit('.').next().unwrap_or(tensor.hf))
    };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": lora.targets.iter().filter_map(module).collect::<Vec<_>>(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "use_dora": false,
    });
    let path = directory.join("adapter_config.json");
    let mut file = AtomicFile::create(&path)?;
    file.write_all(format!("{config:#}\n").as_bytes()).map_err(|error| io(&path, error))?;
    file.finish()?;
    Ok(())
}

fn io(path: &Path, error: std::io::Error) -> Error {
    Error::Io { path: path.display().to_string(), error }
}
