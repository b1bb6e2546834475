//! GGUF: llama.cpp's format. Versions 2 and 3 are read, version 3 is written; a model may be split
//! into shards. `docs/formats/gguf.md` shows the layout.

mod file;
mod header;
mod types;
mod value;
mod writer;

pub use file::GgufFile;
pub use header::Header;
pub use types::{ggml_type_id, ggml_type_of};
pub use value::{Array, Metadata, Value};
pub use writer::GgufWriter;

/// Every file begins with it.
const MAGIC: &[u8] = b"GGUF";
/// The version written.
const VERSION: u32 = 3;
/// Tensor data starts at multiples of this many bytes unless [`ALIGNMENT_KEY`] says otherwise.
const DEFAULT_ALIGNMENT: u32 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// As in ggml, `GGML_MAX_DIMS`.
const MAX_DIMS: usize = 4;

/// Keys of shards, as llama.cpp's `gguf-split` writes them.
const SPLIT_NUMBER: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";
