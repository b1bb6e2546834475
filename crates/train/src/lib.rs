//! Training of decoder models, whole, in part, or by low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights of
//! any format: the forward pass that keeps what the backward pass needs, the backward pass, and AdamW (arXiv 1711.05101).
//!
//! What a layer's backward pass needs is kept, or computed again from the inputs of some layers (gradient
//! checkpointing, arXiv 1604.06174). Frozen weights are unpacked a tile at a time, so that a model takes what its file
//! does.

#![forbid(unsafe_code)]

pub mod data;
mod eight_bit;
mod error;
mod experts;
mod frozen;
mod layer;
mod linear;
mod log;
mod lora;
mod memory;
mod mlp;
mod network;
mod noise;
mod optimizer;
mod packed;
mod parameters;
mod peft;
mod preferences;
mod resume;
mod room;
mod rounding;
mod svd;
mod tensorboard;
mod tiles;
mod trainable;
mod trainer;
mod weight;

pub use bevel_kernels::linalg::Precision;
pub use error::{Error, Result};
pub use log::StepLog;
pub use lora::{Adapter, LoraConfig, Start, Target};
pub use memory::{Memory, MemoryUse};
pub use network::{Batch, Network, NetworkConfig, Noise, Recompute, Trained};
pub use optimizer::{Optimizer, OptimizerConfig, OptimizerKind};
pub use parameters::{Parameter, Parameters};
pub use peft::{start_from, write_adapter};
pub use rounding::{AsStored, Rounding, Ternary};
pub use tensorboard::EventWriter;
pub use trainable::Trainable;
pub use trainer::{Lessons, Schedule, StepReport, TrainConfig, Trainer, mean_loss, train};
