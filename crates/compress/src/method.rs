use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::solve::{self, Awq, Gptq, Order, Rtn};
use crate::{Error, Needs, Result};

/// How a recipe has the codes of packed types chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Round to nearest: each block as well as it can alone.
    #[default]
    Rtn,
    /// Round to nearest, where errors count as much as the inputs they are multiplied with: what
    /// llama.cpp calls an importance matrix.
    Importance,
    /// AWQ (arXiv 2306.00978): input channels are scaled and ranges clipped for the least error of the
    /// outputs, then rounded to nearest.
    Awq,
    /// GPTQ (arXiv 2210.17323): every column's error is made up for in those that follow.
    Gptq,
    /// GPTAQ (arXiv 2504.02692): GPTQ that also makes up for the errors of the layers before.
    Gptaq,
}

impl Method {
    /// All of them.
    pub const ALL: [Method; 5] =
        [Method::Rtn, Method::Importance, Method::Awq, Method::Gptq, Method::Gptaq];

    /// What a recipe calls it.
    pub fn name(self) -> &'static str {
        match self {
            Method::Rtn => "rtn",
            Method::Importance => "importance",
            Method::Awq => "awq",
            Method::Gptq => "gptq",
            Method::Gptaq => "gptaq",
        }
    }

    /// True where the model has to be watched at work.
    pub fn is_calibrated(self) -> bool {
        self != Method::Rtn
    }

    /// True where an error counts as much as the inputs it is multiplied with.
    pub(crate) fn weighs_errors(self) -> bool {
        matches!(self, Method::Importance | Method::Gptq | Method::Gptaq)
    }

    /// The statistics it works with.
    pub(crate) fn needs(self) -> Needs {
        Needs {
            gram: matches!(self, Method::Awq | Method::Gptq | Method::Gptaq),
            cross: self == Method::Gptaq,
        }
    }

    /// The solver, with its settings from a recipe.
    pub(crate) fn solver(self, settings: &GptqSettings) -> solve::Method {
        match self {
            Method::Rtn => solve::Method::Rtn(Rtn { weighted: false }),
            Method::Awq => solve::Method::Awq(Awq::default()),
            Method::Importance => solve::Method::Rtn(Rtn { weighted: true }),
            Method::Gptq | Method::Gptaq => solve::Method::Gptq(Gptq {
                damping: settings.damping,
                order: settings.order,
                drift: if self == Method::Gptaq { settings.drift } else { 0.0 },
                refine: settings.refine,
            }),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Method::ALL.into_iter().find(|m| m.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let known: Vec<&str> = Method::ALL.iter().map(|m| m.name()).collect();
            Error::Recipe(format!("unknown method `{name}`; known are {}", known.join(", ")))
        })
    }
}

/// The settings of GPTQ and GPTAQ, as the table `[gptq]` of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqSettings {
    /// What is added to the Hessian's diagonal, as a part of its mean.
    pub damping: f32,
    /// The order of columns.
    pub order: Order,
    /// How much of the inputs' drift GPTAQ corrects.
    pub drift: f32,
    /// Sweeps of coordinate descent over the codes and scales that the columns' walk ended with;
    /// where nothing is said, as many as pay with the type's number of levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refine: Option<usize>,
}

/// Sweeps of refinement that are still sensible.
const MOST_SWEEPS: usize = 100;

impl GptqSettings {
    /// Refuses parts that are none.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, value) in [("damping", self.damping), ("drift", self.drift)] {
            if !(0.0..=1.0).contains(&value) {
                let reason = format!("[gptq] {name} = {value}: it is a part, from 0 to 1");
                return Err(Error::Recipe(reason));
            }
        }
        match self.refine {
            Some(sweeps) if sweeps > MOST_SWEEPS => Err(Error::Recipe(format!(
                "[gptq] refine = {sweeps}: after some sweeps nothing changes any more; {MOST_SWEEPS} are the most"
            ))),
            _ => Ok(()),
        }
    }
}

impl Default for GptqSettings {
    fn default() -> Self {
        let Gptq { damping, order, refine, .. } = Gptq::default();
        Self { damping, order, drift: 0.8, refine }
    }
}
