//! The library facade of bevel: its crates under one name.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use bevel::kernels::{Cpu, KvType};
//! use bevel::model::{Checkpoint, GenerateOptions, Model, Session, generate, tokenizer::Tokenizer};
//!
//! let cpu = Cpu::new(0)?;
//! let checkpoint = Checkpoint::open("model.gguf".as_ref())?;
//! let tokenizer = Tokenizer::from_gguf(checkpoint.gguf_metadata().ok_or("no GGUF file")?)?;
//! let model = Model::load(checkpoint, &cpu, &mut |_| ())?;
//! let mut session = Session::new(&model, &cpu, 1024, KvType::F16)?;
//! let prompt = tokenizer.encode("It is a truth universally acknowledged", true, false)?;
//! let options = GenerateOptions { max_tokens: Some(50), ..Default::default() };
//! generate(&mut session, &tokenizer, &prompt, &options, &mut |text| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

pub use bevel_base as base;
pub use bevel_compress as compress;
pub use bevel_engine as engine;
pub use bevel_eval as eval;
pub use bevel_formats as formats;
pub use bevel_kernels as kernels;
pub use bevel_model as model;
pub use bevel_server as server;
pub use bevel_train as train;
