//! Checkpoints whose linear layers are quantized.

mod reading;
mod writing;

use bevel_formats::quantized::Scheme;
use bevel_formats::safetensors::Checkpoint;

use crate::support::golden;

/// Opens the goldens of a format.
fn open(format: &str) -> Checkpoint {
    Checkpoint::open(&golden(&format!("quantized/{format}.safetensors"))).unwrap()
}

/// What the configuration of a golden's module says.
fn scheme(files: &Checkpoint, module: &str) -> Scheme {
    let config = &files.metadata()[&format!("config.{module}")];
    let config = serde_json::from_str(config).unwrap();
    Scheme::from_config(&config, "config.json").unwrap().expect("a quantized checkpoint")
}
