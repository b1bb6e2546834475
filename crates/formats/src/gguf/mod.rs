//! GGUF version 3: llama.cpp's single-file model format.

mod value;

pub use value::{Array, Metadata, Value};
