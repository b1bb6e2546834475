//! Writes a Hugging Face model in a quantized format, module by module, by plain rounding: the least
//! that a program needs to do to produce files which other programs load.
//!
//! ```text
//! cargo run --release -p bevel-formats --example round_to_nearest -- MODEL gptq OUT
//! ```
//! The method is as good as rounding gets; `bevel quantize` has better ones.

use std::error::Error;
use std::fs;
use std::path::Path;

use bevel_base::grouped::nf4::{self, Levels};
use bevel_base::grouped::{Coding, Zeros, float4, float8, mlx, round_to};
use bevel_base::{DType, GroupedMatrix};
use bevel_formats::TensorSpec;
use bevel_formats::quantized::{Codes, GroupedFormat, ModuleSpec};
use bevel_formats::safetensors::{Checkpoint, SafetensorsWriter};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The names that `FORMAT` may have: a format, codes and columns in a group.
const FORMATS: &[(&str, GroupedFormat, Codes, Option<usize>)] = {
    const fn integer(bits: u32, symmetric: bool) -> Codes {
        Codes::Integer { bits, symmetric, act_order: false }
    }
    use GroupedFormat::{Awq, BitsAndBytes, CompressedTensors, Gptq, Mlx};
    &[
        ("gptq", Gptq { v2: false }, integer(4, true), Some(64)),
        ("gptq_v2-3", Gptq { v2: true }, integer(3, false), Some(64)),
        ("gptq-8", Gptq { v2: false }, integer(8, true), None),
        ("gptq_v2", Gptq { v2: true }, integer(4, false), Some(64)),
        ("awq", Awq, integer(4, false), Some(64)),
        ("compressed-tensors", CompressedTensors, integer(4, true), Some(64)),
        ("compressed-tensors-asymmetric", CompressedTensors, integer(4, false), Some(64)),
        ("compressed-tensors-8", CompressedTensors, integer(8, true), None),
        ("fp8", CompressedTensors, Codes::Float8, None),
        ("nvfp4", CompressedTensors, Codes::Nvfp4, Some(16)),
        ("mxfp4", CompressedTensors, Codes::Mxfp4, Some(32)),
        ("nf4", BitsAndBytes { nested: false }, Codes::Nf4, Some(64)),
        ("nf4-nested", BitsAndBytes { nested: true }, Codes::Nf4, Some(64)),
        ("fp4", BitsAndBytes { nested: false }, Codes::Fp4, Some(64)),
        ("mlx", Mlx, Codes::Affine { bits: 4 }, Some(64)),
        ("mlx-6", Mlx, Codes::Affine { bits: 6 }, Some(64)),
        ("mlx-mxfp4", Mlx, Codes::Mxfp4, Some(32)),
    ]
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, name, out] = &arguments[..] else {
        let names: Vec<&str> = FORMATS.iter().map(|(name, ..)| *name).collect();
        return Err(format!("expected MODEL FORMAT OUT, with FORMAT one of {names:?}").into());
    };
    let found = FORMATS.iter().find(|(known, ..)| known == name);
    let &(_, format, codes, group_size) = found.ok_or("no such format")?;
    let (model, out) = (Path::new(model), Path::new(out));

    // What each tensor becomes. Everything but the modules keeps its name and bytes.
    let files = Checkpoint::open(model)?;
    let mut modules = Vec::new();
    let mut specs: Vec<TensorSpec> = Vec::new();
    for (name, info) in files.tensors() {
        match module_of(name, format).zip(<[usize; 2]>::try_from(info.shape.dims()).ok()) {
            Some((module, [rows, cols])) => {
                let spec = ModuleSpec { rows, cols, group_size, codes, scale_dtype: info.dtype };
                specs.extend(format.specs(module, &spec)?);
                modules.push((module.to_owned(), Some(spec)));
            }
            None => specs.push(TensorSpec::new(name, info.dtype, info.shape.clone())),
        }
    }
    modules.push(("lm_head".to_owned(), None));

    fs::create_dir_all(out)?;
    let path = out.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &format.metadata(), &specs, None)?;
    for name in files.tensors().keys() {
        let view = files.tensor(name)?;
        let module = module_of(name, format);
        match modules.iter().find(|(known, _)| Some(known.as_str()) == module) {
            Some((module, Some(spec))) => {
                let matrix = quantize(&view.to_f32()?, spec)?;
                let matrix = format.fit(module, spec, matrix)?;
                for (name, data) in format.encode(module, spec, &matrix)? {
                    writer.write(&name, &data)?;
                }
            }
            _ => writer.write(name, view.data())?,
        }
        files.release(name);
    }
    writer.finish()?;
    write_configuration(model, out, format, &modules)
}

/// The module whose weight a tensor is, where the format quantizes such modules. MLX quantizes the
/// embedding too.
fn module_of(name: &str, format: GroupedFormat) -> Option<&str> {
    let module = name.strip_suffix(".weight")?;
    let embedding = format == GroupedFormat::Mlx && module.ends_with("embed_tokens");
    (module.ends_with("_proj") || embedding).then_some(module)
}

fn quantize(values: &[f32], spec: &ModuleSpec) -> Result<GroupedMatrix> {
    let ModuleSpec { rows, cols, group_size, codes, scale_dtype } = *spec;
    let group = group_size.unwrap_or(cols);
    Ok(match codes {
        Codes::Integer { bits, symmetric, .. } => {
            integers(values, rows, cols, group, bits, symmetric)?
        }
        Codes::Affine { bits } => mlx::quantize(values, rows, cols, bits, group, scale_dtype)?,
        Codes::Nf4 => nf4::quantize(values, rows, cols, Levels::Nf4, group)?,
        Codes::Fp4 => nf4::quantize(values, rows, cols, Levels::Fp4, group)?,
        Codes::Nvfp4 => float4::quantize_nvfp4(values, rows, cols)?,
        Codes::Mxfp4 => float4::quantize_mxfp4(values, rows, cols)?,
        Codes::Float8 => float8::quantize(values, rows, cols, scale_dtype)?,
    })
}

/// Integers between the least and the largest value of each group.
fn integers(
    values: &[f32],
    rows: usize,
    cols: usize,
    group_size: usize,
    bits: u32,
    symmetric: bool,
) -> Result<GroupedMatrix> {
    let most = ((1u32 << bits) - 1) as f32;
    let half = 1u8 << (bits - 1);
    let (mut codes, mut zeros) = (Vec::with_capacity(values.len()), Vec::new());
    let mut scales = Vec::new();
    for group in values.chunks_exact(cols).flat_map(|row| row.chunks(group_size)) {
        let low = group.iter().copied().fold(0.0, f32::min);
        let high = group.iter().copied().fold(0.0, f32::max);
        let range = if symmetric { 2.0 * high.max(-low) } else { high - low };
        // Rounded first, so that codes are chosen for the scale that will be read. Any 16-bit float
        // that both types hold would do; this one has the digits of the coarser.
        let mut scale = [(range / most).max(1e-6)];
        round_to(DType::BF16, &mut scale)?;
        let zero =
            if symmetric { f32::from(half) } else { (-low / scale[0]).round().clamp(1.0, most) };
        codes.extend(group.iter().map(|w| ((w / scale[0]).round() + zero).clamp(0.0, most) as u8));
        zeros.push(zero as u8);
        scales.push(scale[0]);
    }
    let coding = Coding::Integer { bits, zeros: Zeros::new(bits, zeros) };
    let matrix = GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None };
    Ok(matrix.checked()?)
}

/// Copies what is not weights, and adds to the configuration how they are quantized.
fn write_configuration(
    model: &Path,
    out: &Path,
    format: GroupedFormat,
    modules: &[(String, Option<ModuleSpec>)],
) -> Result<()> {
    for entry in fs::read_dir(model)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json" || extension == "jinja") {
            fs::copy(&path, out.join(path.file_name().expect("a file has a name")))?;
        }
    }
    let entries = format.config(modules)?;
    if let GroupedFormat::Gptq { .. } = format {
        let text = format!("{:#}\n", entries["quantization_config"]);
        fs::write(out.join("quantize_config.json"), text)?;
    }
    let text = fs::read_to_string(model.join("config.json"))?;
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)?;
    config.extend(entries);
    fs::write(out.join("config.json"), format!("{:#}\n", serde_json::Value::Object(config)))?;
    Ok(())
}
