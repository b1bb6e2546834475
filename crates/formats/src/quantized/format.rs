//! Quantized checkpoints, written module by module.

use bevel_base::grouped::{Coding, float4, nf4, round_to};
use bevel_base::{DType, GroupedMatrix};
use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::compressed_tensors::write as compressed_tensors;
use super::encode::Tensor;
use super::{awq, bitsandbytes, gptq, mlx};
use crate::{Error, Result, TensorSpec};

/// A format that quantized checkpoints are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupedFormat {
    /// Integers of 2, 3, 4 or 8 bits; columns in any order. `v2` stores zero points as they are; what
    /// is read everywhere is the first version, which has none of 0.
    Gptq {
        /// Whether to write `gptq_v2`.
        v2: bool,
    },
    /// Integers of 4 bits.
    Awq,
    /// Integers of 1 to 8 bits, FP8, NVFP4 and MXFP4: what vLLM reads.
    CompressedTensors,
    /// NF4 and FP4.
    BitsAndBytes {
        /// Whether scales are quantized themselves: 4.13 bits a weight and not 4.5.
        nested: bool,
    },
    /// Integers of 2 to 6 and 8 bits with a scale and a minimum, and MXFP4: what mlx-lm reads.
    Mlx,
}

/// What is known of a module before it is quantized: all that types and shapes of its tensors, and
/// its entry in the configuration, depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Columns that share a scale, or weights in bitsandbytes; `None` where each row has one scale.
    pub group_size: Option<usize>,
    /// What the codes are.
    pub codes: Codes,
    /// The model's own type, in which compressed-tensors and MLX store scales: F16, BF16 or F32.
    pub scale_dtype: DType,
}

/// What codes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Integers with zero points: [`Coding::Integer`].
    Integer {
        /// Bits a code.
        bits: u32,
        /// Whether every zero point is half of the codes.
        symmetric: bool,
        /// Whether columns were quantized in another order, so that [`GroupedMatrix::group_of`] is
        /// needed.
        act_order: bool,
    },
    /// Integers with minima: [`Coding::Affine`].
    Affine {
        /// Bits a code.
        bits: u32,
    },
    /// [`nf4::NF4_LEVELS`]
    Nf4,
    /// [`nf4::FP4_LEVELS`]
    Fp4,
    /// [`float4::E2M1_LEVELS`] with scales of 8 bits.
    Nvfp4,
    /// [`float4::E2M1_LEVELS`] with scales that are powers of two.
    Mxfp4,
    /// [`Coding::Float8`]
    Float8,
}

impl Codes {
    /// Bits a code.
    pub fn bits(self) -> u32 {
        match self {
            Codes::Integer { bits, .. } | Codes::Affine { bits } => bits,
            Codes::Nf4 | Codes::Fp4 | Codes::Nvfp4 | Codes::Mxfp4 => 4,
            Codes::Float8 => 8,
        }
    }

    /// Whether a matrix's codes are these.
    fn fit(self, matrix: &GroupedMatrix) -> bool {
        match (self, &matrix.coding) {
            (Codes::Integer { bits, symmetric, act_order }, Coding::Integer { bits: b, zeros }) => {
                bits == *b
                    && (!symmetric || *zeros == bevel_base::grouped::Zeros::Symmetric)
                    && (act_order || matrix.group_of.is_none())
            }
            (Codes::Affine { bits }, Coding::Affine { bits: b, .. }) => bits == *b,
            (Codes::Nf4, Coding::Levels(levels)) => *levels == nf4::NF4_LEVELS,
            (Codes::Fp4, Coding::Levels(levels)) => *levels == nf4::FP4_LEVELS,
            (Codes::Nvfp4 | Codes::Mxfp4, Coding::Levels(levels)) => *levels == float4::E2M1_LEVELS,
            (Codes::Float8, Coding::Float8) => true,
            _ => false,
        }
    }
}

impl ModuleSpec {
    /// Scales of a row, where groups lie within rows.
    pub fn groups(&self) -> usize {
        self.group_size.map_or(1, |size| self.cols.div_ceil(size.max(1)))
    }

    /// A reason where the last group of a row is shorter than the others.
    pub(super) fn check_whole_groups(&self) -> Result<(), String> {
        match self.group_size {
            Some(size) if size == 0 || !self.cols.is_multiple_of(size) => {
                Err(format!("groups of {size} do not divide {} columns", self.cols))
            }
            _ => Ok(()),
        }
    }

    /// What two modules have in common that one entry of a configuration describes.
    fn kind(&self) -> (Codes, Option<usize>) {
        (self.codes, self.group_size)
    }
}

impl GroupedFormat {
    /// The format's name, as users write it.
    pub fn name(self) -> &'static str {
        match self {
            GroupedFormat::Gptq { v2: false } => "gptq",
            GroupedFormat::Gptq { v2: true } => "gptq_v2",
            GroupedFormat::Awq => "awq",
            GroupedFormat::CompressedTensors => "compressed-tensors",
            GroupedFormat::BitsAndBytes { .. } => "bitsandbytes",
            GroupedFormat::Mlx => "mlx",
        }
    }

    /// Whether the format can hold a module.
    ///
    /// # Errors
    /// [`Error::CannotHold`], with the reason; the module is better left plain.
    pub fn accepts(self, module: &str, spec: &ModuleSpec) -> Result<()> {
        if spec.rows == 0 || spec.cols == 0 || spec.rows.checked_mul(spec.cols).is_none() {
            return Err(self.cannot_hold(module, "it is empty or too large".to_owned()));
        }
        let accepted = match self {
            GroupedFormat::Gptq { .. } => gptq::accepts(spec),
            GroupedFormat::Awq => awq::accepts(spec),
            GroupedFormat::CompressedTensors => compressed_tensors::accepts(spec),
            GroupedFormat::BitsAndBytes { .. } => bitsandbytes::accepts(spec),
            GroupedFormat::Mlx => mlx::accepts(spec),
        };
        accepted.map_err(|reason| self.cannot_hold(module, reason))
    }

    /// What a user should know of a module that the format does hold: which readers fail at it.
    pub fn caveat(self, spec: &ModuleSpec) -> Option<&'static str> {
        let block = spec.group_size.unwrap_or(spec.cols).max(1);
        match (self, spec.codes) {
            (GroupedFormat::Gptq { v2: false }, Codes::Integer { symmetric: false, .. }) => Some(
                "GPTQModel loads zero points of the first version from its own files only; it loads `gptq_v2` from all",
            ),
            (GroupedFormat::BitsAndBytes { .. }, _) if !spec.cols.is_multiple_of(block) => Some(
                "bitsandbytes 0.50 computes wrong weights on the CPU where blocks run across the ends of rows",
            ),
            _ => None,
        }
    }

    /// The tensors that [`GroupedFormat::encode`] will make of a module.
    ///
    /// # Errors
    /// [`Error::CannotHold`].
    pub fn specs(self, module: &str, spec: &ModuleSpec) -> Result<Vec<TensorSpec>> {
        self.accepts(module, spec)?;
        let tensors =
            self.tensors(spec, None).map_err(|reason| self.cannot_hold(module, reason))?;
        let named = |t: Tensor| TensorSpec::new(format!("{module}.{}", t.part), t.dtype, t.shape);
        Ok(tensors.into_iter().map(named).collect())
    }

    /// The names and bytes of a module's tensors, in the order of [`GroupedFormat::specs`].
    ///
    /// # Errors
    /// [`Error::CannotHold`] where the matrix is not what `spec` says, or a scale or minimum is no
    /// number of the type it is stored in; [`GroupedFormat::fit`] rounds them.
    pub fn encode(
        self,
        module: &str,
        spec: &ModuleSpec,
        matrix: &GroupedMatrix,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        self.accepts(module, spec)?;
        let group_size = match self {
            GroupedFormat::BitsAndBytes { .. } => {
                nf4::common_divisor(spec.group_size.unwrap_or(spec.cols), spec.cols)
            }
            _ => spec.group_size.unwrap_or(spec.cols),
        };
        let dims = (matrix.rows, matrix.cols, matrix.group_size);
        if dims != (spec.rows, spec.cols, group_size) || !spec.codes.fit(matrix) {
            let reason = format!("the matrix is no {spec:?}");
            return Err(self.cannot_hold(module, reason));
        }
        let tensors = self.tensors(spec, Some(matrix));
        let tensors = tensors.map_err(|reason| self.cannot_hold(module, reason))?;
        Ok(tensors.into_iter().map(|t| (format!("{module}.{}", t.part), t.data)).collect())
    }

    fn tensors(
        self,
        spec: &ModuleSpec,
        matrix: Option<&GroupedMatrix>,
    ) -> Result<Vec<Tensor>, String> {
        match self {
            GroupedFormat::Gptq { v2: false } => gptq::encode(spec, matrix, gptq::Version::First),
            GroupedFormat::Gptq { v2: true } => gptq::encode(spec, matrix, gptq::Version::Second),
            GroupedFormat::Awq => awq::encode(spec, matrix),
            GroupedFormat::CompressedTensors => compressed_tensors::encode(spec, matrix),
            GroupedFormat::BitsAndBytes { nested } => bitsandbytes::encode(spec, matrix, nested),
            GroupedFormat::Mlx => mlx::encode(spec, matrix),
        }
    }

    /// Rounds scales and minima to what the format stores for a module of `spec`, and writes integers
    /// with zero points as those with minima where `spec` asks for it. Codes stay what they are:
    /// a solver that wants the best of them rounds its scales beforehand.
    ///
    /// # Errors
    /// [`Error::CannotHold`] where a scale is not finite, or negative where the type has no sign.
    pub fn fit(
        self,
        module: &str,
        spec: &ModuleSpec,
        mut matrix: GroupedMatrix,
    ) -> Result<GroupedMatrix> {
        let wrong = |error: bevel_base::Error| self.cannot_hold(module, error.to_string());
        let dtype = match self {
            GroupedFormat::Gptq { .. } | GroupedFormat::Awq => DType::F16,
            GroupedFormat::BitsAndBytes { .. } => DType::F32,
            GroupedFormat::CompressedTensors | GroupedFormat::Mlx => spec.scale_dtype,
        };
        match spec.codes {
            Codes::Nvfp4 => float4::round_nvfp4(&mut matrix.scales).map_err(wrong)?,
            Codes::Mxfp4 => {
                matrix.scales.iter_mut().for_each(|scale| *scale = float4::mxfp4_scale(*scale));
            }
            _ => round_to(dtype, &mut matrix.scales).map_err(wrong)?,
        }
        if let (Codes::Affine { .. }, Coding::Integer { bits, zeros }) =
            (spec.codes, &matrix.coding)
        {
            let minimum = |(at, scale): (usize, &f32)| -scale * f32::from(zeros.at(*bits, at));
            let minima = matrix.scales.iter().enumerate().map(minimum).collect();
            matrix.coding = Coding::Affine { bits: *bits, minima };
        }
        if let Coding::Affine { minima, .. } = &mut matrix.coding {
            round_to(dtype, minima).map_err(wrong)?;
        }
        Ok(matrix)
    }

    fn cannot_hold(self, module: &str, reason: String) -> Error {
        Error::CannotHold { module: module.to_owned(), format: self.name(), reason }
    }

    /// What the files carry under `__metadata__`.
    pub fn metadata(self) -> IndexMap<String, String> {
        let format = if self == GroupedFormat::Mlx { "mlx" } else { "pt" };
        [("format".to_owned(), format.to_owned())].into()
    }

    /// The entries that `config.json` needs, given all linear modules (for MLX the embedding too),
    /// each with its spec or `None` where it is left plain. For GPTQ, `quantize_config.json` holds
    /// the value of `quantization_config` once more.
    ///
    /// # Errors
    /// [`Error::CannotHold`] where the format has no words for modules that differ.
    pub fn config(self, modules: &[(String, Option<ModuleSpec>)]) -> Result<Map<String, Value>> {
        let mut kinds: Vec<(&ModuleSpec, Vec<&str>)> = Vec::new();
        let mut plain: Vec<&str> = Vec::new();
        for (name, spec) in modules {
            let Some(spec) = spec else {
                plain.push(name);
                continue;
            };
            match kinds.iter_mut().find(|(known, _)| known.kind() == spec.kind()) {
                Some((_, names)) => names.push(name),
                None => kinds.push((spec, vec![name])),
            }
        }
        kinds.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
        let Some(&(main, _)) = kinds.first() else {
            return Err(self.cannot_hold("*", "no module is quantized".to_owned()));
        };
        let mixed = |reason: &str| match kinds.get(1) {
            Some((_, names)) => Err(self.cannot_hold(names[0], reason.to_owned())),
            None => Ok(()),
        };
        let value = match self {
            GroupedFormat::Gptq { v2 } => gptq::config(main, &kinds, &plain, v2),
            GroupedFormat::Awq => {
                mixed("all modules have the same groups and zero points")?;
                awq::config(main, &plain)
            }
            GroupedFormat::CompressedTensors => compressed_tensors::config(&kinds, &plain),
            GroupedFormat::BitsAndBytes { nested } => {
                mixed("all modules have the same levels and blocks")?;
                bitsandbytes::config(main, &plain, nested)
            }
            GroupedFormat::Mlx => mlx::config(main, &kinds, &plain),
        };
        let mut entries = Map::new();
        if self == GroupedFormat::Mlx {
            entries.insert("quantization".to_owned(), value.clone());
        }
        entries.insert("quantization_config".to_owned(), value);
        Ok(entries)
    }
}

/// `-1` where each row has one scale, as most formats write it.
pub(super) fn group_size_or_minus_one(spec: &ModuleSpec) -> Value {
    spec.group_size.map_or(json!(-1), |size| json!(size))
}
