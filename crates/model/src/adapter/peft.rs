//! Adapters as [PEFT](https://github.com/huggingface/peft) has them: a directory with `adapter_config.json` and
//! `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

use bevel_base::DType;
use bevel_formats::{AtomicFile, TensorSpec, safetensors};
use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::{AdapterFile, LowRank, common_type};
use crate::checkpoint::{read_json, source_row};
use crate::{Error, ModelConfig, Result, Transform};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of a model's modules.
const PREFIX: &str = "base_model.model.";

pub(super) fn open(dir: &Path, config: &ModelConfig) -> Result<AdapterFile> {
    let mut adapter = AdapterFile::new(dir.display().to_string());
    let settings = dir.join(CONFIG);
    if !settings.is_file() {
        return Err(adapter.refused(format!("the directory has no `{CONFIG}`, as PEFT writes it")));
    }
    let settings = Settings(read_json(&settings)?);
    settings.check().map_err(|problem| adapter.refused(problem))?;
    let weights = dir.join(WEIGHTS);
    if !weights.is_file() {
        let problem = match dir.join("adapter_model.bin").is_file() {
            true => {
                "its weights are in `adapter_model.bin`, a Python pickle, which can run any code when it is read; save it as safetensors"
            }
            false => "the directory has no `adapter_model.safetensors`",
        };
        return Err(adapter.refused(problem));
    }
    let file = safetensors::Checkpoint::open(&weights)?;
    adapter.files = vec![dir.join(CONFIG), weights];
    Reader { file: &file, settings: &settings, modules: modules(config), config }
        .read(&mut adapter)?;
    Ok(adapter)
}

/// The tensors of an adapter.
struct Reader<'a> {
    file: &'a safetensors::Checkpoint,
    settings: &'a Settings,
    modules: Modules,
    config: &'a ModelConfig,
}

impl Reader<'_> {
    fn read(&self, adapter: &mut AdapterFile) -> Result<()> {
        for name in self.file.tensors().keys() {
            match halves(name) {
                Some((module, A)) => self.matrix(adapter, name, module)?,
                Some((_, kind)) => self.other_half(adapter, name, kind).map(|_| ())?,
                // They are read with their matrix.
                None if is_magnitude(name) => {}
                None => self.tensor(adapter, name)?,
            }
        }
        Ok(())
    }

    /// The name of B where that of A is given, or of A where that of B is.
    fn other_half(&self, adapter: &AdapterFile, name: &str, kind: &str) -> Result<String> {
        let other = name.replace(kind, if kind == A { B } else { A });
        match self.file.tensors().contains_key(&other) {
            true => Ok(other),
            false => Err(adapter.refused(format!("`{name}` is there without `{other}`"))),
        }
    }

    fn values(&self, adapter: &AdapterFile, name: &str) -> Result<Vec<f32>> {
        self.file.tensor(name)?.to_f32().map_err(|source| adapter.failed(name, source))
    }

    /// What is added to a module's weight; `name` is that of A.
    fn matrix(&self, adapter: &mut AdapterFile, name: &str, module: &str) -> Result<()> {
        let other = self.other_half(adapter, name, A)?;
        let Some((weight, transform)) = weight_of(&self.modules, module) else {
            return Err(adapter.refused(format!(
                "`{name}` adapts a module that this model does not have; the adapter belongs to another model"
            )));
        };
        let (a, b) = (self.file.tensor(name)?, self.file.tensor(&other)?);
        let rank = a.shape().rows();
        let (expected, alpha) =
            self.settings.rank_and_alpha(module).map_err(|problem| adapter.refused(problem))?;
        if rank != expected || b.shape().row_len() != rank {
            return Err(adapter.refused(format!(
                "`{name}` has the shape {} and `{other}` {}, but the rank is {expected} by `{CONFIG}`",
                a.shape(),
                b.shape()
            )));
        }
        let stem = name.strip_suffix("weight").and_then(|name| name.strip_suffix(A));
        let magnitude = MAGNITUDES.map(|end| format!("{}{end}", stem.unwrap_or(name)));
        let magnitude = magnitude.iter().find(|name| self.file.tensors().contains_key(*name));
        let has_lengths = self.settings.flag("use_dora");
        if has_lengths != magnitude.is_some() {
            return Err(adapter.refused(match has_lengths {
                true => format!("`use_dora` in `{CONFIG}` is true, but `{module}` has no lengths"),
                false => format!(
                    "`{module}` has lengths (DoRA), but `use_dora` in `{CONFIG}` is not true"
                ),
            }));
        }
        let in_order = |values, rank| regrouped(values, rank, *transform, self.config, true);
        let magnitude =
            magnitude.map(|name| self.values(adapter, name).map(|values| in_order(values, 1)));
        let matrix = LowRank {
            rank,
            alpha,
            rank_stabilized: self.settings.flag("use_rslora"),
            dtype: common_type(a.dtype(), b.dtype()),
            a: self.values(adapter, name)?,
            b: in_order(self.values(adapter, &other)?, rank),
            magnitude: magnitude.transpose()?,
        };
        adapter.insert_stored(self.config, weight, name, matrix)
    }

    /// A tensor in the place of the model's.
    fn tensor(&self, adapter: &mut AdapterFile, name: &str) -> Result<()> {
        let module = name.strip_prefix(PREFIX).unwrap_or(name).strip_suffix(".weight");
        let found = module.and_then(|module| weight_of(&self.modules, module));
        let Some((tensor, transform)) = found else {
            return Err(adapter.refused(refusal(name)));
        };
        if !self.settings.saves_modules() {
            return Err(adapter.refused(format!(
                "`{name}` is a whole tensor, but `modules_to_save` in `{CONFIG}` names none"
            )));
        }
        // A head that is the embedding stays that.
        if self.config.tied && ["token_embd.weight", "output.weight"].contains(&tensor.as_str()) {
            if !self.settings.flag("ensure_weight_tying") {
                return Err(adapter.refused(format!(
                    "`{name}` makes the embedding and the head of this model differ, which are one; train the adapter with `ensure_weight_tying`"
                )));
            }
            if tensor == "output.weight" {
                return Ok(());
            }
        }
        let mut values = self.values(adapter, name)?;
        if *transform == Transform::PlusOne {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        let values = regrouped(values, self.config.dim, *transform, self.config, true);
        adapter.insert_tensor(self.config, tensor, values)
    }
}

/// Ends of the names of DoRA's lengths: PEFT's files have the first.
const MAGNITUDES: [&str; 2] = [".lora_magnitude_vector", ".lora_magnitude_vector.weight"];

fn is_magnitude(name: &str) -> bool {
    MAGNITUDES.iter().any(|end| name.ends_with(end))
}

const A: &str = ".lora_A.";
const B: &str = ".lora_B.";

/// A tensor's module, without PEFT's prefix, and which of its matrices it is.
fn halves(name: &str) -> Option<(&str, &'static str)> {
    let kind = [A, B].into_iter().find(|kind| name.ends_with(&format!("{kind}weight")))?;
    let module = name.strip_suffix("weight")?.strip_suffix(kind)?;
    Some((module.strip_prefix(PREFIX).unwrap_or(module), kind))
}

/// Why a tensor cannot be run that is neither A nor B.
fn refusal(name: &str) -> String {
    let what = if name.contains("lora_embedding") {
        "adapts the embedding, which is not run; train the adapter without `embed_tokens`"
    } else if name.ends_with(".bias") {
        "is a bias, which is not run; train the adapter with `bias` set to `none`"
    } else {
        "is neither A nor B of a low-rank adapter, nor a tensor that this model has"
    };
    format!("`{name}` {what}")
}

/// GGUF's names of weights, and what becomes of their rows, by the modules' names within the decoder.
type Modules = HashMap<String, (String, Transform)>;

fn modules(config: &ModelConfig) -> Modules {
    let mut modules = HashMap::new();
    for weight in config.required_tensors().chain(["output.weight".to_owned()]) {
        let Some(hf) = config.hf_tensor(&weight, "") else { continue };
        for name in &hf.names {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            modules.insert(module.to_owned(), (weight.clone(), hf.transform));
        }
    }
    modules
}

fn weight_of<'a>(modules: &'a Modules, module: &str) -> Option<&'a (String, Transform)> {
    let decoders = ["language_model.model.", "model.language_model.", "model.", ""];
    decoders.iter().find_map(|decoder| modules.get(module.strip_prefix(decoder)?))
}

/// B with its rows in the other order of rope, see [`Transform::InterleaveRows`].
fn regrouped(
    b: Vec<f32>,
    rank: usize,
    transform: Transform,
    config: &ModelConfig,
    to_gguf: bool,
) -> Vec<f32> {
    let Transform::InterleaveRows { heads } = transform else { return b };
    // Of another shape it is refused later.
    if b.len() != heads * config.head_dim * rank {
        return b;
    }
    let rows = 0..heads * config.head_dim;
    rows.flat_map(|row| &b[source_row(row, config.head_dim, to_gguf) * rank..][..rank])
        .copied()
        .collect()
}

/// `adapter_config.json`
struct Settings(Value);

impl Settings {
    fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Refuses what would have to be run and is not.
    fn check(&self) -> Result<(), String> {
        let text = |key: &str| self.0.get(key).and_then(Value::as_str);
        let refuse = |key: &str, why: &str| Err(format!("`{key}` in `{CONFIG}` {why}"));
        if let Some(kind) = text("peft_type").filter(|kind| !kind.eq_ignore_ascii_case("lora")) {
            return refuse("peft_type", &format!("is `{kind}`; adapters of type `LORA` are run"));
        }
        if text("bias").is_some_and(|bias| bias != "none") {
            return refuse("bias", "is not `none`, and trained biases are not run");
        }
        if self.flag("fan_in_fan_out") {
            return refuse("fan_in_fan_out", "is true, which no linear layer of a decoder is");
        }
        let other = ["lora_bias", "layer_replication", "alora_invocation_tokens"];
        let more = ["trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora"];
        let variants = ["arrow_config", "kasa_config", "monteclora_config", "velora_config"];
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => true,
        };
        match other
            .iter()
            .chain(&more)
            .chain(&variants)
            .find(|key| self.0.get(**key).is_some_and(asks))
        {
            Some(key) => refuse(key, "asks for more than low-rank matrices, which is not run"),
            None => Ok(()),
        }
    }

    /// Whether modules were trained whole.
    fn saves_modules(&self) -> bool {
        let saved = self.0.get("modules_to_save").and_then(Value::as_array);
        saved.is_some_and(|saved| !saved.is_empty())
    }

    /// r and α of a module.
    fn rank_and_alpha(&self, module: &str) -> Result<(usize, f32), String> {
        let number = |key: &str, pattern: &str| {
            let own = self.pattern(pattern, module)?;
            let value = own.or(self.0.get(key)).and_then(Value::as_f64);
            value.ok_or_else(|| format!("`{CONFIG}` does not say the number `{key}`"))
        };
        let rank = number("r", "rank_pattern")?;
        Ok((rank as usize, number("lora_alpha", "alpha_pattern")? as f32))
    }

    /// A module's own value: that of the first key that is the end of its name, from a dot on.
    fn pattern(&self, key: &str, module: &str) -> Result<Option<&Value>, String> {
        let Some(patterns) = self.0.get(key).and_then(Value::as_object) else { return Ok(None) };
        for (pattern, value) in patterns {
            let (whole, name) = match pattern.strip_prefix('^') {
                Some(name) => (true, name),
                None => (false, pattern.as_str()),
            };
            let name = name.replace("\\.", ".");
            if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.') {
                return Err(format!(
                    "`{key}` in `{CONFIG}` has the expression `{pattern}`; bevel reads names of modules there"
                ));
            }
            let before = module.strip_suffix(&name);
            if before.is_some_and(|rest| rest.is_empty() || !whole && rest.ends_with('.')) {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

impl AdapterFile {
    /// Writes the adapter into a directory as PEFT has it, which is made where it is not there. `base` is what the
    /// model is called.
    ///
    /// # Errors
    /// Those of writing.
    ///
    /// # Panics
    /// Where the adapter is one of another model.
    pub fn write_peft(&self, dir: &Path, base: &str, config: &ModelConfig) -> Result<()> {
        let mut tensors = Vec::new();
        let mut modules = Vec::new();
        for (weight, matrix) in &self.matrices {
            let hf =
                config.hf_tensor(weight, "model.").expect("weights of linear layers have names");
            let module = hf.names[0].strip_suffix(".weight").unwrap_or(&hf.names[0]).to_owned();
            let (rank, dtype) = (matrix.rank, matrix.dtype);
            let (cols, rows) = (matrix.a.len() / rank, matrix.b.len() / rank);
            let b = regrouped(matrix.b.clone(), rank, hf.transform, config, false);
            for (kind, values, shape) in [(A, &matrix.a, [rank, cols]), (B, &b, [rows, rank])] {
                let name = format!("{PREFIX}{module}{kind}weight");
                let bytes = self.packed(&name, values, dtype)?;
                tensors.push((TensorSpec::new(name, dtype, shape), bytes));
            }
            if let Some(magnitude) = &matrix.magnitude {
                let values = regrouped(magnitude.clone(), 1, hf.transform, config, false);
                let name = format!("{PREFIX}{module}{}", MAGNITUDES[0]);
                let bytes = self.packed(&name, &values, DType::F32)?;
                tensors.push((TensorSpec::new(name, DType::F32, [rows]), bytes));
            }
            modules.push((module, matrix));
        }
        let mut saved = Vec::new();
        for (tensor, values) in &self.tensors {
            let hf = config.hf_tensor(tensor, "model.").expect("tensors of the model have names");
            let mut values = regrouped(values.to_vec(), config.dim, hf.transform, config, false);
            if hf.transform == Transform::PlusOne {
                values.iter_mut().for_each(|value| *value -= 1.0);
            }
            let shape = config.tensor_shape(tensor).expect("tensors of the model have shapes");
            saved.push(hf.names[0].strip_suffix(".weight").unwrap_or(&hf.names[0]).to_owned());
            // PEFT keeps a head that is the embedding beside it.
            let is_tied = config.tied && tensor == "token_embd.weight";
            let head = is_tied.then(|| "lm_head.weight".to_owned());
            for name in hf.names.iter().cloned().chain(head) {
                let name = format!("{PREFIX}{name}");
                let bytes = self.packed(&name, &values, DType::F32)?;
                tensors.push((TensorSpec::new(name, DType::F32, shape.clone()), bytes));
            }
        }
        std::fs::create_dir_all(dir)
            .map_err(|source| Error::Write { path: dir.display().to_string(), source })?;
        let metadata = IndexMap::from([("format".to_owned(), "pt".to_owned())]);
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let path = dir.join(WEIGHTS);
        let mut writer = safetensors::SafetensorsWriter::create(&path, &metadata, &specs, None)?;
        for (spec, bytes) in &tensors {
            writer.write(&spec.name, bytes)?;
        }
        writer.finish()?;
        let path = dir.join(CONFIG);
        let mut file = AtomicFile::create(&path)?;
        let settings = settings(base, &modules, &saved, config.tied);
        file.write_all(format!("{settings:#}\n").as_bytes())
            .map_err(|source| Error::Write { path: path.display().to_string(), source })?;
        file.finish()?;
        Ok(())
    }
}

/// `adapter_config.json`: what most modules have, and what others have instead.
fn settings(base: &str, modules: &[(String, &LowRank)], saved: &[String], tied: bool) -> Value {
    // One rule for all: an α of the other rule gives the same scale.
    let rank_stabilized = modules.first().is_some_and(|(_, matrix)| matrix.rank_stabilized);
    let alpha = |matrix: &LowRank| match matrix.rank_stabilized == rank_stabilized {
        true => matrix.alpha,
        false if rank_stabilized => matrix.scale() * (matrix.rank as f32).sqrt(),
        false => matrix.scale() * matrix.rank as f32,
    };
    let mut counts = BTreeMap::new();
    for (_, matrix) in modules {
        *counts.entry((matrix.rank, alpha(matrix).to_bits())).or_insert(0) += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count).map_or((8, 0), |(most, _)| most);
    let usual_alpha = f32::from_bits(most.1);
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    let mut targets = BTreeSet::new();
    for (module, matrix) in modules {
        targets.insert(module.rsplit('.').next().unwrap_or(module));
        if matrix.rank != most.0 {
            ranks.insert(module.clone(), json!(matrix.rank));
        }
        if alpha(matrix) != usual_alpha {
            alphas.insert(module.clone(), json!(alpha(matrix)));
        }
    }
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": most.0,
        "lora_alpha": usual_alpha,
        "use_rslora": rank_stabilized,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "ensure_weight_tying": tied && !saved.is_empty(),
        "use_dora": modules.iter().any(|(_, matrix)| matrix.magnitude.is_some()),
    })
}
