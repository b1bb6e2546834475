use std::collections::BTreeMap;
use std::sync::Arc;

use bevel_model::Checkpoint;

use crate::{LoraConfig, Rounding};

/// What of a model is trained: a mask over its tensors, and matrices beside them.
#[derive(Clone, Debug, Default)]
pub struct Trainable {
    /// Adapters of layers that are not trained themselves.
    pub lora: Option<LoraConfig>,
    /// Patterns of names in GGUF's convention, as `token_embd.weight`: the tensors that are trained themselves, in
    /// single precision. `*` stands for the whole model.
    pub tensors: Vec<String>,
    /// The model before it was quantized, for adapters that begin with what that lost ([`Start::LoftQ`](crate::Start)).
    pub original: Option<Arc<Checkpoint>>,
    /// What products see of some of these, by name (quantization-aware training).
    pub roundings: BTreeMap<String, Arc<dyn Rounding>>,
}

impl Trainable {
    /// Adapters alone.
    pub fn lora(config: LoraConfig) -> Self {
        Self { lora: Some(config), ..Self::default() }
    }

    /// The whole model.
    pub fn everything() -> Self {
        Self { tensors: vec!["*".to_owned()], ..Self::default() }
    }

    /// Whether the tensor of this name is trained itself.
    pub fn trains(&self, name: &str) -> bool {
        self.tensors.iter().any(|pattern| bevel_base::matches(pattern, name))
    }
}

impl From<LoraConfig> for Trainable {
    fn from(config: LoraConfig) -> Self {
        Self::lora(config)
    }
}
