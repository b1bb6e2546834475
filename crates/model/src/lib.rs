//! Decoder models: configuration, weights, the forward pass over a paged batch, tokenizer and chat
//! template. Families are data ([`Family`]); the forward pass exists once.

#![forbid(unsafe_code)]

mod adapter;
mod block;
mod cache;
pub mod chat;
mod checkpoint;
mod config;
mod error;
mod family;
mod forward;
mod head;
mod linear;
mod mlp;
mod sampler;
mod session;
mod stop;
mod tap;
pub mod tokenizer;
mod weights;

pub use adapter::{Adapter, AdapterFile, LowRank, ScaledAdapter, is_saved_whole};
pub use block::{Block, BlockState, Precision};
pub use cache::{KvCache, Sequence};
pub use checkpoint::{Checkpoint, Entry, HfTensor, Place, Transform, regroup_rows, source_row};
pub use config::{Experts, ModelConfig, RopeConfig, RopeScaling};
pub use error::{Error, Result};
pub use family::{Activation, FAMILIES, Family, NormPlacement, QkNorm, TensorName};
pub use forward::{Batch, Model, Part, State};
pub use head::{Head, HeadState};
pub use mlp::{Visit, route};
pub use sampler::{Choice, Dry, Sampler, SamplerConfig, SamplerScratch, TokenLogprobs};
pub use session::{FinishReason, GenerateOptions, Generation, PREFILL_CHUNK, Session, generate};
pub use stop::StopText;
pub use tap::{Site, Stage, Tap};
pub use weights::{StepCost, Weights};
