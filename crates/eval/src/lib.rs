//! How well a model predicts text, and how fast it runs.

#![forbid(unsafe_code)]

mod bench;
mod error;
mod machine;
mod perplexity;
mod statistics;
mod text;

pub use bench::{Bench, BenchConfig, BenchStep, Series};
pub use error::{Error, Result};
pub use machine::{Machine, peak_memory};
pub use perplexity::{Perplexity, PerplexityConfig, Running, Windows, nats};
pub use statistics::{Mean, Spread};
pub use text::Text;
