//! Opening: which tensors a model's files hold, under which names, and whether they are all there.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use bevel_base::{DType, Shape};
use bevel_formats::quantized::Scheme;
use bevel_formats::{gguf, safetensors};
use indexmap::IndexMap;

use super::{Checkpoint, Entry, Origin, Source, Transform, module_of, read_json};
use crate::config::{GgufFacts, RopeScaling};
use crate::{Error, ModelConfig, Result};

impl Checkpoint {
    pub(super) fn open_gguf(path: &Path) -> Result<Self> {
        let file = gguf::GgufFile::open(path)?;
        let shown = path.display().to_string();
        let embedding = file.tensors().get("token_embd.weight");
        let missing =
            |tensor: &str| Error::MissingTensor { path: shown.clone(), tensor: tensor.into() };
        let facts = GgufFacts {
            vocab_size: embedding.ok_or_else(|| missing("token_embd.weight"))?.shape.rows(),
            tied: !file.tensors().contains_key("output.weight"),
            tensor: &|name| {
                let Some(info) = file.tensors().get(name) else { return Ok(None) };
                // Nothing is read that the shape check would refuse.
                if info.shape.len() > 1 << 16 {
                    return Ok(None);
                }
                let wrap =
                    |source| Error::Tensor { path: shown.clone(), tensor: name.into(), source };
                Ok(Some(file.tensor(name)?.to_f32().map_err(wrap)?))
            },
        };
        let config = ModelConfig::from_gguf(file.metadata(), &facts, &shown)?;
        let tensors = file
            .tensors()
            .iter()
            .map(|(name, info)| {
                let origin = Origin::Stored(name.clone());
                (name.clone(), Entry { dtype: info.dtype, shape: info.shape.clone(), origin })
            })
            .collect();
        Self {
            path: shown,
            config,
            tensors,
            unused: Vec::new(),
            source: Source::Gguf(file),
            adapted: Default::default(),
            rotated: None,
        }
        .checked()
    }

    pub(super) fn open_hf(dir: &Path) -> Result<Self> {
        let config_path = config_path(dir)?;
        let shown_config = config_path.display().to_string();
        let json = read_json(&config_path)?;
        let config = ModelConfig::from_hf(&json, &shown_config)?;
        let scheme = Scheme::from_config(&json, &shown_config)?;
        let files = safetensors::Checkpoint::open(dir)?;
        let shown = dir.display().to_string();
        let stored = files.tensors();
        let prefix = ["model.", "language_model.model.", "model.language_model.", ""]
            .into_iter()
            .find(|p| stored.contains_key(&format!("{p}embed_tokens.weight")))
            .ok_or_else(|| Error::MissingTensor {
                path: shown.clone(),
                tensor: "model.embed_tokens.weight".into(),
            })?;

        let mut tensors = IndexMap::new();
        let mut used = HashSet::new();
        let mut add = |name: String| -> Result<bool> {
            let Some(origin) = config.hf_tensor(&name, prefix) else { return Ok(false) };
            let Some(first) = Piece::find(&files, scheme.as_ref(), &origin.names[0])? else {
                return Ok(false);
            };
            let shape = if origin.names.len() == 1 && !name.contains("_exps") {
                first.shape.clone()
            } else {
                let mut dims = vec![origin.names.len()];
                dims.extend_from_slice(first.shape.dims());
                dims.into()
            };
            let mut bytes = 0;
            for part in &origin.names {
                let missing = || Error::MissingTensor { path: shown.clone(), tensor: part.clone() };
                let found = Piece::find(&files, scheme.as_ref(), part)?.ok_or_else(missing)?;
                let is_alike = found.coded.is_some() == first.coded.is_some();
                if (&found.shape, found.dtype, is_alike) != (&first.shape, first.dtype, true) {
                    return Err(Error::Shape {
                        path: shown.clone(),
                        tensor: part.clone(),
                        expected: format!("{} of {}, as in expert 0", first.shape, first.dtype),
                        found: format!("{} of {}", found.shape, found.dtype),
                    });
                }
                for name in found.coded.iter().flatten() {
                    bytes += stored[name].byte_len() as u64;
                }
                used.extend(found.coded.unwrap_or_else(|| vec![part.clone()]));
            }
            // Norms and biases are kept in f32, as in every GGUF file.
            let dtype = if shape.dims().len() == 1 && first.dtype.is_weight() {
                DType::F32
            } else {
                first.dtype
            };
            let origin = if first.coded.is_some() {
                Origin::Coded { hf: origin, bytes }
            } else if dtype == first.dtype
                && origin.names.len() == 1
                && origin.transform == Transform::None
            {
                Origin::Stored(origin.names[0].clone())
            } else {
                Origin::Derived(origin)
            };
            tensors.insert(name, Entry { dtype, shape, origin });
            Ok(true)
        };
        for name in config.required_tensors() {
            let bias = name.strip_suffix("weight").map(|stem| format!("{stem}bias"));
            // A configuration can ask for very many: the first one missing is enough.
            if !add(name.clone())? {
                let names = config.hf_tensor(&name, prefix).map(|origin| origin.names);
                let tensor = names.and_then(|names| names.into_iter().next()).unwrap_or(name);
                return Err(Error::MissingTensor { path: shown, tensor });
            }
            if let Some(bias) = bias {
                add(bias)?;
            }
        }
        for (name, divisors) in rope_tensors(&config) {
            tensors.insert(name.into(), Entry::computed(divisors));
        }
        let tied_head =
            format!("{}lm_head.weight", prefix.strip_suffix("model.").unwrap_or(prefix));
        let unused: Vec<String> = stored
            .keys()
            .filter(|name| !used.contains(*name) && !name.ends_with("rotary_emb.inv_freq"))
            .filter(|name| !(config.tied && **name == tied_head))
            .cloned()
            .collect();
        // Beside the decoder there may be other models, such as one that sees.
        let layers = format!("{prefix}layers.");
        let left_out =
            unused.iter().find(|name| name.starts_with(&layers) && changes_results(name));
        if let Some(name) = left_out {
            return Err(no_such_tensor(shown, &config, name, stored[name].dtype));
        }
        let source = Source::HuggingFace { dir: dir.to_owned(), files, scheme };
        let adapted = Default::default();
        Self { path: shown, config, tensors, unused, source, adapted, rotated: None }.checked()
    }

    /// Checks that every tensor of the architecture is there with its shape and a type that can be
    /// computed with.
    fn checked(mut self) -> Result<Self> {
        for name in self.config.required_tensors() {
            if !self.tensors.contains_key(&name) {
                return Err(Error::MissingTensor { path: self.path, tensor: name });
            }
        }
        let mut unknown = Vec::new();
        for (name, entry) in &self.tensors {
            let Some(expected) = self.config.tensor_shape(name) else {
                unknown.push(name.clone());
                continue;
            };
            if entry.shape.dims() != expected {
                return Err(Error::Shape {
                    tensor: self.shown_name(name),
                    path: self.path,
                    expected: Shape::from(expected).to_string(),
                    found: entry.shape.to_string(),
                });
            }
            if !entry.dtype.is_weight() {
                let problem = "expected floating-point or packed weights".to_owned();
                return Err(Error::TensorType {
                    tensor: self.shown_name(name),
                    path: self.path,
                    dtype: entry.dtype,
                    problem,
                });
            }
        }
        if let Some(name) = unknown.iter().find(|name| changes_results(name)) {
            let dtype = self.tensors[name].dtype;
            return Err(no_such_tensor(self.path, &self.config, name, dtype));
        }
        self.unused.extend(unknown);
        Ok(self)
    }
}

/// The path of a directory's configuration.
pub(super) fn config_path(dir: &Path) -> Result<PathBuf> {
    let config_path = dir.join("config.json");
    if !config_path.is_file() {
        let ggufs = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let has_gguf = ggufs.map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "gguf"));
        let problem = match has_gguf {
            Some(file) => format!(
                "the directory has no `config.json`; name the file itself: `{}`",
                file.display()
            ),
            None => {
                "the directory has no `config.json`, which a Hugging Face checkpoint needs".into()
            }
        };
        return Err(Error::NotAModel { path: dir.display().to_string(), problem });
    }
    Ok(config_path)
}

/// A tensor of a Hugging Face checkpoint, stored as it is or as codes.
struct Piece {
    dtype: DType,
    shape: Shape,
    /// The names of its codes, scales and so on.
    coded: Option<Vec<String>>,
}

impl Piece {
    fn find(
        files: &safetensors::Checkpoint,
        scheme: Option<&Scheme>,
        name: &str,
    ) -> Result<Option<Self>> {
        if let Some(scheme) = scheme.filter(|_| name.ends_with(".weight"))
            && let Some(shape) = scheme.module_shape(files, module_of(name))?
        {
            let coded = Some(scheme.module_tensors(files, module_of(name)));
            return Ok(Some(Self { dtype: DType::F32, shape: shape.into(), coded }));
        }
        let info = files.tensors().get(name);
        Ok(info.map(|info| Self { dtype: info.dtype, shape: info.shape.clone(), coded: None }))
    }
}

/// Whether a model that was trained with this tensor computes something else without it.
fn changes_results(name: &str) -> bool {
    name.ends_with(".bias") || name.contains("norm")
}

fn no_such_tensor(path: String, config: &ModelConfig, name: &str, dtype: DType) -> Error {
    let family = config.family.hf[0];
    let problem = format!(
        "a {family} model of {} layers has no such tensor; running without it would give wrong results",
        config.layers
    );
    Error::TensorType { path, tensor: name.to_owned(), dtype, problem }
}

/// Tensors that carry a stretched rope's divisors in GGUF files.
pub(super) fn rope_tensors(config: &ModelConfig) -> Vec<(&'static str, Vec<f32>)> {
    match &config.rope.scaling {
        RopeScaling::Llama3 { .. } => {
            config.rope.divisors(0).map(|d| ("rope_freqs.weight", d)).into_iter().collect()
        }
        RopeScaling::LongRope { short, long, .. } => {
            vec![
                ("rope_factors_long.weight", long.clone()),
                ("rope_factors_short.weight", short.clone()),
            ]
        }
        _ => Vec::new(),
    }
}
