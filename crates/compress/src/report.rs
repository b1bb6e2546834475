use std::fmt;
use std::path::PathBuf;

use bevel_base::{DType, Shape};
use serde::{Serialize, Serializer};

use crate::grouping::CodeType;
use crate::provenance::hexadecimal;
use crate::solve::SolveReport;
use crate::{Allocation, Calibration, Provenance, Recipe, Times};

/// What a conversion or quantization did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The source.
    pub input: PathBuf,
    /// The file or directory that was asked for.
    pub output: PathBuf,
    /// The files with the weights.
    pub files: Vec<PathBuf>,
    /// What was asked for.
    pub recipe: Recipe,
    /// What the output carries about its origin.
    pub provenance: Provenance,
    /// What a budget was spent on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Allocation>,
    /// What the model was shown, where it was watched at work.
    pub calibration: Option<Shown>,
    /// Sums over the tensors.
    pub totals: Totals,
    /// Where the time went.
    pub times: Times,
    /// What went otherwise than asked for, as sentences.
    pub warnings: Vec<String>,
    /// Every tensor, in the output's order.
    pub tensors: Vec<TensorReport>,
}

/// What a model was shown.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// What it is, in words.
    pub description: String,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Hash of the tokens, in hexadecimal digits: [`Calibration::fingerprint`].
    pub sha256: String,
}

impl From<&Calibration> for Shown {
    fn from(data: &Calibration) -> Self {
        Self {
            description: data.description.clone(),
            sequences: data.sequences.len(),
            tokens: data.tokens(),
            sha256: hexadecimal(&data.fingerprint),
        }
    }
}

/// What happened to one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Its name in the output.
    pub name: String,
    /// Its dimensions, outermost first.
    #[serde(serialize_with = "dims")]
    pub shape: Shape,
    /// The type it had.
    #[serde(serialize_with = "type_name")]
    pub from: DType,
    /// What it is now.
    pub to: Storage,
    /// The type it should have had, where that does not fit its rows.
    #[serde(serialize_with = "optional_type_name", skip_serializing_if = "Option::is_none")]
    pub wanted: Option<DType>,
    /// Stored bytes before.
    pub bytes_before: u64,
    /// Stored bytes after.
    pub bytes_after: u64,
    /// √(Σ(w − ŵ)² / Σw²): how far the values moved, as a part of how large they are.
    pub relative_error: f64,
    /// Values too large for the new type, which became its largest.
    pub saturated: u64,
    /// How each of the tensor's matrices was solved, where it was with calibration data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub solved: Vec<SolveReport>,
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// As values or blocks of a type.
    Type(DType),
    /// As codes in groups.
    Codes(CodeType),
}

impl PartialEq<DType> for Storage {
    fn eq(&self, other: &DType) -> bool {
        *self == Storage::Type(*other)
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Storage::Type(dtype) => dtype.fmt(f),
            Storage::Codes(code) => code.fmt(f),
        }
    }
}

impl Serialize for Storage {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// Sums over a model's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Weights.
    pub parameters: u64,
    /// Stored bytes of all tensors before.
    pub bytes_before: u64,
    /// Stored bytes of all tensors after.
    pub bytes_after: u64,
    /// Stored bits a weight before, scales counted.
    pub bits_per_weight_before: f64,
    /// Stored bits a weight after.
    pub bits_per_weight_after: f64,
    /// Tensors whose rows the wanted type does not fit.
    pub fallbacks: usize,
    /// Packed tensors that were packed again in another type.
    pub requantized: usize,
    /// Values too large for their new type.
    pub saturated: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, parameters: u64, bytes_before: u64, bytes_after: u64) {
        self.parameters += parameters;
        self.bytes_before += bytes_before;
        self.bytes_after += bytes_after;
        let bits = |bytes: u64| bytes as f64 * 8.0 / self.parameters.max(1) as f64;
        self.bits_per_weight_before = bits(self.bytes_before);
        self.bits_per_weight_after = bits(self.bytes_after);
    }
}

impl Report {
    /// The mean error of the outputs of all matrices that were solved, as a part of the outputs, both
    /// squared; and the same for rounding to nearest, where it is known of all. `None` where nothing
    /// was solved.
    pub fn output_error(&self) -> Option<(f64, Option<f64>)> {
        let solved: Vec<&SolveReport> = self.tensors.iter().flat_map(|t| &t.solved).collect();
        let count = solved.len() as f64;
        let error: f64 = solved.iter().map(|s| s.error).sum();
        let rounding: Option<f64> = solved.iter().map(|s| s.rtn_error).sum();
        (!solved.is_empty()).then(|| (error / count, rounding.map(|sum| sum / count)))
    }

    /// What solvers did otherwise than asked for, as sentences.
    pub(crate) fn solver_warnings(&self) -> Vec<String> {
        let tensors_where = |holds: &dyn Fn(&SolveReport) -> bool| -> Vec<&TensorReport> {
            self.tensors.iter().filter(|t| t.solved.iter().any(holds)).collect()
        };
        let mut warnings = Vec::new();
        let mut warn = |tensors: Vec<&TensorReport>, what: &str| {
            if let Some(first) = tensors.first() {
                let count = tensors.len();
                warnings.push(format!("{count} tensors, the first is `{}`, {what}", first.name));
            }
        };
        warn(
            tensors_where(&|s| s.fell_back && s.tokens > 0),
            "were rounded to nearest, with importance: their type has no codes of single weights",
        );
        warn(
            tensors_where(&|s| s.fell_back && s.tokens == 0),
            "have experts that no calibration token came to, which were rounded to nearest; more calibration data helps",
        );
        warn(
            tensors_where(&|s| s.damping_retries > 0),
            "needed more damping than asked for; more calibration data helps",
        );
        warnings
    }

    /// The tensors that moved most, worst first.
    pub fn worst(&self, count: usize) -> Vec<&TensorReport> {
        let mut sorted: Vec<_> = self.tensors.iter().filter(|t| t.relative_error > 0.0).collect();
        sorted.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
        sorted.truncate(count);
        sorted
    }
}

pub(crate) fn type_name<S: Serializer>(dtype: &DType, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(dtype.name())
}

pub(crate) fn optional_type_name<S: Serializer>(
    dtype: &Option<DType>,
    s: S,
) -> Result<S::Ok, S::Error> {
    dtype.map(DType::name).serialize(s)
}

pub(crate) fn dims<S: Serializer>(shape: &Shape, s: S) -> Result<S::Ok, S::Error> {
    shape.dims().serialize(s)
}
