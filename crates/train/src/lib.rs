//! Training of decoder models on frozen weights of any format: the forward pass that keeps what the backward
//! pass needs, the backward pass, low-rank adapters (LoRA, arXiv 2106.09685) and AdamW (arXiv 1711.05101).
//!
//! Nothing is kept of a layer but its input: its backward pass computes the rest again (gradient checkpointing,
//! arXiv 1604.06174). Frozen weights are unpacked a tile at a time, so that a model takes what its file does.

#![forbid(unsafe_code)]

mod adamw;
pub mod data;
mod error;
mod frozen;
mod layer;
mod log;
mod lora;
mod network;
mod parameters;
mod peft;
mod tensorboard;
mod trainer;

pub use adamw::{AdamW, AdamWConfig};
pub use error::{Error, Result};
pub use frozen::Frozen;
pub use log::StepLog;
pub use lora::{LoraConfig, Target};
pub use network::{Batch, Network};
pub use parameters::{Parameter, Parameters};
pub use peft::write_adapter;
pub use tensorboard::EventWriter;
pub use trainer::{Schedule, StepReport, TrainConfig, mean_loss, train};
