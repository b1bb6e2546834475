//! Checkpoints of mlx-lm. `docs/formats/mlx.md` shows the layout.

use std::collections::HashMap;

use bevel_base::grouped::{Coding, E2M1_LEVELS, e8m0};
use bevel_base::{DType, GroupedMatrix, pack};

use super::bitstream;
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
