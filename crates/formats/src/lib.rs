//! Readers and writers of model files. Nothing here runs a model.

pub mod gguf;
