//! Many conversations with one model at a time: a block manager after PagedAttention, a scheduler that
//! batches continuously, and an engine that joins them with the model, samplers and text.
//!
//! It knows neither sockets nor async: a server calls [`Engine::submit`] and [`Engine::step`] on a thread of
//! its own.

#![forbid(unsafe_code)]

pub mod blocks;
mod engine;
mod error;
mod grammar;
mod request;
pub mod scheduler;
mod stream;
mod swap;

pub use engine::{Engine, EngineConfig, Metrics, Swap};
pub use error::{Error, Result};
pub use grammar::{Constraint, Grammar, GrammarError, Grammars};
pub use request::{
    Beams, End, EndReason, Output, OutputToken, Pooling, Refused, Request, RequestId, Stopping,
};
