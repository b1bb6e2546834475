//! Small models made up for tests, and what all tests need to run.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bevel_base::{DType, Shape, pack};
use bevel_compress::{Options, Recipe, Report, Result};
use bevel_formats::TensorSpec;
use bevel_formats::gguf::{GgufWriter, Metadata};
use bevel_formats::safetensors::SafetensorsWriter;
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, ModelConfig};
use serde_json::{Value, json};

/// The small real model of the repository.
pub(crate) fn tiny_austen() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen")
}

/// Reads a recipe.
#[track_caller]
pub(crate) fn recipe(toml: &str) -> Recipe {
    toml.parse().unwrap()
}

/// Opens, converts or quantizes, on two threads.
pub(crate) fn convert(from: &Path, recipe: &Recipe, out: &Path) -> Result<Report> {
    convert_with(from, recipe, out, &Options::default())
}

pub(crate) fn convert_with(
    from: &Path,
    recipe: &Recipe,
    out: &Path,
    options: &Options,
) -> Result<Report> {
    let checkpoint = Checkpoint::open(from)?;
    let go_on = &mut |_: bevel_compress::Progress<'_>| ControlFlow::Continue(());
    bevel_compress::convert(&checkpoint, recipe, out, options, &Cpu::new(2).unwrap(), go_on)
}

/// Every tensor of a model by its GGUF name: type, shape, bytes.
pub(crate) fn contents(path: &Path) -> Vec<(String, DType, Shape, Vec<u8>)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let tensor = |(name, entry): (&String, &bevel_model::Entry)| {
        let bytes = checkpoint.read(name).unwrap().into_owned();
        (name.clone(), entry.dtype, entry.shape.clone(), bytes)
    };
    let mut all: Vec<_> = checkpoint.tensors().iter().map(tensor).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// A stream of values: multiples of 1/64 between −1 and 1, which bf16 and f16 hold, and which stay
/// what they are when one is added and taken away.
pub(crate) struct Values(u64);

impl Values {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<f32> {
        let next = |_| {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.0 >> 40) % 129) as f32 / 64.0 - 1.0
        };
        (0..count).map(next).collect()
    }
}

/// The `config.json` of a family's small model. Two layers, rows of 256 values.
pub(crate) fn hf_config(model_type: &str) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "vocab_size": 96, "tie_word_embeddings": false, "rope_theta": 10000.0,
    });
    match model_type {
        "mixtral" => {
            config["num_local_experts"] = json!(4);
            config["num_experts_per_tok"] = json!(2);
        }
        "gemma2" => {
            config["hidden_activation"] = json!("gelu_pytorch_tanh");
            config["tie_word_embeddings"] = json!(true);
            config["sliding_window"] = json!(32);
            config["attn_logit_softcapping"] = json!(50.0);
            config["final_logit_softcapping"] = json!(30.0);
        }
        _ => {}
    }
    config
}

/// Writes a Hugging Face directory of bf16 values that follow from `seed`; qwen2 has biases.
pub(crate) fn write_hf(dir: &Path, model_type: &str, seed: u64) {
    std::fs::create_dir_all(dir).unwrap();
    let json = hf_config(model_type);
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    let config = ModelConfig::from_hf(&json, "test").unwrap();
    let mut names: Vec<String> = config.required_tensors().collect();
    if model_type == "qwen2" {
        let biased = |n: &&String| ["attn_q.", "attn_k.", "attn_v."].iter().any(|p| n.contains(p));
        let biases: Vec<String> =
            names.iter().filter(biased).map(|n| n.replace("weight", "bias")).collect();
        names.extend(biases);
    }
    let mut specs = Vec::new();
    for name in &names {
        let dims = config.tensor_shape(name).unwrap();
        let parts = config.hf_tensor(name, "model.").unwrap().names;
        let dims = if name.contains("_exps") { &dims[1..] } else { &dims[..] };
        specs.extend(parts.into_iter().map(|n| TensorSpec::new(n, DType::BF16, dims.to_vec())));
    }
    let file = dir.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&file, &Default::default(), &specs, None).unwrap();
    let mut values = Values::new(seed);
    for spec in &specs {
        writer.write(&spec.name, &packed(DType::BF16, &values.take(spec.shape.len()))).unwrap();
    }
    writer.finish().unwrap();
}

/// Writes a GGUF file of a configuration's tensors: matrices in `dtype`, vectors in F32, with the
/// values that `value` gives for a tensor.
pub(crate) fn write_gguf(
    path: &Path,
    config: &ModelConfig,
    dtype: DType,
    mut value: impl FnMut(&str, usize) -> Vec<f32>,
) {
    let mut metadata = Metadata::new();
    config.to_gguf(&mut metadata);
    metadata.insert("somebody.else".to_owned(), "keeps this".into());
    let spec = |name: String| {
        let dims = config.tensor_shape(&name).unwrap();
        TensorSpec::new(name, if dims.len() > 1 { dtype } else { DType::F32 }, dims)
    };
    let specs: Vec<TensorSpec> = config.required_tensors().map(spec).collect();
    let mut writer = GgufWriter::create(path, &metadata, &specs, None).unwrap();
    for spec in &specs {
        let values = value(&spec.name, spec.shape.len());
        writer.write(&spec.name, &packed(spec.dtype, &values)).unwrap();
    }
    writer.finish().unwrap();
}

/// A small llama model in a GGUF file, of values that are off every grid.
pub(crate) fn write_llama(path: &Path, dtype: DType) {
    let config = ModelConfig::from_hf(&hf_config("llama"), "test").unwrap();
    let mut values = Values::new(5);
    write_gguf(path, &config, dtype, |_, len| {
        values.take(len).iter().map(|v| (v * 1.7).sin()).collect()
    });
}

pub(crate) fn packed(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(values.len()).unwrap()];
    pack::quantize(dtype, values, None, &mut bytes).unwrap();
    bytes
}

/// Names of what lies in a directory.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        names.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
