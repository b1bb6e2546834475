//! Conversion and quantization of models: tensor by tensor from an opened
//! [`Checkpoint`](bevel_model::Checkpoint) to a file or directory that appears when it is complete.
//!
//! A [`Recipe`] says what every tensor becomes and how. [`Preview`] applies it to a model, which costs
//! nothing; [`quantize`] and [`convert`] carry it out and [`Report`] what happened. Every output
//! carries its recipe, its source's hash and bevel's version, and is a function of these alone, and
//! of the [`Calibration`] where the recipe asks for one: not of the number of threads. Without
//! calibration it is not one of the machine either; with it, the forward pass of another instruction
//! set rounds differently.

#![forbid(unsafe_code)]

mod allocate;
mod calibrated;
mod calibration;
mod convert;
mod directory;
mod error;
mod gather;
mod gguf;
mod grouping;
mod importance;
mod inspect;
mod method;
mod mix;
mod output;
mod plan;
mod preview;
mod progress;
mod provenance;
mod recipe;
mod report;
pub mod solve;
mod stats;
mod times;
mod transcode;
mod walk;

pub use allocate::{AllocatedTensor, Allocation, Budget, Limit, TypeOption, allocate};
pub use calibration::{Calibration, CalibrationConfig, Fetch, OnTokens, Source};
pub use convert::{Target, convert};
pub use error::{Error, Result};
pub use gather::gather_imatrix;
pub(crate) use gguf::rotated;
pub use gguf::{check_output, quantize};
pub use grouping::{CodeType, FormatName};
pub use importance::ImatrixFile;
pub use inspect::{
    BrokenTensor, Container, Dimensions, Inspection, Memory, StoredTensor, TokenizerSummary,
    TypeSummary, check, inspect,
};
pub use method::{GptqSettings, Method};
pub use mix::{MIXES, Mix};
pub use output::Options;
pub use preview::{Preview, PreviewedTensor};
pub use progress::{OnProgress, Progress, Stage};
pub use provenance::{Provenance, VERSION};
pub use recipe::{Base, Override, Recipe, tensor_type};
pub use report::{Report, Shown, Storage, TensorReport, Totals};
pub use stats::{Needs, Stats};
pub use times::Times;
