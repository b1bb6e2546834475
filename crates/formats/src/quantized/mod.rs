//! Hugging Face directories whose linear layers are quantized: GPTQ, AWQ, compressed-tensors,
//! bitsandbytes, FP8 and MLX. `docs/formats` has a page for each.
//!
//! [`Scheme`] reads modules into [`GroupedMatrix`]; [`GroupedFormat`] writes them. When reading,
//! `config.json` says which format it is; what a module holds is decided by the tensors that are
//! there, and the numbers the configuration claims (bits, group size) are held against their
//! shapes, so that lists of exceptions, with or without regular expressions, need no interpreting.

mod awq;
mod bitsandbytes;
mod bitstream;
mod compressed_tensors;
mod encode;
mod format;
mod fp8;
mod gptq;
mod mlx;
mod module;
mod settings;

pub use format::{Codes, GroupedFormat, ModuleSpec};

use bevel_base::GroupedMatrix;
use serde_json::Value;

use crate::safetensors::Checkpoint;
use crate::{Error, Result};
use module::Module;
use settings::Settings;

/// How the linear layers of a checkpoint are quantized: what `quantization_config` in its
/// `config.json` says, or `quantization` in those for MLX.
#[derive(Clone, Debug)]
pub struct Scheme {
    format: Format,
    warnings: Vec<String>,
}

#[derive(Clone, Debug)]
enum Format {
    Gptq(gptq::Gptq),
    Awq(awq::Awq),
    CompressedTensors(compressed_tensors::CompressedTensors),
    BitsAndBytes(bitsandbytes::BitsAndBytes),
    Fp8(fp8::Fp8),
    Mlx(mlx::Mlx),
}

impl Scheme {
    /// Reads the scheme from a parsed `config.json`; `None` where the checkpoint is not quantized.
    /// `path` is used in messages.
    ///
    /// # Errors
    /// [`Error::Quantization`] where a field is missing or asks for what this build does not read.
    pub fn from_config(config: &Value, path: &str) -> Result<Option<Scheme>> {
        let wrong = |reason| Error::Quantization { path: path.into(), reason };
        // MLX repeats its own entry under the other name, without a method.
        let found = ["quantization", "quantization_config", "compression_config"]
            .map(|field| (field, config.get(field).filter(|value| !value.is_null())));
        let Some((field, settings)) = found.into_iter().find_map(|(f, value)| Some((f, value?)))
        else {
            return Ok(None);
        };
        let mut warnings = Vec::new();
        let settings = Settings::new(field, settings).map_err(wrong)?;
        let format = Format::from_settings(&settings, &mut warnings).map_err(wrong)?;
        Ok(Some(Scheme { format, warnings }))
    }

    /// The format in words: `GPTQ, 4 bits, groups of 128`.
    pub fn name(&self) -> String {
        match &self.format {
            Format::Gptq(format) => format.name(),
            Format::Awq(format) => format.name(),
            Format::CompressedTensors(format) => format.name(),
            Format::BitsAndBytes(_) => "bitsandbytes".to_owned(),
            Format::Fp8(_) => "FP8 (E4M3)".to_owned(),
            Format::Mlx(format) => format.name(),
        }
    }

    /// What the checkpoint asks for and a reader of the weights alone does not do, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The dimensions `[out, in]` of a module (`model.layers.0.self_attn.q_proj`) that is stored
    /// quantized; `None` where it is not, so that `MODULE.weight` is a plain tensor, or none at all.
    /// Touches headers and a few bytes of description.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the module's tensors do not fit together, [`Error::MissingTensor`].
    pub fn module_shape(&self, files: &Checkpoint, module: &str) -> Result<Option<[usize; 2]>> {
        let module = Module::new(files, module);
        match &self.format {
            Format::Gptq(format) => format.shape(&module),
            Format::Awq(format) => format.shape(&module),
            Format::CompressedTensors(format) => format.shape(&module),
            Format::BitsAndBytes(format) => format.shape(&module),
            Format::Fp8(format) => format.shape(&module),
            Format::Mlx(format) => format.shape(&module),
        }
    }

    /// The names of the stored tensors that make up the module's weight and how it is quantized,
    /// scales of activations included. Its `bias` is a plain tensor and not among them.
    pub fn module_tensors(&self, files: &Checkpoint, module: &str) -> Vec<String> {
        let names = self.parts().iter().map(|part| format!("{module}.{part}"));
        let mut names: Vec<String> =
            names.filter(|name| files.tensors().contains_key(name)).collect();
        if matches!(self.format, Format::BitsAndBytes(_)) {
            let prefix = format!("{module}.weight.");
            let tensors = files.tensors().keys();
            names.extend(tensors.filter(|name| name.starts_with(&prefix)).cloned());
        }
        names
    }

    /// The modules that are stored quantized, in the order of their data.
    ///
    /// # Errors
    /// Those of [`Scheme::module_shape`].
    pub fn modules(&self, files: &Checkpoint) -> Result<Vec<String>> {
        let mut modules = Vec::new();
        for name in files.tensors().keys() {
            let marks = ["qweight", "weight_packed", "weight"];
            let parts = name.rsplit_once('.').filter(|(_, part)| marks.contains(part));
            if let Some((module, _)) = parts
                && self.module_shape(files, module)?.is_some()
            {
                modules.push(module.to_owned());
            }
        }
        Ok(modules)
    }

    /// Reads a module that [`Scheme::module_shape`] knows.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the module's tensors do not fit together, [`Error::MissingTensor`].
    pub fn read(&self, files: &Checkpoint, module: &str) -> Result<GroupedMatrix> {
        let module = Module::new(files, module);
        let matrix = match &self.format {
            Format::Gptq(format) => format.read(&module),
            Format::Awq(format) => format.read(&module),
            Format::CompressedTensors(format) => format.read(&module),
            Format::BitsAndBytes(format) => format.read(&module),
            Format::Fp8(format) => format.read(&module),
            Format::Mlx(format) => format.read(&module),
        }?;
        matrix.checked().map_err(|error| module.error(self.parts()[0], error.to_string()))
    }

    /// The last parts of the names that a module's tensors may have, the weight's first.
    fn parts(&self) -> &'static [&'static str] {
        match &self.format {
            Format::Gptq(_) => gptq::PARTS,
            Format::Awq(_) => awq::PARTS,
            Format::CompressedTensors(_) => compressed_tensors::PARTS,
            Format::BitsAndBytes(_) => bitsandbytes::PARTS,
            Format::Fp8(_) => fp8::PARTS,
            Format::Mlx(_) => mlx::PARTS,
        }
    }
}

/// What is read, for messages.
const SUPPORTED: &str = "bevel reads `gptq`, `awq`, `compressed-tensors`, `bitsandbytes`, `fp8`, `fbgemm_fp8` and MLX's own";

impl Format {
    fn from_settings(settings: &Settings<'_>, warnings: &mut Vec<String>) -> Result<Self, String> {
        let Some(method) = settings.text("quant_method")? else {
            if settings.has("group_size") && settings.has("bits") {
                return mlx::Mlx::from_settings(settings).map(Format::Mlx);
            }
            return Err(settings.wrong("quant_method", &format!("is missing; {SUPPORTED}")));
        };
        Ok(match method {
            "gptq" => Format::Gptq(gptq::Gptq::from_settings(settings)?),
            "awq" => Format::Awq(awq::Awq::from_settings(settings)?),
            "compressed-tensors" => Format::CompressedTensors(
                compressed_tensors::CompressedTensors::from_settings(settings, warnings)?,
            ),
            "bitsandbytes" => Format::BitsAndBytes(bitsandbytes::BitsAndBytes),
            "fp8" | "fbgemm_fp8" => Format::Fp8(fp8::Fp8::from_settings(settings, warnings)?),
            other => {
                let reason = format!("is `{other}`; {SUPPORTED}");
                return Err(settings.wrong("quant_method", &reason));
            }
        })
    }
}
