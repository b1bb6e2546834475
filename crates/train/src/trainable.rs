use crate::LoraConfig;

/// What of a model is trained: a mask over its tensors, and matrices beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trainable {
    /// Adapters of layers that are not trained themselves.
    pub lora: Option<LoraConfig>,
    /// Patterns of names in GGUF's convention, as `token_embd.weight`: the tensors that are trained themselves, in
    /// single precision. `*` stands for the whole model.
    pub tensors: Vec<String>,
}

impl Trainable {
    /// Adapters alone.
    pub fn lora(config: LoraConfig) -> Self {
        Self { lora: Some(config), tensors: Vec::new() }
    }

    /// The whole model.
    pub fn everything() -> Self {
        Self { lora: None, tensors: vec!["*".to_owned()] }
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
