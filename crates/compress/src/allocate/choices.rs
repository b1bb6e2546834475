//! The tensors that a budget is spent on, and the types that each may have.

use bevel_base::DType;
use bevel_model::{Checkpoint, Place, Stage};
use indexmap::IndexMap;

use super::{Budget, TypeOption};
use crate::mix::fallback;
use crate::plan::{Plan, is_quantizable};
use crate::walk::EMBEDDING;
use crate::{Base, Error, Recipe, Result};

/// Types that a mixture is made of where the budget names none: each is the best of its size that
/// GPTQ can choose codes of, and that runs fast.
const TYPES: [DType; 7] =
    [DType::Q2_K, DType::Q3_K, DType::IQ4_XS, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::Q8_0];

/// The types that are tried for a tensor.
pub(super) struct Candidate {
    pub(super) types: Vec<DType>,
    /// Their indices, the one first that is closest to what all tensors may have on average: the first
    /// that loses anything is run through the whole model.
    pub(super) order: Vec<usize>,
}

impl Candidate {
    /// Of the types' errors, that of the one that is run through the whole model, and its index. `None`
    /// where the weights already lie on the grid of every type.
    pub(super) fn reference(&self, errors: &[f64]) -> Option<usize> {
        self.order.iter().copied().find(|&i| errors[i] > EXACT)
    }
}

/// Less than this part of the outputs, squared, tells nothing about types that lose more: a type of
/// eight bits loses a hundred times as much.
const EXACT: f64 = 1e-7;

/// By the tensor's name.
pub(super) type Candidates = IndexMap<String, Candidate>;

/// What there is to choose.
pub(super) struct Choices {
    /// What is to be kept to.
    pub(super) budget: Budget,
    /// The recipe without its budget.
    pub(super) rest: Recipe,
    pub(super) candidates: Candidates,
    /// The sizes of the candidates' types, and of leaving the tensor as it is.
    pub(super) options: IndexMap<String, Vec<TypeOption>>,
    /// Bytes for all of them.
    pub(super) room: u64,
}

impl Choices {
    /// The choices that a recipe with a budget leaves.
    ///
    /// # Errors
    /// [`Error::Budget`] where not even the smallest types keep to it.
    pub(super) fn of(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        let budget = recipe.budget.clone().expect("a recipe with a budget");
        let rest = Recipe { budget: None, base: Base::Keep, ..recipe.clone() };
        let plan = Plan::new(checkpoint, &rest)?;
        let bytes = budget.tensor_bytes(checkpoint, &plan, &rest)?;
        let bits = bytes as f64 * 8.0 / plan.totals.parameters.max(1) as f64;

        let mut fixed = 0;
        let mut candidates = Candidates::new();
        let mut options: IndexMap<String, Vec<TypeOption>> = IndexMap::new();
        for planned in &plan.tensors {
            let name = &planned.name;
            let open = is_quantizable(name, &planned.shape)
                && planned.from.is_weight()
                && !rest.decides(name, checkpoint.config().tied)
                && is_met(name);
            if !open {
                fixed += planned.bytes_after;
                continue;
            }
            let row = planned.shape.row_len();
            let mut types: Vec<DType> = Vec::new();
            for &wanted in if budget.types.is_empty() { &TYPES[..] } else { &budget.types } {
                let dtype = fallback(wanted, row).unwrap_or(wanted);
                if !types.contains(&dtype) && dtype != planned.from {
                    types.push(dtype);
                }
            }
            types.sort_by(|a, b| a.bits_per_weight().total_cmp(&b.bits_per_weight()));
            let option = |&dtype: &DType| {
                let bytes = planned.shape.byte_len(dtype);
                let bytes =
                    bytes.map_err(|source| Error::Tensor { tensor: name.clone(), source })?;
                Ok(TypeOption { dtype, bytes: bytes as u64, kl: 0.0 })
            };
            // As it is, it costs nothing.
            let as_it_is = (!planned.coded).then_some(&planned.to);
            let all = types.iter().chain(as_it_is).map(option).collect::<Result<_>>()?;
            options.insert(name.clone(), all);
            let distance = |i: &usize| (types[*i].bits_per_weight() - bits).abs();
            let mut order: Vec<usize> = (0..types.len()).collect();
            order.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
            if !types.is_empty() {
                candidates.insert(name.clone(), Candidate { types, order });
            }
        }
        let smallest = |all: &Vec<TypeOption>| all.iter().map(|o| o.bytes).min().unwrap_or(0);
        let least = fixed + options.values().map(smallest).sum::<u64>();
        if least > bytes {
            let bits = |bytes: u64| bytes as f64 * 8.0 / plan.totals.parameters.max(1) as f64;
            return Err(budget.too_small(bits(bytes), bits(least)));
        }
        let room = bytes - fixed;
        Ok(Self { budget, rest, candidates, options, room })
    }
}

/// True for tensors whose inputs a walk meets.
fn is_met(name: &str) -> bool {
    match Place::of(name) {
        Place::Layer(_, stem) => Stage::of(stem).is_some(),
        Place::Global(_) => name == EMBEDDING || name == "output.weight",
    }
}
