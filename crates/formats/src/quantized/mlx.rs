//! Checkpoints for mlx-lm. `docs/formats/mlx.md` shows the layout.

use std::collections::HashMap;

use bevel_base::grouped::Coding;
use bevel_base::grouped::float4::{E2M1_LEVELS, e8m0, to_e8m0};
use bevel_base::{DType, GroupedMatrix, pack};
use serde_json::{Value, json};

use super::bitstream;
use super::encode::{Tensor, floats, integers};
use super::format::{Codes, ModuleSpec};
use super::module::Module;
use super::settings::Settings;
use crate::Result;

pub(super) const PARTS: &[&str] = &["weight", "scales", "biases"];

#[derive(Clone, Debug)]
pub(super) struct Mlx {
    default: Parameters,
    /// Of modules that differ.
    of_module: HashMap<String, Parameters>,
}

#[derive(Clone, Copy, Debug)]
struct Parameters {
    mode: Mode,
    bits: u32,
    group_size: usize,
}

/// What codes and scales are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// Integers; scales and minima in the weights' own type.
    Affine,
    /// E2M1 codes, scales that are powers of two (E8M0).
    Mxfp4,
    /// E2M1 codes, E4M3 scales.
    Nvfp4,
    /// E4M3 codes, scales that are powers of two (E8M0).
    Mxfp8,
}

impl Parameters {
    fn from_settings(settings: &Settings<'_>, default: Option<Mode>) -> Result<Self, String> {
        let mode = match settings.text("mode")? {
            None => default.unwrap_or(Mode::Affine),
            Some("affine") => Mode::Affine,
            Some("mxfp4") => Mode::Mxfp4,
            Some("nvfp4") => Mode::Nvfp4,
            Some("mxfp8") => Mode::Mxfp8,
            Some(other) => {
                let reason =
                    format!("is `{other}`; bevel reads `affine`, `mxfp4`, `nvfp4` and `mxfp8`");
                return Err(settings.wrong("mode", &reason));
            }
        };
        let allowed: &[u32] = match mode {
            Mode::Affine => &[2, 3, 4, 5, 6, 8],
            Mode::Mxfp4 | Mode::Nvfp4 => &[4],
            Mode::Mxfp8 => &[8],
        };
        let group_size = settings.group_size("group_size")?;
        let group_size =
            group_size.ok_or_else(|| settings.wrong("group_size", "is missing or -1"))?;
        Ok(Self { mode, bits: settings.bits("bits", allowed)?, group_size })
    }
}

impl Mlx {
    pub(super) fn from_settings(settings: &Settings<'_>) -> Result<Self, String> {
        let default = Parameters::from_settings(settings, None)?;
        let mut of_module = HashMap::new();
        for (module, value) in settings.entries().filter(|(_, value)| value.is_object()) {
            let own = Settings::new(format!("quantization.{module}"), value)?;
            let parameters = Parameters::from_settings(&own, Some(default.mode))?;
            of_module.insert(module.to_owned(), parameters);
        }
        Ok(Self { default, of_module })
    }

    pub(super) fn name(&self) -> String {
        let Parameters { mode, bits, group_size } = self.default;
        match mode {
            Mode::Affine => format!("MLX, {bits} bits, groups of {group_size}"),
            Mode::Mxfp4 => format!("MLX MXFP4, groups of {group_size}"),
            Mode::Nvfp4 => format!("MLX NVFP4, groups of {group_size}"),
            Mode::Mxfp8 => format!("MLX MXFP8, groups of {group_size}"),
        }
    }

    fn parameters(&self, module: &Module<'_>) -> Parameters {
        self.of_module.get(module.name()).copied().unwrap_or(self.default)
    }

    pub(super) fn shape(&self, module: &Module<'_>) -> Result<Option<[usize; 2]>> {
        if !module.has("scales") || !module.has("weight") {
            return Ok(None);
        }
        let Parameters { bits, group_size, .. } = self.parameters(module);
        let [rows, words] = module.matrix("weight")?;
        let [_, groups] = module.matrix("scales")?;
        module.expect("scales", &[rows, groups])?;
        let cols = groups.checked_mul(group_size);
        match cols.filter(|&cols| bitstream::words(cols, bits) == Some(words)) {
            Some(cols) => Ok(Some([rows, cols])),
            None => {
                let reason = format!(
                    "{words} words a row with {groups} scales; `config.json` has {bits} bits and groups of {group_size} for it"
                );
                Err(module.error("weight", reason))
            }
        }
    }

    pub(super) fn read(&self, module: &Module<'_>) -> Result<GroupedMatrix> {
        let [rows, cols] = self
            .shape(module)?
            .ok_or_else(|| module.error("scales", "it is missing; the module is not quantized"))?;
        let Parameters { mode, bits, group_size } = self.parameters(module);
        let words = module.words("weight")?;
        let mut codes = vec![0; rows * cols];
        for (row, codes) in codes.chunks_exact_mut(cols).enumerate() {
            bitstream::unpack(words.row(row), bits, codes);
        }
        let bytes = |to_f32: fn(u8) -> f32| -> Result<Vec<f32>> {
            let view = module.typed("scales", &[DType::U8])?;
            Ok(view.data().iter().map(|&byte| to_f32(byte)).collect())
        };
        let (coding, scales) = match mode {
            Mode::Affine => {
                module.expect("biases", &[rows, cols / group_size])?;
                let minima = module.floats("biases")?;
                (Coding::Affine { bits, minima }, module.floats("scales")?)
            }
            Mode::Mxfp4 => (Coding::Levels(E2M1_LEVELS), bytes(e8m0)?),
            Mode::Nvfp4 => (Coding::Levels(E2M1_LEVELS), bytes(pack::e4m3)?),
            Mode::Mxfp8 => (Coding::Float8, bytes(e8m0)?),
        };
        Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None })
    }
}

/// Whether a module can be written; a reason where not.
pub(super) fn accepts(spec: &ModuleSpec) -> Result<(), String> {
    match spec.codes {
        Codes::Affine { bits: 2..=6 | 8 } => {
            if !matches!(spec.group_size, Some(32 | 64 | 128)) {
                return Err("it has groups of 32, 64 or 128".to_owned());
            }
        }
        Codes::Affine { bits } => return Err(format!("it has no codes of {bits} bits")),
        Codes::Mxfp4 => {}
        _ => return Err("it holds integers with a scale and a minimum, and MXFP4".to_owned()),
    }
    spec.check_whole_groups()
}

/// The tensors of a module.
pub(super) fn encode(
    spec: &ModuleSpec,
    matrix: Option<&GroupedMatrix>,
) -> Result<Vec<Tensor>, String> {
    let (rows, cols, groups) = (spec.rows, spec.cols, spec.groups());
    let bits = spec.codes.bits();
    let words = bitstream::words(cols, bits).unwrap_or(0);
    let mut tensors = vec![Tensor::new("weight", DType::U32, [rows, words])];
    if let Codes::Affine { .. } = spec.codes {
        tensors.push(Tensor::new("scales", spec.scale_dtype, [rows, groups]));
        tensors.push(Tensor::new("biases", spec.scale_dtype, [rows, groups]));
    } else {
        tensors.push(Tensor::new("scales", DType::U8, [rows, groups]));
    }
    let Some(matrix) = matrix else { return Ok(tensors) };
    let mut packed = Vec::with_capacity(rows * words);
    for codes in matrix.codes.chunks_exact(cols) {
        bitstream::pack(codes.iter().copied(), bits, |word| packed.push(word));
    }
    tensors[0].data = integers(&packed);
    match &matrix.coding {
        Coding::Affine { minima, .. } => {
            tensors[1].data = floats(spec.scale_dtype, &matrix.scales)?;
            tensors[2].data = floats(spec.scale_dtype, minima)?;
        }
        _ => {
            let codes: Option<Vec<u8>> = matrix.scales.iter().map(|&s| to_e8m0(s)).collect();
            tensors[1].data = codes.ok_or("scales are no powers of two")?;
        }
    }
    Ok(tensors)
}

/// The configuration: the most frequent kind of module, those that differ, and those left plain.
pub(super) fn config(
    main: &ModuleSpec,
    kinds: &[(&ModuleSpec, Vec<&str>)],
    plain: &[&str],
) -> Value {
    let parameters = |spec: &ModuleSpec| {
        let mode = if spec.codes == Codes::Mxfp4 { "mxfp4" } else { "affine" };
        json!({"group_size": spec.group_size, "bits": spec.codes.bits(), "mode": mode})
    };
    let mut config = parameters(main);
    for (spec, names) in kinds.iter().skip(1) {
        names.iter().for_each(|name| config[*name] = parameters(spec));
    }
    plain.iter().for_each(|name| config[*name] = false.into());
    config
}
