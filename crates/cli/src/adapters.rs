//! Adapters that a command line names.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Result;
use bevel_kernels::Cpu;
use bevel_model::{Adapter, AdapterFile, Checkpoint, Model, ScaledAdapter};

/// Options of verbs that run a model, or make another one of it.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Adapters {
    /// Add a low-rank adapter to the model, a directory as PEFT has it or a GGUF file, SCALE times as strongly as
    /// it was trained for; repeatable
    #[arg(long = "adapter", value_name = "PATH[=SCALE]")]
    pub(crate) named: Vec<Named>,
}

/// An adapter as it is named.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Named {
    pub(crate) path: PathBuf,
    pub(crate) scale: f32,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.rsplit_once('=').and_then(|(path, scale)| {
            let scale = scale.parse().ok().filter(|scale: &f32| scale.is_finite())?;
            Some((path, scale))
        });
        // A path may have a `=` of its own.
        let (path, scale) = split.unwrap_or((text, 1.0));
        if path.is_empty() {
            return Err("expected a path, such as adapter or adapter=0.5".to_owned());
        }
        Ok(Self { path: path.into(), scale })
    }
}

impl Named {
    /// Reads it, to run beside a model.
    pub(crate) fn load(&self, model: &Checkpoint, cpu: &Cpu) -> Result<ScaledAdapter> {
        let adapter = Arc::new(Adapter::open(&self.path, model, cpu)?);
        Ok(ScaledAdapter { adapter, scale: self.scale })
    }
}

impl Adapters {
    /// Reads all of them.
    pub(crate) fn open(&self, model: &Checkpoint) -> Result<Opened> {
        let open = |named: &Named| {
            Ok((Arc::new(AdapterFile::open(&named.path, model.config())?), named.scale))
        };
        Ok(Opened(self.named.iter().map(open).collect::<Result<_>>()?))
    }

    /// The checkpoint with the adapters merged into it.
    pub(crate) fn merged(&self, checkpoint: Checkpoint) -> Result<Checkpoint> {
        self.named.iter().try_fold(checkpoint, |checkpoint, named| {
            let file = AdapterFile::open(&named.path, checkpoint.config())?;
            Ok(checkpoint.adapted(Arc::new(file), named.scale))
        })
    }
}

/// Adapters that were read, to run beside a model.
pub(crate) struct Opened(Vec<(Arc<AdapterFile>, f32)>);

impl Opened {
    /// The checkpoint with their whole tensors, which cannot run beside the model's own.
    pub(crate) fn replacing(&self, checkpoint: Checkpoint) -> Checkpoint {
        let whole = self.0.iter().filter(|(file, _)| !file.tensors().is_empty());
        whole.fold(checkpoint, |checkpoint, (file, scale)| {
            checkpoint.adapted(Arc::new(file.without_matrices()), *scale)
        })
    }

    /// The model of [that checkpoint](Opened::replacing) with the rest of them beside it.
    pub(crate) fn beside(&self, model: Model, cpu: &Cpu) -> Result<Model> {
        let load = |(file, scale): &(Arc<AdapterFile>, f32)| {
            let adapter = Arc::new(Adapter::new(file, model.checkpoint(), cpu)?);
            Ok(ScaledAdapter { adapter, scale: *scale })
        };
        let adapters = self.0.iter().map(load).collect::<Result<_>>()?;
        Ok(model.with_adapters(adapters))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_a_number_behind_the_path() {
        for (text, path, scale) in
            [("a/b", "a/b", 1.0), ("a=0.5", "a", 0.5), ("a=b", "a=b", 1.0), ("a=b=-2", "a=b", -2.0)]
        {
            assert_eq!(text.parse(), Ok(Named { path: path.into(), scale }));
        }
        assert!("=1".parse::<Named>().is_err() && "".parse::<Named>().is_err());
    }
}
