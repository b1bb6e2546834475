use std::path::Path;
use std::sync::Arc;

use bevel_base::DType;
use bevel_model::{AdapterFile, LowRank, ModelConfig};
use indexmap::IndexMap;

use crate::{Adapter, Error, LoraConfig, Parameters, Result};

/// Writes adapters of a model, and tensors in the place of its own, into a directory as PEFT has it, which is made where
/// it is not there. `base` is what the model is called.
///
/// # Errors
/// [`Error::PartOfFused`], and those of writing.
pub fn write_adapter(
    directory: &Path,
    base: &str,
    model: &ModelConfig,
    lora: &LoraConfig,
    adapters: &[Adapter],
    tensors: &[(String, Arc<[f32]>)],
) -> Result<()> {
    let mut file = adapter_file(model, lora, adapters)?;
    for (name, values) in tensors {
        file.insert_tensor(model, name, values.to_vec())?;
    }
    Ok(file.write_peft(directory, base, model)?)
}

/// Makes the adapters begin with those of a file. Families whose projections are fused cannot: their files have one
/// matrix for several layers.
///
/// # Errors
/// [`Error::Start`] where the file's adapters are not those of the configuration.
pub fn start_from(
    file: &AdapterFile,
    lora: &LoraConfig,
    parameters: &mut Parameters,
) -> Result<()> {
    let refused = |reason: String| Error::Start { path: file.path().to_owned(), reason };
    let (mut used, mut tensors) = (0, 0);
    for parameter in parameters.all().to_vec() {
        if let Some(values) = file.tensors().get(&parameter.name) {
            parameters.values[parameter.range].copy_from_slice(values);
            tensors += 1;
            continue;
        }
        let Some((layer, kind @ ("lora_a" | "lora_b" | "lora_m"))) =
            parameter.name.rsplit_once('.')
        else {
            return Err(refused(format!(
                "it has no tensor `{}`; choose --modules-to-save as it has them",
                parameter.name
            )));
        };
        let weight = format!("{layer}.weight");
        let Some(matrix) = file.matrices().get(&weight) else {
            return Err(refused(format!(
                "it has no adapter for `{layer}`; choose --targets as it has them"
            )));
        };
        if matrix.rank != lora.rank || (matrix.scale() - lora.scale()).abs() > 1e-6 * lora.scale() {
            return Err(refused(format!(
                "`{layer}` has rank {} and counts {}, not rank {} and {}; give its --rank and --alpha",
                matrix.rank,
                matrix.scale(),
                lora.rank,
                lora.scale()
            )));
        }
        if matrix.magnitude.is_some() != lora.dora {
            return Err(refused(format!(
                "`{layer}` {}",
                if lora.dora {
                    "has no lengths; leave --dora out"
                } else {
                    "has lengths; give --dora"
                }
            )));
        }
        let values = match kind {
            "lora_a" => &matrix.a,
            "lora_b" => &matrix.b,
            _ => matrix.magnitude.as_ref().expect("it was looked for"),
        };
        used += usize::from(kind == "lora_a");
        parameters.values[parameter.range].copy_from_slice(values);
    }
    if used != file.matrices().len() {
        return Err(refused("it adapts more layers than --targets names".to_owned()));
    }
    if tensors != file.tensors().len() {
        return Err(refused("it has more tensors than --modules-to-save names".to_owned()));
    }
    Ok(())
}

/// What was trained, by the tensors of the model's files.
///
/// A tensor that holds several linear layers has one adapter: its A has the rows of all of theirs, and its B is zero
/// but where a layer's rows meet the layer's own A.
fn adapter_file(
    model: &ModelConfig,
    lora: &LoraConfig,
    adapters: &[Adapter],
) -> Result<AdapterFile> {
    // With each the first row of its own.
    let mut tensors: IndexMap<String, Vec<(usize, &Adapter)>> = IndexMap::new();
    for adapter in adapters {
        let (weight, first_row) = place(model, &adapter.name);
        tensors.entry(weight).or_default().push((first_row, adapter));
    }
    let mut file = AdapterFile::new("the trained adapter");
    for (weight, parts) in tensors {
        let rank = parts.iter().map(|(_, part)| part.rank).sum();
        let rows = model.tensor_shape(&weight).map_or(0, |shape| shape[0]);
        let mut b = vec![0.0; rows * rank];
        let mut column = 0;
        for &(first_row, part) in &parts {
            let lines = b.chunks_exact_mut(rank).skip(first_row);
            for (line, values) in lines.zip(part.b.chunks_exact(part.rank)) {
                line[column..][..part.rank].copy_from_slice(values);
            }
            column += part.rank;
        }
        let magnitude = lora.dora.then(|| {
            let covered: usize = parts.iter().map(|(_, part)| part.b.len() / part.rank).sum();
            if covered < rows {
                return Err(Error::PartOfFused { tensor: weight.clone() });
            }
            let mut magnitude = vec![0.0; rows];
            for (first_row, part) in &parts {
                let lengths = part.magnitude.as_deref().unwrap_or_default();
                magnitude[*first_row..][..lengths.len()].copy_from_slice(lengths);
            }
            Ok(magnitude)
        });
        // The scale is what it was with the configuration's rank.
        let more = rank as f32 / lora.rank as f32;
        let matrix = LowRank {
            rank,
            alpha: lora.alpha * if lora.rank_stabilized { more.sqrt() } else { more },
            rank_stabilized: lora.rank_stabilized,
            dtype: DType::F32,
            a: parts.iter().flat_map(|(_, part)| &part.a).copied().collect(),
            b,
            magnitude: magnitude.transpose()?,
        };
        file.insert(model, &weight, matrix)?;
    }
    Ok(file)
}

/// The tensor that a linear layer's weight lies in, and its first row there.
fn place(model: &ModelConfig, layer: &str) -> (String, usize) {
    let (block, name) = layer.rsplit_once('.').expect("layers are in blocks");
    let (q, kv) = (model.q_dim(), model.kv_dim());
    let (tensor, first_row) = match name {
        "attn_q" if model.family.is_fused() => ("attn_qkv", 0),
        "attn_k" if model.family.is_fused() => ("attn_qkv", q),
        "attn_v" if model.family.is_fused() => ("attn_qkv", q + kv),
        "ffn_gate" if model.family.is_fused() => ("ffn_up", 0),
        "ffn_up" if model.family.is_fused() => ("ffn_up", model.ffn_dim),
        name => (name, 0),
    };
    (format!("{block}.{tensor}.weight"), first_row)
}
