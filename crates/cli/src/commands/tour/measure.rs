//! One model's figures.

use std::ops::ControlFlow;

use anyhow::Result;
use bevel_eval::{BenchConfig, PerplexityConfig, Text, Windows};
use bevel_kernels::{Cpu, KvType};
use bevel_model::chat::{Message, TemplateError};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, GenerateOptions, Model, SamplerConfig, Session, generate};

use crate::args::Global;
use crate::report::{Share, Variant};
use crate::ui::progress::{Progress, Unit};

/// The embedded text.
const TEXT: &str = include_str!("../../../../../assets/tour.txt");

/// What it is, for the report.
pub(super) const TEXT_NAME: &str = "Pride and Prejudice, from the first chapter on";

/// Tokens of a window.
pub(super) const CONTEXT: usize = 512;

/// Temperature of the samples.
const TEMPERATURE: f32 = 0.7;

/// How much is measured.
pub(super) struct Effort {
    /// Smaller models beside the original.
    pub(super) variants: usize,
    /// Windows of text.
    windows: usize,
    /// Tokens of the benchmark's prompt.
    prompt: usize,
    /// Tokens it generates.
    decode: usize,
    repetitions: usize,
}

impl Effort {
    pub(super) const FULL: Self =
        Self { variants: 3, windows: 12, prompt: 256, decode: 48, repetitions: 3 };
    pub(super) const QUICK: Self =
        Self { variants: 2, windows: 3, prompt: 64, decode: 16, repetitions: 2 };
}

/// What every model is asked, so that answers can be compared.
pub(super) struct Prompt {
    pub(super) text: String,
    tokens: Vec<u32>,
}

impl Prompt {
    /// A question for a model that was trained to answer, else a sentence to go on with.
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        match tokenizer.chat_template(false) {
            Ok(template) => {
                let text = "What makes a good letter? Answer in two sentences.";
                let messages = [Message::new("user", text)];
                let rendered = template.render(&messages, None, true, Default::default())?;
                let tokens = tokenizer.encode(&rendered, false, true)?;
                Ok(Self { text: text.to_owned(), tokens })
            }
            Err(TemplateError::Missing) => {
                let text = "It is a truth universally acknowledged, that";
                Ok(Self { text: text.to_owned(), tokens: tokenizer.encode(text, true, false)? })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Loads a model and measures it. All variants of a model have its tokenizer.
pub(super) fn variant(
    name: &str,
    checkpoint: Checkpoint,
    cpu: &Cpu,
    prompt: &Prompt,
    effort: &Effort,
    global: &Global,
) -> Result<Variant> {
    let tokenizer = crate::model::tokenizer(&checkpoint, global)?;
    let bar = Progress::new(global, "loading", checkpoint.tensor_bytes(), Unit::Bytes);
    let model = Model::load(checkpoint, cpu, &mut |bytes| bar.set(bytes))?;
    drop(bar);

    let context = CONTEXT.min(model.config().context);
    let mut text = Text::encode(&tokenizer, TEXT)?;
    text.truncate(effort.windows * context);
    let bar =
        Progress::new(global, &format!("evaluating {name}"), text.tokens.len() as u64, Unit::Items);
    let config = PerplexityConfig { context, windows: Windows::HalfWindow, kv_type: KvType::F16 };
    let perplexity = config.run(&model, cpu, &text, &mut |running| {
        bar.set_total(running.total as u64);
        bar.set(running.done as u64);
        if let Some(perplexity) = running.perplexity {
            bar.message(format!("perplexity {perplexity:.2}"));
        }
    })?;
    drop(bar);

    let bar = Progress::new(global, &format!("timing {name}"), 0, Unit::Items);
    let bench = BenchConfig {
        prompt: effort.prompt,
        decode: effort.decode,
        sequences: 1,
        repetitions: effort.repetitions,
        depth: 0,
        context: None,
        kv_type: KvType::F16,
    };
    let bench = bench.run(&model, cpu, &mut |step| {
        bar.set_total(step.total as u64);
        bar.set(step.done as u64);
        bar.message(step.what);
    })?;
    drop(bar);

    // The same random numbers for all, so that what differs is the model.
    let sampler = SamplerConfig {
        temperature: TEMPERATURE,
        top_p: 0.95,
        seed: global.seed.unwrap_or(1),
        ..SamplerConfig::default()
    };
    let options = GenerateOptions { max_tokens: Some(60), sampler, ..GenerateOptions::default() };
    let room = (prompt.tokens.len() + 60).min(model.config().context);
    let mut session = Session::new(&model, cpu, room, KvType::F16)?;
    let sample = generate(&mut session, &tokenizer, &prompt.tokens, &options, &mut |_| {
        ControlFlow::Continue(())
    })?;

    let checkpoint = model.checkpoint();
    let bytes = checkpoint.tensor_bytes();
    Ok(Variant {
        name: name.to_owned(),
        bytes,
        bits_per_weight: bytes as f64 * 8.0 / checkpoint.parameters().max(1) as f64,
        shares: Share::of(checkpoint),
        perplexity,
        bench,
        quantize_seconds: None,
        warnings: Vec::new(),
        sample: sample.text,
    })
}
