//! Checkpoints for bitsandbytes: NF4 and FP4, their scales quantized or not, and LLM.int8.
//! `docs/formats/bitsandbytes.md` shows the layout.

use bevel_base::grouped::nf4::{DoubleQuantized, common_divisor, dynamic_map};
use bevel_base::grouped::{Coding, Zeros};
use bevel_base::{DType, GroupedMatrix};
use serde_json::{Value, json};

use super::encode::{Tensor, floats};
use super::format::{Codes, ModuleSpec};
use super::module::Module;
use super::settings::Settings;
use crate::Result;

pub(super) const PARTS: &[&str] = &["weight", "SCB", "weight_format"];

/// Where the rest of the state lies, as text.
const STATES: [&str; 2] =
    ["weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"];

/// Everything else stands beside the tensors.
#[derive(Clone, Debug)]
pub(super) struct BitsAndBytes;

/// What the text beside a weight of 4 bits says.
struct State {
    part: &'static str,
    shape: [usize; 2],
    blocksize: usize,
    /// Of the scales' own quantization: values that share a scale, and what is added.
    nested: Option<(usize, f32)>,
}

impl State {
    fn read(module: &Module<'_>) -> Result<Option<State>> {
        let Some(part) = STATES.into_iter().find(|part| module.has(part)) else {
            return Ok(None);
        };
        let text = module.typed(part, &[DType::U8])?.data();
        let value: Value =
            serde_json::from_slice(text).map_err(|error| module.error(part, error.to_string()))?;
        Self::parse(part, &value).map(Some).map_err(|reason| module.error(part, reason))
    }

    fn parse(part: &'static str, value: &Value) -> Result<State, String> {
        let settings = Settings::new("quant_state", value)?;
        let size = |field: &str| {
            let size = settings.group_size(field)?;
            size.ok_or_else(|| settings.wrong(field, "is missing"))
        };
        let shape = settings.block("shape")?;
        let nested = match settings.get("nested_offset") {
            Some(offset) => {
                let offset = offset.as_f64();
                let offset =
                    offset.ok_or_else(|| settings.wrong("nested_offset", "is no number"))?;
                Some((size("nested_blocksize")?, offset as f32))
            }
            None => None,
        };
        let shape = shape.ok_or_else(|| settings.wrong("shape", "is missing"))?;
        Ok(State { part, shape, blocksize: size("blocksize")?, nested })
    }
}

impl BitsAndBytes {
    pub(super) fn shape(&self, module: &Module<'_>) -> Result<Option<[usize; 2]>> {
        if let Some(state) = State::read(module)? {
            return Ok(Some(state.shape));
        }
        let int8 = module.has("SCB") && module.dtype("weight") == Some(DType::I8);
        int8.then(|| module.matrix("weight")).transpose()
    }

    pub(super) fn read(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        match State::read(module)? {
            Some(state) => read_4bit(module, &state),
            None => read_int8(module),
        }
    }
}

/// Row-wise absolute maxima over 127.
fn read_int8(module: &Module<'_>) -> Result<GroupedMatrix> {
    let [rows, cols] = module.matrix("weight")?;
    if module.has("weight_format") {
        let format = module.typed("weight_format", &[DType::U8])?.data();
        if format.first() != Some(&0) {
            let reason =
                "it asks for another order than rows; save the model with a newer bitsandbytes";
            return Err(module.error("weight_format", reason));
        }
    }
    let codes = module.typed("weight", &[DType::I8])?.data().iter().map(|&code| code ^ 0x80);
    module.expect("SCB", &[rows])?;
    let scales = module.floats("SCB")?.iter().map(|&maximum| maximum / 127.0).collect();
    let coding = Coding::Integer { bits: 8, zeros: Zeros::Symmetric };
    let codes = codes.collect();
    Ok(GroupedMatrix { rows, cols, group_size: cols, coding, codes, scales, group_of: None })
}

fn read_4bit(module: &Module<'_>, state: &State) -> Result<GroupedMatrix> {
    let [rows, cols] = state.shape;
    let packed = module.view("weight")?.data();
    let values = rows.checked_mul(cols).filter(|values| values.div_ceil(2) == packed.len());
    let Some(values) = values else {
        let reason = format!("{} bytes for weights {:?} of 4 bits", packed.len(), state.shape);
        return Err(module.error("weight", reason));
    };
    // Blocks run across the ends of rows. A group is what certainly lies within both.
    let group_size = common_divisor(state.blocksize, cols);
    let maxima = maxima(module, state, values.div_ceil(state.blocksize))?;
    let groups = values / group_size;
    let scales = (0..groups).map(|group| maxima[group * group_size / state.blocksize]).collect();
    let codes = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(values).collect();
    let levels = module.floats("weight.quant_map")?;
    let levels =
        levels.try_into().map_err(|_| module.error("weight.quant_map", "it has not 16 values"))?;
    let coding = Coding::Levels(levels);
    Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None })
}

/// The scale of each block.
fn maxima(module: &Module<'_>, state: &State, blocks: usize) -> Result<Vec<f32>> {
    let part = "weight.absmax";
    let Some((blocksize, offset)) = state.nested else {
        module.expect(part, &[blocks])?;
        return module.floats(part);
    };
    let codes = module.typed(part, &[DType::U8])?.data();
    let maxima = module.floats("weight.nested_absmax")?;
    let map = module.floats("weight.nested_quant_map")?;
    if codes.len() != blocks || maxima.len() != blocks.div_ceil(blocksize) || map.len() != 256 {
        let reason = format!(
            "{} quantized scales with {} scales of their own and {} levels; expected {blocks}, {} and 256",
            codes.len(),
            maxima.len(),
            map.len(),
            blocks.div_ceil(blocksize)
        );
        return Err(module.error(state.part, reason));
    }
    let scale = |(i, &code): (usize, &u8)| map[usize::from(code)] * maxima[i / blocksize] + offset;
    Ok(codes.iter().enumerate().map(scale).collect())
}

/// Whether a module can be written; a reason where not.
pub(super) fn accepts(spec: &ModuleSpec) -> Result<(), String> {
    if !matches!(spec.codes, Codes::Nf4 | Codes::Fp4) {
        return Err("it holds NF4 and FP4".to_owned());
    }
    match spec.group_size {
        Some(size) if size.is_power_of_two() && (32..=4096).contains(&size) => Ok(()),
        _ => Err("its blocks are powers of two from 32 to 4096".to_owned()),
    }
}

/// The longest number that the description of nested scales may hold. The description is filled up
/// with spaces to a length that is known before the scales are.
const LONGEST_NUMBER: usize = 26;

/// The tensors of a module. Where scales are `nested` they are quantized here.
pub(super) fn encode(
    spec: &ModuleSpec,
    matrix: Option<&GroupedMatrix>,
    nested: bool,
) -> Result<Vec<Tensor>, String> {
    let (part, kind) = match spec.codes {
        Codes::Fp4 => (STATES[1], "fp4"),
        _ => (STATES[0], "nf4"),
    };
    let values = spec.rows * spec.cols;
    let block = spec.group_size.unwrap_or(spec.cols);
    let blocks = values.div_ceil(block);
    let dtype = match spec.scale_dtype {
        DType::F16 => "float16",
        DType::F32 => "float32",
        _ => "bfloat16",
    };
    let mut state = format!(
        r#"{{"quant_type": "{kind}", "blocksize": {block}, "dtype": "{dtype}", "shape": [{}, {}]"#,
        spec.rows, spec.cols
    );
    if nested {
        state += r#", "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": "#;
    }
    let state_len = state.len() + 1 + if nested { LONGEST_NUMBER } else { 0 };
    let mut tensors = vec![
        Tensor::new("weight", DType::U8, [values.div_ceil(2), 1]),
        Tensor::new("weight.quant_map", DType::F32, [16]),
        Tensor::new(part, DType::U8, [state_len]),
    ];
    if nested {
        let outer = blocks.div_ceil(DoubleQuantized::BLOCK);
        tensors.push(Tensor::new("weight.absmax", DType::U8, [blocks]));
        tensors.push(Tensor::new("weight.nested_absmax", DType::F32, [outer]));
        tensors.push(Tensor::new("weight.nested_quant_map", DType::F32, [256]));
    } else {
        tensors.push(Tensor::new("weight.absmax", DType::F32, [blocks]));
    }
    let Some(matrix) = matrix else { return Ok(tensors) };
    let Coding::Levels(levels) = &matrix.coding else {
        return Err("codes are no levels".to_owned());
    };

    let pairs = matrix.codes.chunks(2);
    tensors[0].data = pairs.map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&0)).collect();
    tensors[1].data = floats(DType::F32, levels)?;
    let maxima = block_scales(matrix, block)?;
    if nested {
        let quantized = DoubleQuantized::new(&maxima);
        state += &serde_json::Value::from(f64::from(quantized.offset)).to_string();
        tensors[3].data = quantized.codes;
        tensors[4].data = floats(DType::F32, &quantized.maxima)?;
        tensors[5].data = floats(DType::F32, &dynamic_map())?;
    } else {
        tensors[3].data = floats(DType::F32, &maxima)?;
    }
    state += "}";
    tensors[2].data = format!("{state:state_len$}").into_bytes();
    Ok(tensors)
}

/// The scale of each block; the groups of a block must agree on it.
fn block_scales(matrix: &GroupedMatrix, block: usize) -> Result<Vec<f32>, String> {
    let groups = matrix.scales.iter().enumerate();
    let mut scales: Vec<f32> = Vec::new();
    for (group, &scale) in groups {
        let at = group * matrix.group_size / block;
        match scales.get(at) {
            None => scales.push(scale),
            Some(&first) if first == scale => {}
            Some(_) => return Err(format!("the columns of block {at} differ in their scales")),
        }
    }
    Ok(scales)
}

/// The configuration of modules that are all alike, but for those left plain.
pub(super) fn config(main: &ModuleSpec, plain: &[&str], nested: bool) -> Value {
    let dtype = match main.scale_dtype {
        DType::F16 => "float16",
        DType::F32 => "float32",
        _ => "bfloat16",
    };
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_quant_type": if main.codes == Codes::Fp4 { "fp4" } else { "nf4" },
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": if plain.is_empty() { Value::Null } else { json!(plain) },
        "llm_int8_threshold": 6.0,
    })
}
