//! Tests of the formats, one module per feature.

mod atomic;
mod bad_gguf;
mod bad_safetensors;
#[path = "../../../../fuzz/quantized.rs"]
mod fuzz_quantized;
mod gguf;
mod hub;
mod imatrix;
mod parquet;
mod quantized;
#[path = "../../../../fuzz/replay.rs"]
mod replay;
mod safetensors;
mod support;
mod targets;

#[global_allocator]
static ALLOCATOR: replay::Counting = replay::Counting;
