use anyhow::Result;
use bevel_compress::{Base, Recipe};
use bevel_model::Checkpoint;

use super::planned_bytes;

/// Types worth showing, in the order in which they are preferred, and whether every tensor gets the
/// type itself. Where a model's width is no multiple of 256, most K types give way to larger ones, and
/// four bits throughout are the smallest.
const CANDIDATES: [(&str, bool); 6] = [
    ("Q8_0", false),
    ("Q4_K_M", false),
    ("Q3_K_M", false),
    ("IQ4_NL", true),
    ("Q2_K", false),
    ("Q6_K", false),
];

/// What a model is quantized to.
pub(super) struct Choice {
    /// Largest first.
    pub(super) recipes: Vec<Recipe>,
    /// Why it is not the usual choice.
    pub(super) note: Option<String>,
}

impl Choice {
    /// The first `count` candidates that make the model smaller, and clearly unlike each other: a
    /// model that is stored in four bits gains nothing from eight.
    pub(super) fn new(checkpoint: &Checkpoint, count: usize) -> Result<Self> {
        let before = checkpoint.tensor_bytes();
        let mut chosen: Vec<(u64, Recipe)> = Vec::new();
        let mut left_out = Vec::new();
        for (name, pure) in CANDIDATES {
            if chosen.len() == count {
                break;
            }
            let recipe = Recipe { pure, ..Recipe::new(name.parse::<Base>()?) };
            let after = planned_bytes(checkpoint, &recipe)?;
            // Two percent are no step worth a row in a table.
            let near = |other: u64| after.abs_diff(other) * 50 < other;
            if after > before || near(before) {
                left_out.push(name);
            } else if !chosen.iter().any(|(bytes, _)| near(*bytes)) {
                chosen.push((after, recipe));
            }
        }
        chosen.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let bits = before as f64 * 8.0 / checkpoint.parameters().max(1) as f64;
        let note = (!left_out.is_empty()).then(|| {
            format!(
                "The model is stored in {bits:.1} bits a weight already, so the tour leaves out what would not make it smaller: {}. What the weights lost when they were rounded before is in every figure, the original's too.",
                left_out.join(", ")
            )
        });
        Ok(Self { recipes: chosen.into_iter().map(|(_, recipe)| recipe).collect(), note })
    }
}
