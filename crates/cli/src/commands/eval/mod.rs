//! `bevel eval`: perplexity on a text, divergence from another model, and multiple choice.

mod choices;
mod divergence;
mod file;
mod perplexity;

pub(crate) use divergence::Output as Compared;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use bevel_eval::Text;
use bevel_model::tokenizer::Tokenizer;

use crate::adapters::{Adapters, Named};
use crate::args::Global;
use crate::sampling::{Kv, KvName, Products};
use crate::text;

const EXPLANATION: &str = "\
Perplexities are comparable only between equal conventions, windows and texts.

By default the text is cut as llama.cpp's perplexity tool does it: consecutive windows of --ctx tokens, \
each beginning with the model's begin-of-text token if it has one, the second half of each scored. \
With --stride N windows overlap, as in the Hugging Face documentation: each begins N tokens after the \
one before and scores the tokens that are new. Small strides give every token more context, and take \
longer.

--against BASE tells how far MODEL's predictions have moved from BASE's, in the statistics of llama.cpp's \
--kl-divergence. BASE is a model, which runs beside MODEL, or a file of its predictions: one that \
--base-logits wrote or llama.cpp's. With --base-logits FILE the base runs once and its predictions \
are kept there, two bytes for each token of the vocabulary and scored token of the text; further \
models are compared with them without running the base. `--against MODEL --base-kv f16 --kv q4_0` tells \
what storing keys and values in fewer bits does to a model, `--against MODEL --base-exact` what \
rounding activations does, `--against MODEL --base-adapter DIR` how far a merged model lies from the adapted one.

--choices FILE asks questions: each line a JSON object such as
    {\"question\": \"...\", \"choices\": [\"...\", \"...\"], \"answer\": 1, \"subject\": \"history\"}
with the answer counted from 0, or as a letter from A. `prompt` instead of `question` is used as it is; \
a question is asked as `Question: ...` and `Answer:` on two lines. The choice with the greatest \
log-likelihood counts, as it is (acc) and divided by its bytes (acc_norm).";

/// Options of `bevel eval`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// The text to predict, UTF-8; `-` is stdin
    #[arg(long, value_name = "FILE", required_unless_present = "choices")]
    text: Option<PathBuf>,

    /// Tokens of a window [default: 512; of --choices: as many as are needed]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    ctx: Option<usize>,

    /// Overlapping windows that begin N tokens apart
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with = "llama")]
    stride: Option<usize>,

    /// llama.cpp's convention, which is the default
    #[arg(long)]
    llama: bool,

    /// Use the first N tokens of the text only
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    tokens: Option<usize>,

    /// Compare with this model's predictions, or with those in a file
    #[arg(long, value_name = "BASE", conflicts_with = "stride")]
    against: Option<String>,

    /// Keep the base's predictions in this file, or use those that are there
    #[arg(long, value_name = "FILE", requires = "against", conflicts_with = "choices")]
    base_logits: Option<PathBuf>,

    /// Storage of the base's keys and values [default: that of --kv]
    #[arg(long, value_name = "TYPE", requires = "against", conflicts_with = "choices")]
    base_kv: Option<KvName>,

    /// Add an adapter to the base, as --adapter does to the model; repeatable
    #[arg(long, value_name = "PATH[=SCALE]", requires = "against", conflicts_with = "base_logits")]
    base_adapter: Vec<Named>,

    /// Answer the multiple-choice questions of this JSONL file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "stride", "llama", "tokens"])]
    choices: Option<PathBuf>,

    /// Ask through the model's chat template
    #[arg(long, requires = "choices")]
    chat: bool,

    /// Run the base as with --exact
    #[arg(long, requires = "against", conflicts_with = "choices")]
    base_exact: bool,

    #[command(flatten)]
    adapters: Adapters,

    #[command(flatten)]
    products: Products,

    #[command(flatten)]
    kv: Kv,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    match (&args.choices, &args.against) {
        (Some(questions), _) => choices::run(args, questions, global),
        (None, Some(base)) => divergence::run(args, base, global),
        (None, None) => perplexity::run(args, global),
    }
}

impl Args {
    /// The base's adapters.
    fn base_adapters(&self) -> Adapters {
        Adapters { named: self.base_adapter.clone() }
    }

    /// Tokens of a window over a text.
    fn window(&self) -> usize {
        self.ctx.unwrap_or(512)
    }

    /// Where the text comes from.
    fn source(&self) -> PathBuf {
        self.text.clone().unwrap_or_else(|| "-".into())
    }

    /// Reads the text to predict.
    fn read(&self) -> Result<String> {
        let source = self.source();
        let content = text::read(&source)?;
        ensure!(!content.is_empty(), "`{}` is empty", source.display());
        Ok(content)
    }

    /// Cuts the text to predict into tokens.
    fn encode(&self, tokenizer: &Tokenizer, content: &str) -> Result<Text> {
        let mut text = Text::encode(tokenizer, content)?;
        if let Some(count) = self.tokens {
            text.truncate(count);
        }
        Ok(text)
    }
}

/// Warns of windows that are longer than what a model has seen.
fn warn_of_long_windows(window: usize, trained: usize, global: &Global) {
    if window > trained {
        global.warn(format!(
            "the model was trained on {trained} tokens of context; windows of {window} are beyond them"
        ));
    }
}
