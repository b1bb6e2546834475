//! Training of decoder models on frozen weights of any format: the forward pass that keeps what the backward
//! pass needs, the backward pass, low-rank adapters (LoRA, arXiv 2106.09685) and AdamW (arXiv 1711.05101).
//!
//! What a layer's backward pass needs is kept, or computed again from the inputs of some layers (gradient
//! checkpointing, arXiv 1604.06174). Frozen weights are unpacked a tile at a time, so that a model takes what its file
//! does.

#![forbid(unsafe_code)]

mod adamw;
pub mod data;
mod error;
mod frozen;
mod layer;
mod linear;
mod log;
mod lora;
mod network;
mod noise;
mod parameters;
mod peft;
mod room;
mod svd;
mod tensorboard;
mod trainable;
mod trainer;
mod weight;

pub use adamw::{AdamW, AdamWConfig};
pub use bevel_kernels::linalg::Precision;
pub use error::{Error, Result};
pub use frozen::Frozen;
pub use log::StepLog;
pub use lora::{Adapter, LoraConfig, Start, Target};
pub use network::{Batch, Network, NetworkConfig, Noise, Recompute};
pub use parameters::{Parameter, Parameters};
pub use peft::write_adapter;
pub use tensorboard::EventWriter;
pub use trainable::Trainable;
pub use trainer::{Schedule, StepReport, TrainConfig, mean_loss, train};
