use bevel_base::DType;
use bevel_model::Checkpoint;
use serde::{Deserialize, Serialize};

use crate::gguf::overhead;
use crate::plan::Plan;
use crate::recipe::WrittenType;
use crate::{Error, Recipe, Result};

/// How large a model may become, and of which types: the table `[budget]` of a recipe, with
/// `bits_per_weight` or `bytes`, and optionally `types`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Budget {
    /// The size.
    pub limit: Limit,
    /// The types to choose from; with none the usual ones.
    pub types: Vec<DType>,
}

/// A size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Stored bits of all tensors, scales counted, for each weight.
    BitsPerWeight(f64),
    /// Bytes of the file.
    Bytes(u64),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bits_per_weight: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    types: Vec<WrittenType>,
}

impl TryFrom<Written> for Budget {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, &'static str> {
        let limit = match (written.bits_per_weight, written.bytes) {
            (Some(bits), None) => Limit::BitsPerWeight(bits),
            (None, Some(bytes)) => Limit::Bytes(bytes),
            _ => return Err("a budget has either `bits_per_weight` or `bytes`"),
        };
        let budget = Self { limit, types: written.types.into_iter().map(|t| t.0).collect() };
        budget.check().map(|()| budget)
    }
}

impl From<Budget> for Written {
    fn from(budget: Budget) -> Self {
        let (bits_per_weight, bytes) = match budget.limit {
            Limit::BitsPerWeight(bits) => (Some(bits), None),
            Limit::Bytes(bytes) => (None, Some(bytes)),
        };
        let types = budget.types.into_iter().map(WrittenType).collect();
        Self { bits_per_weight, bytes, types }
    }
}

impl Budget {
    /// Refuses sizes that are none.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        match self.limit {
            Limit::BitsPerWeight(bits) if bits > 0.0 && bits <= 32.0 => Ok(()),
            Limit::BitsPerWeight(_) => Err("bits per weight lie between 0 and 32"),
            Limit::Bytes(_) => Ok(()),
        }
    }

    /// Bytes that all tensors together may take. `recipe` is what is going to be carried out, but
    /// for types.
    pub(super) fn tensor_bytes(
        &self,
        checkpoint: &Checkpoint,
        plan: &Plan,
        recipe: &Recipe,
    ) -> Result<u64> {
        match self.limit {
            Limit::BitsPerWeight(bits) => Ok((plan.totals.parameters as f64 * bits / 8.0) as u64),
            Limit::Bytes(bytes) => {
                let overhead = overhead(checkpoint, plan, recipe)?;
                bytes.checked_sub(overhead).ok_or_else(|| Error::Budget {
                    budget: self.to_string(),
                    reason: format!("tokenizer and metadata alone take {overhead} bytes"),
                })
            }
        }
    }

    /// The budget leaves fewer bits a weight than the smallest types take.
    pub(super) fn too_small(&self, left: f64, least: f64) -> Error {
        Error::Budget {
            budget: self.to_string(),
            reason: format!(
                "it leaves {left:.3} bits per weight, and the smallest types take {least:.3}; raise it, or choose from smaller types, such as IQ2_XXS"
            ),
        }
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.limit {
            Limit::BitsPerWeight(bits) => write!(f, "{bits} bits per weight"),
            Limit::Bytes(bytes) => write!(f, "{bytes} bytes"),
        }
    }
}
