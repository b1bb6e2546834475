//! Conversion and round-to-nearest quantization of models: tensor by tensor from an opened
//! [`Checkpoint`](bevel_model::Checkpoint) to a file that appears when it is complete.
//!
//! A [`Recipe`] says which type every tensor gets. [`Plan`] applies it to a model, which costs
//! nothing; [`quantize`] and [`convert`] carry it out and [`Report`] what happened. Every output
//! carries its recipe, its source's hash and bevel's version, and is a function of these alone:
//! not of the machine, nor of the number of threads.

#![forbid(unsafe_code)]

mod calibrated;
mod calibration;
mod convert;
mod directory;
mod error;
mod gguf;
mod grouping;
mod inspect;
mod method;
mod mix;
mod output;
mod pattern;
mod plan;
mod progress;
mod provenance;
mod recipe;
mod report;
pub mod solve;
mod stats;
mod transcode;
mod walk;

pub use calibration::{Calibration, CalibrationConfig, Fetch, OnTokens, Source};
pub use convert::{Target, convert};
pub use error::{Error, Result};
pub use gguf::quantize;
pub(crate) use gguf::rotated;
pub use grouping::{CodeType, FormatName};
pub use inspect::{
    BrokenTensor, Container, Dimensions, Inspection, Memory, StoredTensor, TokenizerSummary,
    TypeSummary, check, inspect,
};
pub use method::{GptqSettings, Method};
pub use mix::{MIXES, Mix};
pub use output::Options;
pub use plan::{Plan, PlannedTensor};
pub use progress::{OnProgress, Progress, Stage};
pub use provenance::{Provenance, VERSION};
pub use recipe::{Base, Override, Recipe};
pub use report::{Report, Storage, TensorReport, Totals};
pub use stats::{Needs, Stats};
