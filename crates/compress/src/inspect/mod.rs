//! What a model is made of, from its headers alone.

mod check;
mod files;

use std::path::{Path, PathBuf};

use bevel_base::{DType, Shape};
use bevel_formats::gguf::Value;
use bevel_kernels::{BLOCK_TOKENS, KvType};
use bevel_model::{Checkpoint, KvCache, ModelConfig, PREFILL_CHUNK};
use serde::Serialize;

pub use check::{BrokenTensor, check};
use files::Files;

use crate::report::{dims, type_name};
use crate::{Provenance, Result};

/// How a model is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Container {
    /// A GGUF file or its shards.
    Gguf,
    /// A Hugging Face directory.
    HuggingFace,
    /// Safetensors without a configuration.
    Safetensors,
}

/// What a model is made of.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The file or directory.
    pub path: PathBuf,
    /// How it is stored.
    pub container: Container,
    /// Files with tensors.
    pub files: usize,
    /// Bytes of the files with tensors.
    pub file_bytes: u64,
    /// `general.architecture` or `model_type`.
    pub architecture: Option<String>,
    /// The name the model gives itself.
    pub name: Option<String>,
    /// How linear layers are stored, where that is as codes and scales in tensors of their own:
    /// `GPTQ, 4 bits, groups of 128`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    /// Why bevel does not run it, as a sentence.
    pub note: Option<String>,
    /// Weights in all tensors.
    pub parameters: u64,
    /// Weights that a token meets, where experts share the work.
    pub active_parameters: Option<u64>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Stored bits a weight, scales counted.
    pub bits_per_weight: f64,
    /// The sizes of a model that bevel runs.
    pub dimensions: Option<Dimensions>,
    /// How many of what type there are, most bytes first.
    pub types: Vec<TypeSummary>,
    /// The tokenizer, without building it.
    pub tokenizer: Option<TokenizerSummary>,
    /// How bevel made it, where it did.
    pub provenance: Option<Provenance>,
    /// The tensors, in file order.
    pub tensors: Vec<StoredTensor>,
    /// Keys and, shortened, values.
    pub metadata: Vec<(String, String)>,
    #[serde(skip)]
    config: Option<ModelConfig>,
}

/// A decoder's sizes.
#[derive(Clone, Debug, Serialize)]
pub struct Dimensions {
    /// Tokens the model was trained to attend over.
    pub context: usize,
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP, or of one expert.
    pub ffn_dim: usize,
    /// Experts in a layer.
    pub experts: Option<usize>,
    /// Experts that a token goes through.
    pub experts_used: Option<usize>,
    /// Sliding window in tokens.
    pub window: Option<usize>,
    /// The output head is the embedding.
    pub tied: bool,
}

/// The tensors of one type.
#[derive(Clone, Debug, Serialize)]
pub struct TypeSummary {
    /// The type.
    #[serde(serialize_with = "type_name")]
    pub dtype: DType,
    /// Tensors.
    pub tensors: usize,
    /// Weights.
    pub parameters: u64,
    /// Bytes.
    pub bytes: u64,
    /// Bits a weight.
    pub bits_per_weight: f64,
}

/// A tensor as it is stored.
#[derive(Clone, Debug, Serialize)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Its type.
    #[serde(serialize_with = "type_name")]
    pub dtype: DType,
    /// Its dimensions, outermost first.
    #[serde(serialize_with = "dims")]
    pub shape: Shape,
    /// Its bytes.
    pub bytes: u64,
}

/// What is known of a tokenizer without building it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TokenizerSummary {
    /// `tokenizer.ggml.model` and `tokenizer.ggml.pre`, or the class in `tokenizer_config.json`.
    pub kind: String,
    /// Tokens, where the header says.
    pub tokens: Option<usize>,
    /// There is a chat template.
    pub chat_template: bool,
}

/// Memory that running a model takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Tokens of context.
    pub context: usize,
    /// The weights, as stored.
    pub weights: u64,
    /// Keys and values of all tokens.
    pub kv: u64,
    /// The buffers of a forward pass.
    pub buffers: u64,
    /// All of them.
    pub total: u64,
}

/// Reads a model's headers: a GGUF file, a Hugging Face directory or a safetensors file, also of an
/// architecture that bevel does not run.
///
/// # Errors
/// Those of opening the files.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let files = Files::open(path)?;
    let tensors: Vec<StoredTensor> = files
        .tensors()
        .iter()
        .map(|(name, info)| StoredTensor {
            name: name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: info.byte_len() as u64,
        })
        .collect();
    let mut inspection = Inspection {
        path: path.to_owned(),
        container: files.container(),
        files: files.count(),
        file_bytes: files.bytes(),
        architecture: files.architecture(),
        name: files.name(),
        quantization: None,
        note: None,
        parameters: 0,
        active_parameters: None,
        tensor_bytes: tensors.iter().map(|t| t.bytes).sum(),
        bits_per_weight: 0.0,
        dimensions: None,
        types: types(&tensors),
        tokenizer: files.tokenizer(),
        provenance: files.provenance(),
        metadata: files.metadata(),
        tensors,
        config: None,
    };
    drop(files);
    inspection.parameters =
        inspection.weights().map(|t| t.shape.len() as u64).fold(0, u64::saturating_add);
    match (inspection.container, Checkpoint::open(path)) {
        (Container::Safetensors, _) => {
            inspection.note = Some(
                "there is no `config.json` beside the tensors, so only these are listed".to_owned(),
            );
        }
        (_, Ok(checkpoint)) => inspection.set_model(&checkpoint),
        (_, Err(error)) => inspection.note = Some(format!("bevel does not run it: {error}")),
    }
    inspection.bits_per_weight =
        inspection.tensor_bytes as f64 * 8.0 / inspection.parameters.max(1) as f64;
    Ok(inspection)
}

impl Inspection {
    /// The tensors that hold weights: all but those that carry a stretched rope's divisors.
    fn weights(&self) -> impl Iterator<Item = &StoredTensor> {
        self.tensors.iter().filter(|t| !t.name.starts_with("rope_f"))
    }

    fn set_model(&mut self, checkpoint: &Checkpoint) {
        let config = checkpoint.config().clone();
        let mut of_experts: u64 = self
            .weights()
            .filter(|t| t.name.contains("_exps.") || t.name.contains(".experts."))
            .map(|t| t.shape.len() as u64)
            .sum();
        if let Some(scheme) = checkpoint.scheme() {
            // Words of codes are no weights, scales neither.
            self.quantization = Some(scheme.name());
            self.parameters = checkpoint.parameters();
            let experts = checkpoint.tensors().iter().filter(|(name, _)| name.contains("_exps."));
            of_experts = experts.map(|(_, entry)| entry.shape.len() as u64).sum();
        }
        self.active_parameters = config.experts.map(|experts| {
            let used = u128::from(of_experts) * experts.used as u128 / experts.count as u128;
            self.parameters - of_experts + used as u64
        });
        self.name = self.name.take().or_else(|| config.name.clone());
        self.dimensions = Some(Dimensions {
            context: config.context,
            vocabulary: config.vocab_size,
            layers: config.layers,
            dim: config.dim,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            ffn_dim: config.ffn_dim,
            experts: config.experts.map(|e| e.count),
            experts_used: config.experts.map(|e| e.used),
            window: config.window,
            tied: config.tied,
        });
        self.config = Some(config);
    }

    /// The memory that running the model over `context` tokens takes; by default over the model's
    /// own context. `None` where bevel does not run it.
    pub fn memory(&self, context: Option<usize>, kv_type: KvType) -> Option<Memory> {
        let config = self.config.as_ref()?;
        let context = context.unwrap_or(config.context);
        let tokens = context.checked_next_multiple_of(BLOCK_TOKENS)?;
        let kv = (KvCache::bytes_per_token(config, kv_type) as u64).checked_mul(tokens as u64)?;
        let chunk = PREFILL_CHUNK.min(context) as u64;
        let experts = config.experts.map_or(1, |e| e.used);
        // The residual stream and its branch; q and what it attended to; k and v; gate and up.
        let widths = config.dim + config.q_dim() + config.kv_dim() + config.ffn_dim * experts;
        let buffers = 4 * (chunk * 2 * widths as u64 + config.vocab_size as u64);
        let weights = self.tensor_bytes;
        Some(Memory {
            context,
            weights,
            kv,
            buffers,
            total: weights.checked_add(kv)?.checked_add(buffers)?,
        })
    }
}

fn types(tensors: &[StoredTensor]) -> Vec<TypeSummary> {
    let mut types: Vec<TypeSummary> = DType::all()
        .map(|dtype| {
            let of_type = || tensors.iter().filter(|t| t.dtype == dtype);
            let parameters: u64 = of_type().map(|t| t.shape.len() as u64).sum();
            let bytes: u64 = of_type().map(|t| t.bytes).sum();
            let bits_per_weight = dtype.bits_per_weight();
            TypeSummary { dtype, tensors: of_type().count(), parameters, bytes, bits_per_weight }
        })
        .filter(|t| t.tensors > 0)
        .collect();
    types.sort_by_key(|t| std::cmp::Reverse(t.bytes));
    types
}

/// A metadata value on one line.
fn shorten(value: &Value) -> String {
    const MOST: usize = 60;
    let text = match value {
        Value::String(text) => text.replace('\n', "\\n"),
        Value::Array(array) => return format!("[{} values]", array.len()),
        Value::U8(v) => v.to_string(),
        Value::I8(v) => v.to_string(),
        Value::U16(v) => v.to_string(),
        Value::I16(v) => v.to_string(),
        Value::U32(v) => v.to_string(),
        Value::I32(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        Value::U64(v) => v.to_string(),
        Value::I64(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
    };
    cut(&text, MOST)
}

/// The first `most` characters, and a mark where there were more.
fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
