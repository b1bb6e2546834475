//! safetensors: the Hugging Face format for tensors. One file, or shards with an index.
//! `docs/formats/safetensors.md` shows the layout.

mod checkpoint;
mod header;
mod writer;

pub use checkpoint::{Checkpoint, parse_index};
pub use header::Header;
pub use writer::SafetensorsWriter;

/// The file in a model's directory that holds all tensors.
const SINGLE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
const INDEX: &str = "model.safetensors.index.json";
/// The header's key that is not a tensor.
const METADATA: &str = "__metadata__";
