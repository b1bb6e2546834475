//! Adapters as PEFT has them: a directory with `adapter_config.json` and `adapter_model.safetensors`.

use std::io::Write;
use std::path::Path;

use bevel_base::{DType, Shape};
use bevel_formats::{AtomicFile, TensorSpec, safetensors::SafetensorsWriter};
use bevel_model::{ModelConfig, Transform, regroup_rows};
use indexmap::IndexMap;
use serde_json::json;

use crate::{Adapter, Error, LoraConfig, Result};

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
    adapters: &[Adapter],
) -> Result<()> {
    let (mut tensors, mut modules) = (Vec::new(), Vec::new());
    for Adapter { name, rank, a, b, magnitude } in adapters {
        let source = model.hf_tensor(&format!("{name}.weight"), "model.").ok_or(Error::Fused)?;
        let module = source.names[0].strip_suffix(".weight").unwrap_or(&source.names[0]);
        let regroups = matches!(source.transform, Transform::InterleaveRows { .. });
        let (rows, cols) = (b.len() / rank, a.len() / rank);
        let mut add = |kind: &str, values: &[f32], shape: &[usize], of_rows: bool| {
            let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            // The rows of B are those of the weight.
            if regroups && of_rows {
                bytes = regroup_rows(&bytes, rows, model.head_dim, false);
            }
            let name = format!("base_model.model.{module}.{kind}");
            let shape = Shape::from(shape.to_vec());
            tensors.push((TensorSpec { name, dtype: DType::F32, shape }, bytes));
        };
        add("lora_A.weight", a, &[*rank, cols], false);
        add("lora_B.weight", b, &[rows, *rank], true);
        if let Some(magnitude) = magnitude {
            add("lora_magnitude_vector", magnitude, &[rows], true);
        }
        modules.push(module.to_owned());
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
    // Twice the rank with twice the weight, so that s is the same.
    let rank = adapters.first().map_or(lora.rank, |adapter| adapter.rank);
    let more = rank as f32 / lora.rank as f32;
    let alpha = lora.alpha * if lora.rank_stabilized { more.sqrt() } else { more };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": short(modules, model.layers),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "use_dora": lora.dora,
    });
    let path = directory.join("adapter_config.json");
    let mut file = AtomicFile::create(&path)?;
    file.write_all(format!("{config:#}\n").as_bytes()).map_err(|error| io(&path, error))?;
    file.finish()?;
    Ok(())
}

/// The last names of modules where every layer has them, so that PEFT finds them in all.
fn short(modules: Vec<String>, layers: usize) -> Vec<String> {
    let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let mut names: Vec<String> = modules.iter().map(|module| last(module)).collect();
    names.sort();
    names.dedup();
    if names.len() * layers == modules.len() { names } else { modules }
}

fn io(path: &Path, error: std::io::Error) -> Error {
    Error::Io { path: path.display().to_string(), error }
}
