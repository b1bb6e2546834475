//! What a recipe says about directories whose linear layers are codes in groups.

use std::fmt;
use std::str::FromStr;

use bevel_base::grouped::{float4, nf4};
use bevel_base::{DType, GroupedMatrix};
use bevel_formats::quantized::{Codes, GroupedFormat, ModuleSpec};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::solve::{self, GroupSpec, Range, ScaleType};
use crate::{Error, Result};

/// What the codes of a quantized directory are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeType {
    /// Integers of so many bits: `W2` to `W6` and `W8`.
    Integer(u32),
    /// The sixteen levels of QLoRA's NormalFloat (arXiv 2305.14314).
    Nf4,
    /// bitsandbytes' sixteen floating-point levels.
    Fp4,
    /// FP8 E4M3, a scale for each row.
    Fp8,
    /// FP4 E2M1, an FP8 scale for every 16 columns.
    Nvfp4,
    /// FP4 E2M1, a power of two for every 32 columns.
    Mxfp4,
}

impl CodeType {
    /// All of them.
    pub const ALL: [CodeType; 11] = [
        CodeType::Integer(2),
        CodeType::Integer(3),
        CodeType::Integer(4),
        CodeType::Integer(5),
        CodeType::Integer(6),
        CodeType::Integer(8),
        CodeType::Nf4,
        CodeType::Fp4,
        CodeType::Fp8,
        CodeType::Nvfp4,
        CodeType::Mxfp4,
    ];

    /// What users type.
    pub fn name(self) -> &'static str {
        match self {
            CodeType::Integer(2) => "W2",
            CodeType::Integer(3) => "W3",
            CodeType::Integer(4) => "W4",
            CodeType::Integer(5) => "W5",
            CodeType::Integer(6) => "W6",
            CodeType::Integer(_) => "W8",
            CodeType::Nf4 => "NF4",
            CodeType::Fp4 => "FP4",
            CodeType::Fp8 => "FP8",
            CodeType::Nvfp4 => "NVFP4",
            CodeType::Mxfp4 => "MXFP4-HF",
        }
    }

    /// The type of this name, if it is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.name().eq_ignore_ascii_case(name))
    }

    /// The format it is written in where none is asked for.
    fn usual_format(self) -> GroupedFormat {
        match self {
            CodeType::Integer(2 | 3 | 4 | 8) => GroupedFormat::Gptq { v2: false },
            CodeType::Nf4 | CodeType::Fp4 => GroupedFormat::BitsAndBytes { nested: true },
            _ => GroupedFormat::CompressedTensors,
        }
    }
}

impl fmt::Display for CodeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A [`GroupedFormat`] by its name, as recipes and flags have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatName(pub GroupedFormat);

impl FormatName {
    /// All of them.
    pub const ALL: [GroupedFormat; 7] = [
        GroupedFormat::Gptq { v2: false },
        GroupedFormat::Gptq { v2: true },
        GroupedFormat::Awq,
        GroupedFormat::CompressedTensors,
        GroupedFormat::BitsAndBytes { nested: true },
        GroupedFormat::BitsAndBytes { nested: false },
        GroupedFormat::Mlx,
    ];
}

impl fmt::Display for FormatName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            GroupedFormat::BitsAndBytes { nested: false } => f.pad("bitsandbytes-flat"),
            format => f.pad(format.name()),
        }
    }
}

impl FromStr for FormatName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let mut all = Self::ALL.into_iter().map(FormatName);
        all.find(|format| format.to_string().eq_ignore_ascii_case(name)).ok_or_else(|| {
            let known: Vec<String> = Self::ALL.map(|f| FormatName(f).to_string()).to_vec();
            Error::Recipe(format!("unknown format `{name}`; known are {}", known.join(", ")))
        })
    }
}

impl Serialize for FormatName {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FormatName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

/// How linear layers become codes in groups: a recipe's wishes, its gaps filled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grouping {
    pub(crate) format: GroupedFormat,
    pub(crate) code: CodeType,
    group_size: Option<usize>,
    symmetric: bool,
    /// Groups are of columns that follow each other in GPTQ's order.
    act_order: bool,
    /// The model's own type, in which some formats store scales.
    scale_dtype: DType,
}

impl Grouping {
    /// `group_size` of 0 means one scale for a row.
    pub(crate) fn new(
        code: CodeType,
        format: Option<FormatName>,
        group_size: Option<usize>,
        symmetric: Option<bool>,
        act_order: bool,
        model_dtype: DType,
    ) -> Self {
        let format = format.map_or(code.usual_format(), |f| f.0);
        let usual_size = match (code, format) {
            (CodeType::Fp8, _) => 0,
            (CodeType::Nvfp4, _) => float4::NVFP4_GROUP,
            (CodeType::Mxfp4, _) => float4::MXFP4_GROUP,
            (CodeType::Nf4 | CodeType::Fp4, _) | (_, GroupedFormat::Mlx) => 64,
            (CodeType::Integer(_), _) => 128,
        };
        let group_size = Some(group_size.unwrap_or(usual_size)).filter(|&size| size > 0);
        let symmetric = symmetric.unwrap_or(format != GroupedFormat::Awq);
        let scale_dtype = match model_dtype {
            DType::BF16 | DType::F16 => model_dtype,
            _ => DType::F16,
        };
        Self { format, code, group_size, symmetric, act_order, scale_dtype }
    }

    /// Refuses what would only turn out to have no place when everything is solved.
    pub(crate) fn check(&self) -> Result<()> {
        let is_integer = matches!(self.code, CodeType::Integer(_));
        if self.act_order && !(is_integer && matches!(self.format, GroupedFormat::Gptq { .. })) {
            return Err(Error::Recipe(format!(
                "the order `act-order` goes with integers in the formats `gptq` and `gptq_v2`, not with {} in `{}`; choose `static-groups`, which needs no order at run time",
                self.code,
                FormatName(self.format)
            )));
        }
        let is_first_version = self.format == GroupedFormat::Gptq { v2: false };
        if is_first_version && !self.symmetric && is_integer {
            return Err(Error::Recipe(
                "`gptq` has no zero points of 0, which groups of their own zero point need; choose the format `gptq_v2`, or zero points that are the same everywhere".to_owned(),
            ));
        }
        Ok(())
    }

    /// How a module is stored.
    pub(crate) fn spec(&self, rows: usize, cols: usize) -> ModuleSpec {
        let codes = match self.code {
            CodeType::Integer(bits) if self.format == GroupedFormat::Mlx => Codes::Affine { bits },
            CodeType::Integer(bits) => {
                Codes::Integer { bits, symmetric: self.symmetric, act_order: self.act_order }
            }
            CodeType::Nf4 => Codes::Nf4,
            CodeType::Fp4 => Codes::Fp4,
            CodeType::Fp8 => Codes::Float8,
            CodeType::Nvfp4 => Codes::Nvfp4,
            CodeType::Mxfp4 => Codes::Mxfp4,
        };
        let (group_size, scale_dtype) = (self.group_size, self.scale_dtype);
        ModuleSpec { rows, cols, group_size, codes, scale_dtype }
    }

    /// What a solver is to make of a module.
    pub(crate) fn target(&self) -> solve::Target {
        let codes = match self.code {
            CodeType::Integer(bits) if self.format == GroupedFormat::Mlx => {
                solve::Codes::Affine { bits }
            }
            CodeType::Integer(bits) => solve::Codes::Integer { bits, symmetric: self.symmetric },
            CodeType::Nf4 => solve::Codes::Levels(nf4::NF4_LEVELS),
            CodeType::Fp4 => solve::Codes::Levels(nf4::FP4_LEVELS),
            CodeType::Nvfp4 | CodeType::Mxfp4 => solve::Codes::Levels(float4::E2M1_LEVELS),
            CodeType::Fp8 => solve::Codes::Float8,
        };
        let scale = match (self.code, self.format, self.scale_dtype) {
            (CodeType::Nvfp4, ..) => ScaleType::E4m3,
            (CodeType::Mxfp4, ..) => ScaleType::PowerOfTwo,
            (_, GroupedFormat::BitsAndBytes { .. }, _) => ScaleType::F32,
            (_, GroupedFormat::Gptq { .. } | GroupedFormat::Awq, _) => ScaleType::F16,
            (.., DType::BF16) => ScaleType::Bf16,
            _ => ScaleType::F16,
        };
        let range = Range::Search;
        solve::Target::Grouped(GroupSpec { codes, group_size: self.group_size, scale, range })
    }

    /// Rounds a module to nearest as the format's own program does, where it has one: to the byte.
    /// `None` where it has none.
    ///
    /// # Errors
    /// Those of packing.
    pub(crate) fn round(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
    ) -> bevel_base::Result<Option<GroupedMatrix>> {
        use bevel_base::grouped::{float8, mlx};
        let (size, dtype) = (self.group_size.unwrap_or(cols), self.scale_dtype);
        Ok(Some(match (self.code, self.format) {
            (CodeType::Nf4, _) => nf4::quantize(values, rows, cols, nf4::Levels::Nf4, size)?,
            (CodeType::Fp4, _) => nf4::quantize(values, rows, cols, nf4::Levels::Fp4, size)?,
            (CodeType::Fp8, _) => float8::quantize(values, rows, cols, dtype)?,
            (CodeType::Nvfp4, _) => float4::quantize_nvfp4(values, rows, cols)?,
            (CodeType::Mxfp4, _) => float4::quantize_mxfp4(values, rows, cols)?,
            (CodeType::Integer(bits), GroupedFormat::Mlx) => {
                mlx::quantize(values, rows, cols, bits, size, dtype)?
            }
            (CodeType::Integer(_), _) => return Ok(None),
        }))
    }
}
