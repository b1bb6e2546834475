use std::fmt;
use std::str::FromStr;

use bevel_base::DType;
use bevel_formats::quantized::GroupedFormat;
use bevel_kernels::Cpu;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::allocate::Budget;
use crate::calibration::{CalibrationConfig, Source};
use crate::grouping::{CodeType, FormatName, Grouping};
use crate::solve::{Order, RowRounding, Target};
use crate::{Error, GptqSettings, ImatrixFile, MIXES, Method, Mix, Result};
use bevel_base::matches;

/// What type every tensor of a model is to have. A TOML file, or flags that are short for one:
///
/// ```
/// let recipe: bevel_compress::Recipe = r#"
///     type = "Q4_K_M"
///     output_type = "Q8_0"
///     keep = ["blk.0.*"]
///
///     [[tensor]]
///     pattern = "blk.*.ffn_down.weight"
///     type = "Q6_K"
/// "#
/// .parse()?;
/// assert_eq!(recipe.to_string().parse::<bevel_compress::Recipe>()?, recipe);
/// # Ok::<(), bevel_compress::Error>(())
/// ```
///
/// Norms, biases, routers and other vectors are not concerned: they keep their type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The type or mix of what nothing below is about.
    #[serde(rename = "type")]
    pub base: Base,
    /// Every tensor gets the base type itself, the output head too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pure: bool,
    /// The output head's type, or the embedding's where it is the head.
    #[serde(default, with = "optional_type", skip_serializing_if = "Option::is_none")]
    pub output_type: Option<DType>,
    /// The embedding's type.
    #[serde(default, with = "optional_type", skip_serializing_if = "Option::is_none")]
    pub embedding_type: Option<DType>,
    /// Patterns of tensors that keep the type they have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<String>,
    /// The format of a directory of codes, where it is not the usual one of their type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<FormatName>,
    /// Columns that share a scale, where codes are in groups; 0 for whole rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,
    /// Integer codes have the same zero point everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<bool>,
    /// The residual stream is rotated first, by the random orthogonal matrix of this seed (QuaRot).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate: Option<u64>,
    /// Input channels are scaled first, for the least error of the outputs, as [`Method::Awq`] does
    /// in any case.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fold: bool,
    /// Types are chosen so that the model fits a size and loses least: what nothing above names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// How codes are chosen.
    #[serde(default, skip_serializing_if = "is_default")]
    pub method: Method,
    /// The settings of GPTQ and GPTAQ.
    #[serde(default, skip_serializing_if = "is_default")]
    pub gptq: GptqSettings,
    /// What the model is shown where the method asks for it.
    #[serde(default, with = "written_calibration", skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationConfig>,
    /// The importance matrix that [`Method::Importance`] goes by in place of calibration data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imatrix: Option<ImatrixFile>,
    /// Types of single tensors. The first pattern that matches counts, and goes before all of the
    /// above but `keep`.
    #[serde(default, rename = "tensor", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
}

/// The type of the tensors whose name matches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// `*` stands for any characters, `?` for one, `[0-3]` for one of those.
    pub pattern: String,
    /// The type.
    #[serde(rename = "type", with = "written_type")]
    pub dtype: DType,
}

/// A recipe's base.
#[derive(Clone, Copy, Debug)]
pub enum Base {
    /// Types stay as they are.
    Keep,
    /// A type or mix of GGUF files.
    Mix(&'static Mix),
    /// Codes in groups, in a Hugging Face directory.
    Grouped(CodeType),
}

impl Recipe {
    /// A recipe of a base alone.
    pub fn new(base: Base) -> Self {
        Self {
            base,
            pure: false,
            output_type: None,
            embedding_type: None,
            keep: Vec::new(),
            format: None,
            group_size: None,
            symmetric: None,
            rotate: None,
            fold: false,
            budget: None,
            method: Method::default(),
            gptq: GptqSettings::default(),
            calibration: None,
            imatrix: None,
            overrides: Vec::new(),
        }
    }

    /// True where the model has to be watched at work.
    pub fn is_calibrated(&self) -> bool {
        self.method.is_calibrated() && self.imatrix.is_none() || self.fold
    }

    /// Refuses what contradicts itself, or is no sensible setting.
    ///
    /// # Errors
    /// [`Error::Recipe`], [`Error::NotWritable`].
    pub fn check(&self) -> Result<()> {
        let types = self.overrides.iter().map(|o| o.dtype).chain(self.output_type);
        let types = types.chain(self.embedding_type);
        let of_budget = self.budget.iter().flat_map(|b| b.types.iter().copied());
        types.chain(of_budget).try_for_each(writable)?;
        self.budget.iter().try_for_each(|b| b.check().map_err(|e| Error::Recipe(e.to_owned())))?;
        self.check_imatrix()?;
        self.check_order()?;
        self.check_idle()?;
        self.gptq.check()
    }

    /// Refuses what would be asked for in vain.
    fn check_idle(&self) -> Result<()> {
        let is_grouped = matches!(self.base, Base::Grouped(_));
        let idle = [
            ("format", self.format.is_some() && !is_grouped),
            ("group_size", self.group_size.is_some() && !is_grouped),
            ("symmetric", self.symmetric.is_some() && !is_grouped),
            ("pure", self.pure && is_grouped),
        ];
        match idle.into_iter().find(|(_, idle)| *idle) {
            Some((what, _)) if is_grouped => Err(Error::Recipe(format!(
                "`{what}` is for the mixes of GGUF files; `{}` has none",
                self.base
            ))),
            Some((what, _)) => Err(Error::Recipe(format!(
                "`{what}` is for codes in a directory, such as W4; `{}` is a type of GGUF files, whose groups are fixed",
                self.base
            ))),
            None => Ok(()),
        }
    }

    /// Refuses what an importance matrix cannot be joined with.
    fn check_imatrix(&self) -> Result<()> {
        let Some(imatrix) = &self.imatrix else { return Ok(()) };
        let reason = if self.method != Method::Importance {
            format!(
                "goes with the method `importance`, not with `{}`, which needs calibration data",
                self.method
            )
        } else if self.calibration.is_some() {
            "and calibration data exclude each other; leave one of them out".to_owned()
        } else if self.budget.is_some() {
            "does not tell what types cost, which a budget asks for; use calibration data"
                .to_owned()
        } else if self.fold || self.rotate.is_some() {
            "holds the inputs of the model as it is, not of one that is scaled or rotated first; use calibration data".to_owned()
        } else if let Base::Grouped(code) = self.base {
            format!("is for the types of GGUF files; for {code} use calibration data")
        } else {
            return Ok(());
        };
        let file = imatrix.file.display();
        Err(Error::Recipe(format!("the importance matrix `{file}` {reason}")))
    }

    /// Refuses an order of columns that the codes would have to carry along, where they cannot.
    fn check_order(&self) -> Result<()> {
        let regroups = self.gptq.order == Order::ActOrder;
        match self.base {
            Base::Keep | Base::Mix(_) if regroups => Err(Error::Recipe(
                "the order `act-order` needs a directory of integer codes, for example type = \"W4\" and format = \"gptq\"; GGUF files have no place for it".to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// True where the columns of matrices are scaled before anything else, as AWQ does it.
    pub(crate) fn scales(&self) -> bool {
        self.fold || self.method == Method::Awq
    }

    /// True where calibration data is asked for.
    pub fn wants_calibration(&self) -> bool {
        self.is_calibrated() || self.budget.is_some()
    }

    /// True where the type of a tensor follows from something else than the base.
    pub(crate) fn decides(&self, name: &str, tied: bool) -> bool {
        self.keeps(name) || self.type_of(name, tied).is_some()
    }

    /// How linear layers become codes in groups, in a model of `model_dtype`.
    pub(crate) fn grouping(&self, code: CodeType, model_dtype: DType) -> Grouping {
        let act_order = self.gptq.order == Order::ActOrder
            && matches!(self.method, Method::Gptq | Method::Gptaq);
        Grouping::new(code, self.format, self.group_size, self.symmetric, act_order, model_dtype)
    }

    /// The type asked for a tensor by its name or its place; `tied` is whether the embedding is the
    /// head too.
    pub(crate) fn type_of(&self, name: &str, tied: bool) -> Option<DType> {
        let named = self.overrides.iter().find(|o| matches(&o.pattern, name));
        let is_embedding = name == "token_embd.weight";
        let is_head = name == "output.weight" || tied && is_embedding;
        let placed = || self.embedding_type.filter(|_| is_embedding);
        let head = || self.output_type.filter(|_| is_head);
        named.map(|o| o.dtype).or_else(placed).or_else(head)
    }

    /// How rows of so many columns of a linear layer are rounded to the recipe's codes in groups; `None` where codes are no
    /// integers in a format of GPTQ, whose rows do not depend on anything else.
    ///
    /// # Errors
    /// Where groups do not divide the rows.
    pub fn row_rounding(&self, cpu: &Cpu, cols: usize) -> Result<Option<RowRounding>> {
        let Base::Grouped(code @ CodeType::Integer(_)) = self.base else { return Ok(None) };
        let grouping = self.grouping(code, DType::F16);
        let Target::Grouped(spec) = grouping.target() else { return Ok(None) };
        if !matches!(grouping.format, GroupedFormat::Gptq { .. }) {
            return Ok(None);
        }
        let wrap = |source| Error::Solve { tensor: code.to_string(), source };
        RowRounding::new(cpu, &spec, cols).map(Some).map_err(wrap)
    }

    /// A packed type that is asked for somewhere.
    pub(crate) fn packed_type(&self) -> Option<DType> {
        let base = match self.base {
            Base::Keep | Base::Grouped(_) => None,
            Base::Mix(mix) => Some(mix.base),
        };
        let named = self.overrides.iter().map(|o| o.dtype);
        let mut asked = named.chain(base).chain(self.output_type).chain(self.embedding_type);
        asked.find(|dtype| dtype.is_packed())
    }

    /// True where a tensor keeps its type.
    pub(crate) fn keeps(&self, name: &str) -> bool {
        self.keep.iter().any(|pattern| matches(pattern, name))
    }

    /// Every pattern in the recipe.
    pub(crate) fn patterns(&self) -> impl Iterator<Item = &str> {
        self.keep.iter().chain(self.overrides.iter().map(|o| &o.pattern)).map(String::as_str)
    }
}

impl FromStr for Recipe {
    type Err = Error;

    /// Reads TOML.
    fn from_str(text: &str) -> Result<Self> {
        let recipe: Self =
            toml::from_str(text).map_err(|error| Error::Recipe(error.to_string()))?;
        recipe.check()?;
        Ok(recipe)
    }
}

impl fmt::Display for Recipe {
    /// Writes TOML.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&toml::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Override {
    type Err = Error;

    /// Reads `PATTERN=TYPE`.
    fn from_str(text: &str) -> Result<Self> {
        let (pattern, name) = text
            .rsplit_once('=')
            .filter(|(pattern, _)| !pattern.is_empty())
            .ok_or_else(|| Error::Recipe(format!("`{text}` is not of the form PATTERN=TYPE")))?;
        Ok(Self { pattern: pattern.to_owned(), dtype: tensor_type(name)? })
    }
}

impl Base {
    /// What a recipe calls it.
    pub fn name(self) -> &'static str {
        match self {
            Base::Keep => KEEP,
            Base::Mix(mix) => mix.name,
            Base::Grouped(code) => code.name(),
        }
    }
}

const KEEP: &str = "keep";

impl FromStr for Base {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name.eq_ignore_ascii_case(KEEP) {
            return Ok(Base::Keep);
        }
        if let Some(code) = CodeType::named(name) {
            return Ok(Base::Grouped(code));
        }
        match Mix::named(name) {
            Some(mix) => Ok(Base::Mix(mix)),
            // A type that is no mix is one that cannot be written; say why.
            None => match name.parse() {
                Ok(dtype) => writable(dtype).and_then(|()| Err(unknown(name))),
                Err(_) => Err(unknown(name)),
            },
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl PartialEq for Base {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Serialize for Base {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Base {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A tensor's type by its name, where files can have it: what a flag or a recipe says of one tensor.
///
/// # Errors
/// [`Error::UnknownType`], [`Error::NotWritable`].
pub fn tensor_type(name: &str) -> Result<DType> {
    let dtype = name.parse().map_err(|_| unknown_for_tensor(name))?;
    writable(dtype).map(|()| dtype)
}

/// Refuses types that no file has.
fn writable(dtype: DType) -> Result<()> {
    use DType::*;
    let reason = match dtype {
        F64 | F8_E4M3 | F8_E5M2 => "GGUF readers do not run it; use F32, F16 or BF16",
        _ if !dtype.is_weight() => "weights are floating point or packed",
        _ => return Ok(()),
    };
    Err(Error::NotWritable { dtype, reason: reason.to_owned() })
}

/// Not a type that one tensor can have.
fn unknown_for_tensor(name: &str) -> Error {
    let known = DType::all().filter(|&dtype| writable(dtype).is_ok());
    let known: Vec<&str> = known.map(DType::name).collect();
    let what = match (CodeType::named(name), Mix::named(name)) {
        (Some(_), _) => {
            "those are codes in groups, which all linear layers of a directory become; "
        }
        (None, Some(_)) => "that is a mix of types, for a whole model; ",
        (None, None) => "",
    };
    let meant = closest(name, &known).filter(|_| what.is_empty());
    let meant = meant.map(|close| format!("did you mean `{close}`? ")).unwrap_or_default();
    let known = format!("{what}{meant}a tensor's are {}", known.join(", "));
    Error::UnknownType { name: name.to_owned(), known }
}

fn unknown(name: &str) -> Error {
    let mut known: Vec<&str> = MIXES.iter().map(|mix| mix.name).collect();
    known.extend(["Q5_K", "Q4_K", "Q3_K"]);
    known.extend(CodeType::ALL.map(CodeType::name));
    let meant = closest(name, &known).map(|close| format!("did you mean `{close}`? "));
    let known = format!("{}known are {}", meant.unwrap_or_default(), known.join(", "));
    Error::UnknownType { name: name.to_owned(), known }
}

/// The known name that a slip of the finger or two leads from, `_` and case not counted.
fn closest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let letters = |name: &str| name.replace(['_', '-', ' '], "").to_uppercase();
    let distance = |known: &&str| strsim::osa_distance(&letters(name), &letters(known));
    let close = known.iter().copied().min_by_key(distance)?;
    // Half of a short name would be another name.
    (distance(&close) <= 2 && distance(&close) < letters(close).len() / 2).then_some(close)
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

mod written_calibration {
    use super::*;

    /// One source or several files.
    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Sources {
        One(String),
        Files(Vec<String>),
    }

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Written {
        source: Sources,
        samples: usize,
        tokens: usize,
        seed: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        field: Option<String>,
    }

    impl Default for Written {
        fn default() -> Self {
            CalibrationConfig::default().into()
        }
    }

    impl From<CalibrationConfig> for Written {
        fn from(config: CalibrationConfig) -> Self {
            let CalibrationConfig { source, samples, tokens, seed, field } = config;
            let source = match source {
                Source::Files(files) if files.len() > 1 => {
                    Sources::Files(files.iter().map(|f| f.display().to_string()).collect())
                }
                source => Sources::One(source.to_string()),
            };
            Self { source, samples, tokens, seed, field }
        }
    }

    pub(super) fn serialize<S: Serializer>(
        config: &Option<CalibrationConfig>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        config.clone().map(Written::from).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<CalibrationConfig>, D::Error> {
        let Written { source, samples, tokens, seed, field } = Written::deserialize(d)?;
        let source = match source {
            Sources::One(source) => source.parse().map_err(de::Error::custom)?,
            Sources::Files(files) => Source::Files(files.into_iter().map(Into::into).collect()),
        };
        Ok(Some(CalibrationConfig { source, samples, tokens, seed, field }))
    }
}

/// A type by its name.
#[derive(Serialize, Deserialize)]
pub(crate) struct WrittenType(#[serde(with = "written_type")] pub(crate) DType);

pub(crate) mod written_type {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(dtype: &DType, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(dtype.name())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<DType, D::Error> {
        tensor_type(&String::deserialize(d)?).map_err(de::Error::custom)
    }
}

mod optional_type {
    use super::*;

    pub(super) fn serialize<S: Serializer>(dtype: &Option<DType>, s: S) -> Result<S::Ok, S::Error> {
        dtype.map(DType::name).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<DType>, D::Error> {
        written_type::deserialize(d).map(Some)
    }
}
