use bevel_base::{DType, Shape};
use bevel_model::{Checkpoint, Place, Stage};
use indexmap::IndexMap;

use crate::importance::Importance;
use crate::mix::{Facts, fallback};
use crate::report::Totals;
use crate::transcode::Job;
use crate::{Base, Error, Recipe, Result};
use bevel_base::matches;

/// A recipe applied to a model: the type of every tensor of the GGUF file it becomes.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The tensors, in the order in which they are written.
    pub(crate) tensors: Vec<PlannedTensor>,
    /// Sums over the tensors.
    pub(crate) totals: Totals,
    /// What goes otherwise than asked for, as sentences.
    pub(crate) warnings: Vec<String>,
    /// `general.file_type`; `None` where the source's holds.
    pub(crate) file_type: Option<u32>,
    /// What the recipe's importance matrix holds.
    pub(crate) importance: Option<Importance>,
}

/// What is to become of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct PlannedTensor {
    /// Its name.
    pub(crate) name: String,
    /// Its dimensions, outermost first.
    pub(crate) shape: Shape,
    /// The type it is read in.
    pub(crate) from: DType,
    /// The type it is stored in: another one where it is rotated.
    pub(crate) stored: DType,
    /// True where it is stored as codes and scales in tensors of their own.
    pub(crate) coded: bool,
    /// The type it is going to have.
    pub(crate) to: DType,
    /// The type it should have, where that does not fit its rows.
    pub(crate) wanted: Option<DType>,
    /// True where its columns are scaled first, so that its values are others.
    pub(crate) scaled: bool,
    /// Stored bytes before.
    pub(crate) bytes_before: u64,
    /// Stored bytes after.
    pub(crate) bytes_after: u64,
}

impl Plan {
    /// Applies a recipe to a model.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a type's bytes overflow; [`Error::Imatrix`] and those of reading for an
    /// importance matrix that does not belong to the model.
    pub(crate) fn new(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        let facts = Facts::of(checkpoint.config(), recipe.method.is_calibrated());
        let mut plan = Plan {
            tensors: Vec::new(),
            totals: Totals::default(),
            warnings: Vec::new(),
            file_type: None,
            importance: recipe.imatrix.as_ref().map(Importance::read).transpose()?,
        };
        for (name, entry) in checkpoint.tensors() {
            // Where no type is asked for, codes that GGUF has no block for become halves.
            let kept = if entry.is_coded() { DType::F16 } else { entry.dtype };
            let wanted = wanted_type(&facts, recipe, name, &entry.shape, kept);
            let fallback = fallback(wanted, entry.shape.row_len());
            let to = fallback.unwrap_or(wanted);
            let wrap = |source| Error::Tensor { tensor: name.clone(), source };
            let bytes = |dtype| entry.shape.byte_len(dtype).map(|len| len as u64).map_err(wrap);
            plan.add(PlannedTensor {
                name: name.clone(),
                shape: entry.shape.clone(),
                from: entry.dtype,
                stored: checkpoint.stored_dtype(name),
                to,
                wanted: fallback.map(|_| wanted),
                coded: entry.is_coded(),
                scaled: recipe.scales() && is_linear(name),
                bytes_before: checkpoint.stored_len(name),
                bytes_after: bytes(to)?,
            });
        }
        plan.file_type = match recipe.base {
            Base::Mix(mix) => Some(mix.file_type),
            Base::Keep | Base::Grouped(_) => plan.common_file_type(checkpoint),
        };
        plan.warn(checkpoint, recipe);
        if let Some(importance) = &plan.importance {
            plan.warnings.extend(importance.check(&plan.tensors, checkpoint.config().layers)?);
        }
        Ok(plan)
    }

    fn add(&mut self, tensor: PlannedTensor) {
        let totals = &mut self.totals;
        totals.add(tensor.shape.len() as u64, tensor.bytes_before, tensor.bytes_after);
        totals.fallbacks += usize::from(tensor.wanted.is_some());
        totals.requantized += usize::from(tensor.requantizes());
        self.tensors.push(tensor);
    }

    /// The file type after the type that holds most bytes, where the source has none.
    fn common_file_type(&self, checkpoint: &Checkpoint) -> Option<u32> {
        if checkpoint.gguf_metadata().is_some_and(|m| m.contains_key("general.file_type")) {
            return None;
        }
        let bytes = |dtype: DType| -> u64 {
            self.tensors.iter().filter(|t| t.to == dtype).map(|t| t.bytes_after).sum()
        };
        let most = self.tensors.iter().map(|t| t.to).max_by_key(|&dtype| bytes(dtype))?;
        crate::MIXES.iter().find(|mix| mix.base == most).map(|mix| mix.file_type)
    }

    /// One sentence for all tensors that share type and row.
    fn warn_of_fallbacks(&mut self) {
        let mut alike: IndexMap<(DType, DType, usize), Vec<&str>> = IndexMap::new();
        for t in &self.tensors {
            if let Some(wanted) = t.wanted {
                alike.entry((wanted, t.to, t.shape.row_len())).or_default().push(&t.name);
            }
        }
        for ((wanted, to, row), names) in alike {
            let (first, block) = (names[0], wanted.block_len());
            let (count, verb) = (names.len(), if names.len() == 1 { "becomes" } else { "become" });
            let which = match count {
                1 => format!("tensor `{first}`"),
                _ => format!("{count} tensors, the first is `{first}`,"),
            };
            self.warnings.push(format!(
                "{which} {verb} {to} instead of {wanted}: rows of {row} values are no multiple of its blocks of {block}"
            ));
        }
    }

    fn warn(&mut self, checkpoint: &Checkpoint, recipe: &Recipe) {
        self.warn_of_fallbacks();
        let again: Vec<_> = self.tensors.iter().filter(|t| t.requantizes()).collect();
        if let Some(first) = again.first() {
            let finer = again.iter().filter(|t| t.bytes_before <= t.bytes_after);
            let gain = match finer.count() {
                0 => String::new(),
                count => format!(", {count} of them to as many bits or more, which gains nothing"),
            };
            let scheme = checkpoint.scheme().filter(|_| first.coded);
            let before = scheme.map_or_else(|| first.stored.to_string(), |scheme| scheme.name());
            self.warnings.push(format!(
                "{} tensors were quantized before (`{}` to {before}) and are quantized again{gain}: both errors add up; start from the original model for the best quality",
                again.len(),
                first.name,
            ));
        }
        use DType::{IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};
        let codebooks = [IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S];
        let blind = self.tensors.iter().filter(|t| codebooks.contains(&t.to) && t.from != t.to);
        if let Some(first) = blind.clone().next().filter(|_| !recipe.method.weighs_errors()) {
            self.warnings.push(format!(
                "{} tensors become types with a codebook (`{}` {}), which lose far more without calibration data; add --imatrix FILE or --method importance",
                blind.count(),
                first.name,
                first.to
            ));
        }
        let tensors = self.tensors.iter();
        let eligible = tensors.filter(|t| is_quantizable(&t.name, &t.shape));
        self.warnings.extend(idle_patterns(recipe, eligible.map(|t| t.name.as_str())));
        if checkpoint.hf_dir().is_some() && !checkpoint.unused().is_empty() {
            let (count, first) = (checkpoint.unused().len(), &checkpoint.unused()[0]);
            self.warnings.push(format!(
                "{count} tensors have no place in a GGUF file of this architecture and are left out, the first is `{first}`"
            ));
        }
    }
}

impl PlannedTensor {
    /// The work of packing its rows; what `importance` says, if anything, is `[matrices, columns]`.
    pub(crate) fn job<'a>(&'a self, importance: &'a [f32]) -> Job<'a> {
        let job = Job::new(&self.name, self.from, self.to, self.shape.row_len());
        match self.shape.dims() {
            [.., rows, _] => Job { importance, matrix_rows: *rows, ..job },
            _ => job,
        }
    }

    /// Bytes of the values in the type they are read in.
    pub(crate) fn read_len(&self) -> u64 {
        self.shape.byte_len(self.from).map_or(u64::MAX, |len| len as u64)
    }

    /// True where packed values are packed again: in another way, or scaled.
    pub(crate) fn requantizes(&self) -> bool {
        let was_packed = self.stored.is_packed() || self.coded;
        was_packed && self.to.is_packed() && !self.stays()
    }

    /// True where nothing is to be done, as the values are to stay what they are.
    pub(crate) fn stays(&self) -> bool {
        self.from == self.to && !self.scaled
    }
}

/// The type that a recipe gives to a tensor, whether it fits the rows or not.
fn wanted_type(facts: &Facts, recipe: &Recipe, name: &str, shape: &Shape, dtype: DType) -> DType {
    if !is_quantizable(name, shape) || !dtype.is_weight() || recipe.keeps(name) {
        return storable(dtype);
    }
    if let Some(dtype) = recipe.type_of(name, facts.tied) {
        return dtype;
    }
    let layer = match Place::of(name) {
        Place::Layer(layer, _) => layer,
        Place::Global(_) => 0,
    };
    match recipe.base {
        Base::Keep | Base::Grouped(_) => storable(dtype),
        Base::Mix(mix) if recipe.pure => mix.base,
        Base::Mix(mix) => mix.dtype_of(facts, name, layer, shape.row_len()),
    }
}

/// A warning for each pattern of a recipe that is none of the names of tensors it could decide on.
pub(crate) fn idle_patterns<'a>(
    recipe: &Recipe,
    names: impl Iterator<Item = &'a str> + Clone,
) -> Vec<String> {
    let idle = |pattern: &&str| !names.clone().any(|name| matches(pattern, name));
    let warn = |pattern: &str| {
        format!(
            "the pattern `{pattern}` matches no tensor that can be quantized; `bevel inspect --tensors` lists their names"
        )
    };
    recipe.patterns().filter(idle).map(warn).collect()
}

/// True for the matrices of a layer whose inputs a walk meets.
fn is_linear(name: &str) -> bool {
    matches!(Place::of(name), Place::Layer(_, stem) if Stage::of(stem).is_some())
}

/// True for matrices that every reader takes in any type: no norms, no biases, no routers.
pub(crate) fn is_quantizable(name: &str, shape: &Shape) -> bool {
    shape.dims().len() >= 2
        && name.ends_with("weight")
        && !name.contains("_norm.weight")
        && !name.contains("ffn_gate_inp.weight")
}

/// The type itself, or the smallest one that GGUF has and that holds its values.
fn storable(dtype: DType) -> DType {
    match dtype {
        DType::F8_E4M3 | DType::F8_E5M2 => DType::BF16,
        other => other,
    }
}
