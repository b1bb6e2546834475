//! Mixed precision: the type of each tensor, so that the model fits a size and loses least.
//!
//! 1. What each tensor would cost in each type is measured: `sensitivity.rs`.
//! 2. The sum of the costs is minimized within the size: `knapsack.rs`. Divergences of small
//!    independent changes add up.
//! 3. The choice becomes a recipe that names a type for each tensor, and is carried out as any other.

mod budget;
mod choices;
mod knapsack;
mod sensitivity;

use std::path::Path;

use bevel_base::DType;
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use serde::{Deserialize, Serialize};

pub use budget::{Budget, Limit};
use choices::Choices;

use crate::calibrated::Solver;
use crate::calibration::Calibration;
use crate::progress::OnProgress;
use crate::recipe::written_type;
use crate::{Error, Override, Recipe, Result};

/// What a budget was spent on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Allocation {
    /// What was to be kept to.
    pub budget: Budget,
    /// The divergence of the whole model's predictions to expect, in nats a token: the sum of its
    /// tensors'.
    pub predicted_kl: f64,
    /// The tensors that there was a choice for.
    pub tensors: Vec<AllocatedTensor>,
}

/// The types that a tensor could have had.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AllocatedTensor {
    /// Its name.
    pub name: String,
    /// The type it gets.
    #[serde(rename = "type", with = "written_type")]
    pub dtype: DType,
    /// All of them, by size.
    pub options: Vec<TypeOption>,
}

/// A type that a tensor could have.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TypeOption {
    /// The type.
    #[serde(rename = "type", with = "written_type")]
    pub dtype: DType,
    /// Bytes of the tensor.
    pub bytes: u64,
    /// The divergence in nats a token where this tensor alone has it.
    pub kl: f64,
}

/// Measures what each tensor of a model costs in each type, and chooses the types that cost least
/// within the recipe's budget. Streams that do not fit in memory lie in `dir` meanwhile.
///
/// Gives the choice, and the recipe that carries it out: the same one without a budget, and with a
/// type for each tensor.
///
/// # Errors
/// [`Error::NoCalibration`], [`Error::Budget`] where the types cannot keep to it, and those of
/// reading and solving.
///
/// # Panics
/// Where the recipe has no budget.
pub fn allocate(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    calibration: Option<&Calibration>,
    dir: &Path,
    cpu: &Cpu,
    on_progress: &mut OnProgress<'_>,
) -> Result<(Allocation, Recipe)> {
    let data = calibration.filter(|data| !data.sequences.is_empty()).ok_or(Error::NoCalibration)?;
    let Choices { budget, rest, candidates, mut options, room } = Choices::of(checkpoint, recipe)?;
    let solver = Solver::measuring(recipe, cpu);
    let sequences = &data.sequences;
    let costs =
        sensitivity::measure(checkpoint, cpu, sequences, &candidates, &solver, dir, on_progress)?;
    for (name, options) in &mut options {
        let costs = costs.get(name).into_iter().flatten();
        options.iter_mut().zip(costs).for_each(|(option, &kl)| option.kl = kl);
    }
    let items: Vec<Vec<knapsack::Choice>> = options
        .values()
        .map(|o| o.iter().map(|o| knapsack::Choice { size: o.bytes, cost: o.kl }).collect())
        .collect();
    let picks = knapsack::choose(&items, room).expect("the smallest types fit");

    let mut allocation = Allocation { budget, predicted_kl: 0.0, tensors: Vec::new() };
    let mut concrete = rest;
    for ((name, mut options), pick) in options.into_iter().zip(picks) {
        let TypeOption { dtype, kl, .. } = options[pick];
        allocation.predicted_kl += kl;
        concrete.overrides.push(Override { pattern: name.clone(), dtype });
        options.sort_by_key(|option| option.bytes);
        allocation.tensors.push(AllocatedTensor { name, dtype, options });
    }
    Ok((allocation, concrete))
}

/// Refuses a budget that no choice of types keeps to.
pub(crate) fn check(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<()> {
    Choices::of(checkpoint, recipe).map(|_| ())
}
