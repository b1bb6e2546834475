use std::path::Path;

use bevel_base::DType;
use bevel_model::{AdapterFile, LowRank, ModelConfig};
use indexmap::IndexMap;

use crate::lora::LoraConfig;
use crate::{Parameters, Result};

/// Writes adapters of a model into a directory as PEFT has it, which is made where it is not there. `base` is what
/// the model is called.
///
/// # Errors
/// Those of writing.
pub fn write_adapter(
    directory: &Path,
    base: &str,
    model: &ModelConfig,
    lora: &LoraConfig,
    parameters: &Parameters,
) -> Result<()> {
    Ok(adapter(model, lora, parameters)?.write_peft(directory, base, model)?)
}

/// A trained adapter of some rows of a tensor.
struct Part<'a> {
    first_row: usize,
    a: &'a [f32],
    b: &'a [f32],
}

/// What was trained, by the tensors of the model's files.
///
/// A tensor that holds several linear layers has one adapter: its A has the rows of all of theirs, and its B is zero
/// but where a layer's rows meet the layer's own A.
fn adapter(model: &ModelConfig, lora: &LoraConfig, parameters: &Parameters) -> Result<AdapterFile> {
    let mut tensors: IndexMap<String, Vec<Part<'_>>> = IndexMap::new();
    // A comes before B of the same layer.
    for pair in parameters.all().chunks_exact(2) {
        let (layer, _) = pair[0].name.rsplit_once('.').expect("adapters have two names");
        let (weight, first_row) = place(model, layer);
        let [a, b] = [&pair[0], &pair[1]].map(|p| &parameters.values[p.range.clone()]);
        tensors.entry(weight).or_default().push(Part { first_row, a, b });
    }
    let mut file = AdapterFile::new("the trained adapter");
    for (weight, parts) in tensors {
        let (rank, count) = (lora.rank * parts.len(), parts.len() as f32);
        let rows = model.tensor_shape(&weight).map_or(0, |shape| shape[0]);
        let mut b = vec![0.0; rows * rank];
        for (i, part) in parts.iter().enumerate() {
            let lines = b.chunks_exact_mut(rank).skip(part.first_row);
            for (line, values) in lines.zip(part.b.chunks_exact(lora.rank)) {
                line[i * lora.rank..][..lora.rank].copy_from_slice(values);
            }
        }
        // The scale is what it was with the rank of one.
        let more = if lora.rank_stabilized { count.sqrt() } else { count };
        let matrix = LowRank {
            rank,
            alpha: lora.alpha * more,
            rank_stabilized: lora.rank_stabilized,
            dtype: DType::F32,
            a: parts.iter().flat_map(|part| part.a).copied().collect(),
            b,
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
