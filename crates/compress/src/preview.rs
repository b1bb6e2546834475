use bevel_base::{DType, Shape};
use bevel_model::Checkpoint;
use serde::Serialize;

use crate::directory::Layout;
use crate::gguf::{main_dtype, rotated};
use crate::plan::Plan;
use crate::report::{dims, optional_type_name, type_name};
use crate::{Base, Recipe, Result, Storage, Totals};

/// What a recipe would make of a model. Nothing is read but headers.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    /// The tensors, in the order in which they are written.
    pub tensors: Vec<PreviewedTensor>,
    /// Sums over the tensors.
    pub totals: Totals,
    /// What goes otherwise than asked for, as sentences.
    pub warnings: Vec<String>,
}

/// What is to become of a tensor.
#[derive(Clone, Debug, Serialize)]
pub struct PreviewedTensor {
    /// Its name.
    pub name: String,
    /// Its dimensions, outermost first.
    #[serde(serialize_with = "dims")]
    pub shape: Shape,
    /// The type it is read in.
    #[serde(serialize_with = "type_name")]
    pub from: DType,
    /// What it is going to be.
    pub to: Storage,
    /// The type it should have, where that does not fit its rows.
    #[serde(serialize_with = "optional_type_name", skip_serializing_if = "Option::is_none")]
    pub wanted: Option<DType>,
    /// Stored bytes before.
    pub bytes_before: u64,
    /// Stored bytes after.
    pub bytes_after: u64,
}

impl Preview {
    /// Applies a recipe to a model. A budget is not spent: what its types cost is found by a run.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where a type's bytes overflow,
    /// [`Error::Recipe`](crate::Error::Recipe) for a format that holds none of the model's layers, and
    /// those of reading for an importance matrix that does not belong to the model.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        recipe.check()?;
        let rotated = rotated(checkpoint, recipe)?;
        let checkpoint = rotated.as_ref().unwrap_or(checkpoint);
        if let Base::Grouped(code) = recipe.base {
            let grouping = recipe.grouping(code, main_dtype(checkpoint));
            grouping.check()?;
            return Layout::of(checkpoint, recipe, &grouping)?.preview(checkpoint, &grouping);
        }
        let Plan { tensors, totals, warnings, .. } = Plan::new(checkpoint, recipe)?;
        let tensors = tensors.into_iter().map(|t| PreviewedTensor {
            name: t.name,
            shape: t.shape,
            from: t.stored,
            to: Storage::Type(t.to),
            wanted: t.wanted,
            bytes_before: t.bytes_before,
            bytes_after: t.bytes_after,
        });
        Ok(Self { tensors: tensors.collect(), totals, warnings })
    }
}
