use std::path::{Path, PathBuf};

use bevel_base::TensorView;
use bevel_formats::TensorInfo;
use bevel_formats::gguf::{GgufFile, Value};
use bevel_formats::safetensors;
use indexmap::IndexMap;
use serde_json::Value as Json;

use super::{Container, TokenizerSummary, cut, shorten};
use crate::{Provenance, Result};

/// A model's files, whatever architecture they are of.
pub(super) enum Files {
    Gguf(GgufFile),
    Safetensors {
        files: safetensors::Checkpoint,
        /// The directory and its `config.json`, where there is one.
        config: Option<(PathBuf, Json)>,
    },
}

impl Files {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let is_file = !path.is_dir();
        if is_file && extension != "safetensors" && extension != "json" {
            return Ok(Self::Gguf(GgufFile::open(path)?));
        }
        let config_path = path.join("config.json");
        if !is_file && !config_path.is_file() {
            // The model crate's message names what to do instead.
            if let Err(error) = bevel_model::Checkpoint::open(path)
                && safetensors::Checkpoint::open(path).is_err()
            {
                return Err(error.into());
            }
        }
        let files = safetensors::Checkpoint::open(path)?;
        let config = std::fs::read(config_path)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .map(|config| (path.to_owned(), config));
        Ok(Self::Safetensors { files, config })
    }

    pub(super) fn container(&self) -> Container {
        match self {
            Self::Gguf(_) => Container::Gguf,
            Self::Safetensors { config: Some(_), .. } => Container::HuggingFace,
            Self::Safetensors { config: None, .. } => Container::Safetensors,
        }
    }

    pub(super) fn tensors(&self) -> &IndexMap<String, TensorInfo> {
        match self {
            Self::Gguf(file) => file.tensors(),
            Self::Safetensors { files, .. } => files.tensors(),
        }
    }

    pub(super) fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        Ok(match self {
            Self::Gguf(file) => file.tensor(name)?,
            Self::Safetensors { files, .. } => files.tensor(name)?,
        })
    }

    pub(super) fn release(&self, name: &str) {
        match self {
            Self::Gguf(file) => file.release(name),
            Self::Safetensors { files, .. } => files.release(name),
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Self::Gguf(file) => file.paths().len(),
            Self::Safetensors { files, .. } => files.paths().len(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Gguf(file) => file.file_size(),
            Self::Safetensors { files, .. } => files.file_size(),
        }
    }

    pub(super) fn architecture(&self) -> Option<String> {
        match self {
            Self::Gguf(file) => file.metadata().get("general.architecture")?.as_str(),
            Self::Safetensors { config, .. } => config.as_ref()?.1.get("model_type")?.as_str(),
        }
        .map(str::to_owned)
    }

    pub(super) fn name(&self) -> Option<String> {
        let Self::Gguf(file) = self else { return None };
        file.metadata().get("general.name").and_then(Value::as_str).map(str::to_owned)
    }

    pub(super) fn provenance(&self) -> Option<Provenance> {
        match self {
            Self::Gguf(file) => Provenance::from_gguf(file.metadata()),
            Self::Safetensors { files, .. } => Provenance::from_safetensors(files.metadata()),
        }
    }

    pub(super) fn tokenizer(&self) -> Option<TokenizerSummary> {
        match self {
            Self::Gguf(file) => {
                let text = |key: &str| file.metadata().get(key).and_then(Value::as_str);
                let model = text("tokenizer.ggml.model")?;
                let pre = text("tokenizer.ggml.pre").map(|pre| format!(", {pre}"));
                let tokens = file.metadata().get("tokenizer.ggml.tokens");
                Some(TokenizerSummary {
                    kind: format!("{model}{}", pre.unwrap_or_default()),
                    tokens: tokens.and_then(Value::as_strings).map(<[String]>::len),
                    chat_template: text("tokenizer.chat_template").is_some(),
                })
            }
            Self::Safetensors { config, .. } => {
                let (dir, _) = config.as_ref()?;
                if !dir.join("tokenizer.json").is_file() {
                    return None;
                }
                let text = std::fs::read(dir.join("tokenizer_config.json")).unwrap_or_default();
                let config: Json = serde_json::from_slice(&text).unwrap_or_default();
                let class = config.get("tokenizer_class").and_then(Json::as_str);
                Some(TokenizerSummary {
                    kind: class.unwrap_or("tokenizer.json").to_owned(),
                    tokens: None,
                    chat_template: config.get("chat_template").is_some()
                        || dir.join("chat_template.jinja").is_file(),
                })
            }
        }
    }

    pub(super) fn metadata(&self) -> Vec<(String, String)> {
        match self {
            Self::Gguf(file) => {
                file.metadata().iter().map(|(key, value)| (key.clone(), shorten(value))).collect()
            }
            Self::Safetensors { files, config } => {
                let config = config.as_ref().and_then(|(_, config)| config.as_object());
                let pairs = config.into_iter().flatten();
                let of_config =
                    pairs.map(|(key, value)| (key.clone(), cut(&value.to_string(), 60)));
                let of_files = files
                    .metadata()
                    .iter()
                    .map(|(key, value)| (key.clone(), cut(&value.replace('\n', "\\n"), 60)));
                of_config.chain(of_files).collect()
            }
        }
    }
}
