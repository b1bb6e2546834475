//! Perplexity and divergence against naive computations on the embedded model, uncertainty on known
//! numbers, and the shape of a benchmark's results.

mod bench;
mod choices;
mod divergence;
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

/// The small model after `change` was applied to each of its weights, bfloat16 as bits, in file order.
pub(crate) fn changed(change: impl Fn(usize, u16) -> u16) -> Model {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(file), dir.path().join(file)).unwrap();
    }
    let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for (i, weight) in bytes[8 + header..].as_chunks_mut().0.iter_mut().enumerate() {
        *weight = change(i, u16::from_le_bytes(*weight)).to_le_bytes();
    }
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let cpu = Cpu::new(2).unwrap();
    Model::load(Checkpoint::open(dir.path()).unwrap(), &cpu, &mut |_| ()).unwrap()
}

/// Prose that the model has never seen.
pub(crate) const PROSE: &str = include_str!("../../../../assets/tour.txt");
