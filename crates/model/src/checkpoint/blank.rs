//! Models that have not been trained yet: a configuration and a tokenizer, and random weights.

use std::path::{Path, PathBuf};

use bevel_base::DType;
use bevel_formats::safetensors;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde_json::Value;

use super::open::{config_path, rope_tensors};
use super::{Checkpoint, Entry, Origin, Place, Source, read_json};
use crate::{ModelConfig, Result};

/// σ of weights, GPT-2's and most others'.
const DEVIATION: f64 = 0.02;

impl Checkpoint {
    /// Opens a directory with `config.json` and a tokenizer's files. The model has no weights: reading fails until they
    /// are [replaced](Checkpoint::replaced), or [random](Checkpoint::with_random_weights).
    ///
    /// # Errors
    /// Whatever is wrong with the configuration.
    pub fn blank(dir: &Path) -> Result<Self> {
        let path = config_path(dir)?;
        let shown = path.display().to_string();
        let json = read_json(&path)?;
        let config = ModelConfig::from_hf(&json, &shown)?;
        let biases = Biases::of(&json, &config);
        let mut tensors = indexmap::IndexMap::new();
        let mut add = |name: String| {
            let shape = config.tensor_shape(&name).expect("required tensors have shapes").into();
            let origin = Origin::Stored(name.clone());
            tensors.insert(name, Entry { dtype: DType::F32, shape, origin });
        };
        for name in config.required_tensors() {
            let bias = name.strip_suffix("weight").filter(|stem| biases.has(stem));
            let bias = bias.map(|stem| format!("{stem}bias"));
            add(name);
            bias.into_iter().for_each(&mut add);
        }
        for (name, divisors) in rope_tensors(&config) {
            tensors.insert(name.into(), Entry::computed(divisors));
        }
        let files = safetensors::Checkpoint::default();
        Ok(Self {
            path: dir.display().to_string(),
            config,
            tensors,
            unused: Vec::new(),
            source: Source::HuggingFace { dir: dir.to_owned(), files, scheme: None },
            adapted: Default::default(),
            rotated: None,
        })
    }

    /// The same model with random weights, as training from nothing begins with: normal with σ = 0.02, and 0.02 / √(2
    /// layers) in the projections that are added to the residual stream; norms are 1, biases 0.
    ///
    /// # Panics
    /// Where the checkpoint is rotated.
    pub fn with_random_weights(mut self, seed: u64) -> Self {
        assert!(self.rotated.is_none(), "random weights are not rotated");
        let is_weight =
            |(_, entry): &(&String, &Entry)| !matches!(entry.origin, Origin::Computed(_));
        let names = self.tensors.iter().filter(is_weight).map(|(name, _)| name.clone());
        for name in names.collect::<Vec<String>>() {
            self.change(&name);
        }
        self.adapted.random = Some(seed);
        self
    }

    /// The random weights of a tensor.
    pub(super) fn random(&self, name: &str, seed: u64) -> Vec<f32> {
        let entry = &self.tensors[name];
        let len = entry.shape.len();
        let added = DEVIATION / (2.0 * self.config.layers as f64).sqrt();
        let deviation = match Place::of(name) {
            _ if name.ends_with(".bias") => return vec![0.0; len],
            _ if entry.shape.dims().len() == 1 => return vec![1.0; len],
            Place::Layer(_, rest) if rest.contains("attn_output") => added,
            Place::Layer(_, rest) if rest.contains("ffn_down") => added,
            _ => DEVIATION,
        };
        // Tensors have stretches of the same random numbers, far from each other.
        let index = self.tensors.get_index_of(name).expect("it is one of them");
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        random.advance((index as u128) << 64);
        normals(&mut random, len, deviation)
    }

    /// The files that weights are read from; none of a [blank](Checkpoint::blank) model.
    pub fn weight_files(&self) -> &[PathBuf] {
        match &self.source {
            Source::Gguf(file) => file.paths(),
            Source::HuggingFace { files, .. } => files.paths(),
        }
    }
}

/// Normal random numbers with mean 0, by Box and Muller.
fn normals(random: &mut Pcg64Mcg, count: usize, deviation: f64) -> Vec<f32> {
    let pair = || {
        let (radius, angle) = (1.0 - random.random::<f64>(), random.random::<f64>());
        let radius = deviation * (-2.0 * radius.ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * angle).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    };
    std::iter::repeat_with(pair).flatten().take(count).collect()
}

/// Which linear layers have a bias by `config.json`.
struct Biases {
    qkv: bool,
    output: bool,
    mlp: bool,
}

impl Biases {
    fn of(json: &Value, config: &ModelConfig) -> Self {
        let flag = |key: &str| json.get(key).and_then(Value::as_bool).unwrap_or(false);
        let attention = flag("attention_bias");
        // Always, and without a word about it.
        let is_qwen2 = matches!(config.family.gguf, "qwen2" | "qwen2moe");
        Self { qkv: attention || is_qwen2, output: attention, mlp: flag("mlp_bias") }
    }

    fn has(&self, stem: &str) -> bool {
        match Place::of(stem) {
            Place::Layer(_, "attn_q." | "attn_k." | "attn_v." | "attn_qkv.") => self.qkv,
            Place::Layer(_, "attn_output.") => self.output,
            Place::Layer(_, "ffn_gate." | "ffn_up." | "ffn_down.") => self.mlp,
            _ => false,
        }
    }
}
