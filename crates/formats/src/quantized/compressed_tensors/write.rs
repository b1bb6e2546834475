//! Checkpoints for compressed-tensors.

use bevel_base::grouped::Coding;
use bevel_base::grouped::float4::{MXFP4_GROUP, NVFP4_GROUP, split_nvfp4, to_e8m0};
use bevel_base::{DType, GroupedMatrix};
use serde_json::{Value, json};

use super::super::bitstream;
use super::super::encode::{Tensor, floats, integers};
use super::super::format::{Codes, ModuleSpec};

/// Whether a module can be written; a reason where not.
pub(in crate::quantized) fn accepts(spec: &ModuleSpec) -> Result<(), String> {
    let group_size = match spec.codes {
        Codes::Integer { act_order: true, .. } => {
            return Err("its readers no longer take columns in another order; use groups that are fixed beforehand".to_owned());
        }
        Codes::Integer { .. } => spec.group_size,
        Codes::Float8 => None,
        Codes::Nvfp4 => Some(NVFP4_GROUP),
        Codes::Mxfp4 => Some(MXFP4_GROUP),
        Codes::Affine { .. } | Codes::Nf4 | Codes::Fp4 => {
            return Err("it holds integers with zero points, FP8, NVFP4 and MXFP4".to_owned());
        }
    };
    if group_size != spec.group_size {
        let needed = group_size.map_or("the whole row".to_owned(), |size| size.to_string());
        return Err(format!("its groups for such codes are {needed}"));
    }
    spec.check_whole_groups()
}

/// The tensors of a module.
pub(in crate::quantized) fn encode(
    spec: &ModuleSpec,
    matrix: Option<&GroupedMatrix>,
) -> Result<Vec<Tensor>, String> {
    match spec.codes {
        Codes::Nvfp4 | Codes::Mxfp4 => encode_float4(spec, matrix),
        Codes::Float8 => {
            let mut tensors = vec![
                Tensor::new("weight", DType::F8_E4M3, [spec.rows, spec.cols]),
                Tensor::new("weight_scale", spec.scale_dtype, [spec.rows, 1]),
            ];
            if let Some(matrix) = matrix {
                tensors[0].data = matrix.codes.clone();
                tensors[1].data = floats(spec.scale_dtype, &matrix.scales)?;
            }
            Ok(tensors)
        }
        _ => encode_packed(spec, matrix),
    }
}

fn encode_packed(spec: &ModuleSpec, matrix: Option<&GroupedMatrix>) -> Result<Vec<Tensor>, String> {
    let (rows, cols, groups) = (spec.rows, spec.cols, spec.groups());
    let bits = spec.codes.bits();
    let column_words = bitstream::words(cols, bits).unwrap_or(0);
    let row_words = bitstream::words(rows, bits).unwrap_or(0);
    let mut tensors = vec![
        Tensor::new("weight_packed", DType::I32, [rows, column_words]),
        Tensor::new("weight_scale", spec.scale_dtype, [rows, groups]),
        Tensor::new("weight_shape", DType::I64, [2]),
    ];
    let symmetric = matches!(spec.codes, Codes::Integer { symmetric: true, .. });
    if !symmetric {
        tensors.push(Tensor::new("weight_zero_point", DType::I32, [row_words, groups]));
    }
    let Some(matrix) = matrix else { return Ok(tensors) };
    let Coding::Integer { zeros, .. } = &matrix.coding else {
        return Err("codes are no integers".to_owned());
    };

    let mut words = Vec::with_capacity(rows * column_words);
    for codes in matrix.codes.chunks_exact(cols) {
        bitstream::pack(codes.iter().copied(), bits, |word| words.push(word));
    }
    tensors[0].data = integers(&words);
    tensors[1].data = floats(spec.scale_dtype, &matrix.scales)?;
    tensors[2].data = [rows, cols].iter().flat_map(|&dim| (dim as u64).to_le_bytes()).collect();
    if !symmetric {
        let mut words = vec![0; row_words * groups];
        for group in 0..groups {
            let mut at = group;
            let zeros = (0..rows).map(|row| zeros.at(bits, row * groups + group));
            bitstream::pack(zeros, bits, |word| {
                words[at] = word;
                at += groups;
            });
        }
        tensors[3].data = integers(&words);
    }
    Ok(tensors)
}

fn encode_float4(spec: &ModuleSpec, matrix: Option<&GroupedMatrix>) -> Result<Vec<Tensor>, String> {
    let (rows, groups) = (spec.rows, spec.groups());
    let nvfp4 = spec.codes == Codes::Nvfp4;
    let scale_dtype = if nvfp4 { DType::F8_E4M3 } else { DType::U8 };
    let mut tensors = vec![
        Tensor::new("weight_packed", DType::U8, [rows, spec.cols / 2]),
        Tensor::new("weight_scale", scale_dtype, [rows, groups]),
    ];
    if nvfp4 {
        tensors.push(Tensor::new("weight_global_scale", DType::F32, [1]));
    }
    let Some(matrix) = matrix else { return Ok(tensors) };
    let pairs = matrix.codes.as_chunks().0.iter();
    tensors[0].data = pairs.map(|[low, high]| low | high << 4).collect();
    if nvfp4 {
        let (global, codes) =
            split_nvfp4(&matrix.scales).ok_or("scales are no multiples of 8-bit floats")?;
        tensors[1].data = codes;
        tensors[2].data = floats(DType::F32, &[global])?;
    } else {
        let codes: Option<Vec<u8>> = matrix.scales.iter().map(|&s| to_e8m0(s)).collect();
        tensors[1].data = codes.ok_or("scales are no powers of two")?;
    }
    Ok(tensors)
}

/// What compressed-tensors calls the way such codes are stored.
fn storage(codes: Codes) -> &'static str {
    match codes {
        Codes::Nvfp4 => "nvfp4-pack-quantized",
        Codes::Mxfp4 => "mxfp4-pack-quantized",
        Codes::Float8 => "float-quantized",
        _ => "pack-quantized",
    }
}

/// An entry of `config_groups`.
fn group(spec: &ModuleSpec, targets: Value) -> Value {
    let float = matches!(spec.codes, Codes::Nvfp4 | Codes::Mxfp4 | Codes::Float8);
    let symmetric = !matches!(spec.codes, Codes::Integer { symmetric: false, .. });
    let strategy = match (spec.codes, spec.group_size) {
        (Codes::Nvfp4, _) => "tensor_group",
        (_, Some(_)) => "group",
        (_, None) => "channel",
    };
    let mut weights = json!({
        "num_bits": spec.codes.bits(),
        "type": if float { "float" } else { "int" },
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": spec.group_size,
        "dynamic": false,
        "observer": "minmax",
    });
    match spec.codes {
        Codes::Nvfp4 => weights["scale_dtype"] = "torch.float8_e4m3fn".into(),
        Codes::Mxfp4 => weights["scale_dtype"] = "torch.uint8".into(),
        _ => {}
    }
    json!({
        "targets": targets,
        "weights": weights,
        "input_activations": null,
        "output_activations": null,
        "format": storage(spec.codes),
    })
}

/// The configuration of modules: the kinds and the names of each, the most frequent first, and the
/// names of those left plain.
pub(in crate::quantized) fn config(kinds: &[(&ModuleSpec, Vec<&str>)], plain: &[&str]) -> Value {
    let mut groups = serde_json::Map::new();
    for (i, (spec, names)) in kinds.iter().enumerate() {
        let targets = if i == 0 { json!(["Linear"]) } else { json!(names) };
        groups.insert(format!("group_{i}"), group(spec, targets));
    }
    let storages: Vec<&str> = kinds.iter().map(|(spec, _)| storage(spec.codes)).collect();
    let mixed = storages.windows(2).any(|pair| pair[0] != pair[1]);
    json!({
        "quant_method": "compressed-tensors",
        "format": if mixed { "mixed-precision" } else { storages.first().copied().unwrap_or("dense") },
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    })
}
