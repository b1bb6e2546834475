//! How well a model predicts text, how far it has moved from another one, and how fast it runs.

#![forbid(unsafe_code)]

mod bench;
mod choices;
mod divergence;
mod error;
mod machine;
mod perplexity;
mod statistics;
mod text;
mod vocabulary;
mod windows;

pub use bench::{Bench, BenchConfig, BenchStep, Limits, Series};
pub use choices::{
    Accuracy, Agreement, Answer, Ask, Choices, ChoicesConfig, Encoded, Question, Subject,
};
pub use divergence::{BaseLogits, Divergence, DivergenceConfig, Estimate, ModelDigest, Quantiles};
pub use error::{Error, Result};
pub use machine::{Machine, available_memory, peak_memory};
pub use perplexity::{Perplexity, PerplexityConfig, Running, nats};
pub use statistics::{Mean, Spread};
pub use text::Text;
pub use vocabulary::check_vocabulary;
pub use windows::Windows;
