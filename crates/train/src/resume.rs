//! A run that was stopped goes on where it was: `checkpoint.safetensors` holds the parameters, the optimizer's state, and
//! where in the run it was.

use std::path::Path;

use bevel_base::DType;
use bevel_formats::TensorSpec;
use bevel_formats::safetensors::{Checkpoint, SafetensorsWriter};
use indexmap::IndexMap;
use serde_json::{Value, json};

use crate::trainer::{Best, Trainer};
use crate::{Error, Parameters, Result};

/// The member of the file's metadata that says where the run was.
const KEY: &str = "bevel.training";

impl Trainer<'_> {
    /// Writes a checkpoint, in the place of one that is there once it is whole. `settings` are whatever must not change
    /// between this run and the one that goes on.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn save(&self, parameters: &Parameters, settings: &str, path: &Path) -> Result<()> {
        let best = self.best.as_ref();
        let place = json!({
            "settings": settings,
            "step": self.step,
            "optimizer_steps": self.optimizer.steps(),
            "worse": self.worse,
            // As bits: a loss has to come back as it was.
            "best": best.map(|best| json!({ "step": best.step, "loss": best.loss.to_bits() })),
        });
        let metadata = IndexMap::from([(KEY.to_owned(), place.to_string())]);
        let mut parts: Vec<(&str, &[u8])> =
            vec![("values", bytemuck::cast_slice(&parameters.values))];
        if let Some(best) = best.filter(|best| !best.values.is_empty()) {
            parts.push(("best", bytemuck::cast_slice(&best.values)));
        }
        parts.extend(self.optimizer.parts());
        let spec = |(name, bytes): &(&str, &[u8])| TensorSpec {
            name: (*name).to_owned(),
            dtype: DType::U8,
            shape: [bytes.len()].into(),
        };
        let specs: Vec<TensorSpec> = parts.iter().map(spec).collect();
        let mut writer = SafetensorsWriter::create(path, &metadata, &specs, None)?;
        for (name, bytes) in parts {
            writer.write(name, bytes)?;
        }
        writer.finish()?;
        Ok(())
    }

    /// Goes on where a checkpoint was written: the steps from here on are those that the other run would have done, to
    /// the bit.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it is of a run with other settings, or no checkpoint, and those of reading.
    pub fn resume(
        &mut self,
        parameters: &mut Parameters,
        settings: &str,
        path: &Path,
    ) -> Result<()> {
        let refused = |reason: &str| Error::Checkpoint {
            path: path.display().to_string(),
            reason: reason.to_owned(),
        };
        let file = Checkpoint::open(path)?;
        let place = file.metadata().get(KEY).and_then(|text| serde_json::from_str(text).ok());
        let place: Value = place.ok_or_else(|| refused("it is no checkpoint of training"))?;
        if place["settings"].as_str() != Some(settings) {
            return Err(refused(
                "it is of a run with another model, other data or other options; give the same ones, or begin anew with --force",
            ));
        }
        let number = |value: &Value| value.as_u64().ok_or_else(|| refused("it is damaged"));
        let copy = |name: &str, out: &mut [u8]| {
            let data = file.data(name).filter(|data| data.len() == out.len());
            out.copy_from_slice(data.ok_or_else(|| refused("it is of another size"))?);
            Ok(())
        };
        copy("values", bytemuck::cast_slice_mut(&mut parameters.values))?;
        self.optimizer.restore(number(&place["optimizer_steps"])?, copy)?;
        self.best = None;
        if !place["best"].is_null() {
            let mut values = Vec::new();
            if file.data("best").is_some() {
                values = vec![0.0; parameters.values.len()];
                copy("best", bytemuck::cast_slice_mut(&mut values))?;
            }
            let (step, loss) = (number(&place["best"]["step"])?, number(&place["best"]["loss"])?);
            self.best = Some(Best { step: step as usize, loss: f64::from_bits(loss), values });
        }
        self.worse = number(&place["worse"])? as usize;
        self.skip_to(number(&place["step"])? as usize);
        Ok(())
    }
}
