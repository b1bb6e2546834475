//! What the target for quantized checkpoints does with its input; tests and fuzzer share it.

use std::path::Path;

use bevel_formats::quantized::Scheme;
use bevel_formats::safetensors::{Checkpoint, Header};

/// Reads every quantized module of a safetensors file that carries its own `config.json` under
/// `config` in its metadata.
pub(crate) fn quantized(bytes: &[u8]) {
    let Ok(header) = Header::parse(Path::new("fuzz.safetensors"), bytes) else { return };
    let Some(config) = header.metadata.get("config") else { return };
    let Ok(config) = serde_json::from_str(config) else { return };
    let Ok(Some(scheme)) = Scheme::from_config(&config, "config.json") else { return };
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), bytes).expect("a temporary file");
    let Ok(files) = Checkpoint::open(file.path()) else { return };
    for module in scheme.modules(&files).unwrap_or_default() {
        if let Ok(matrix) = scheme.read(&files, &module) {
            let mut row = vec![0.0; matrix.cols];
            matrix.dequantize_row(matrix.rows - 1, &mut row);
        }
    }
}
