//! Readers and writers of model files. Nothing here runs a model.

#![forbid(unsafe_code)]

mod atomic;
mod error;
pub mod gguf;
pub mod hub;
pub mod imatrix;
pub mod parquet;
pub mod quantized;
pub mod records;
pub mod safetensors;
mod shards;
mod split;
mod stream;
mod tensor;
mod wrong_file;

pub use atomic::AtomicFile;
pub use error::{Error, Result};
pub use tensor::{TensorInfo, TensorSpec};
