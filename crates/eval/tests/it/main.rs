//! Perplexity against a naive computation on the embedded model, uncertainty on known numbers, and
//! the shape of a benchmark's results.

mod bench;
mod perplexity;
mod statistics;

use std::path::Path;

use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Model};

/// The small model in the repository.
pub(crate) fn tiny_austen() -> (Model, Tokenizer, Cpu) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let cpu = Cpu::new(2).unwrap();
    let model = Model::load(Checkpoint::open(&dir).unwrap(), &cpu, &mut |_| ()).unwrap();
    (model, Tokenizer::from_hf(&dir).unwrap(), cpu)
}

/// Prose that the model has never seen.
pub(crate) const PROSE: &str = include_str!("../../../../assets/tour.txt");
