//! `bevel run`: one prompt, one answer.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Result, bail};
use bevel_model::chat::{Message, TemplateError};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{FinishReason, Session};
use serde::Serialize;

use crate::adapters::Adapters;
use crate::answer::{Stats, answer};
use crate::args::Global;
use crate::generation::GenerationConfig;
use crate::model::{self, Loaded};
use crate::sampling::{Kv, Products, Sampling, context};
use crate::text;
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::print_json;

/// Options of `bevel run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// The text to answer or continue; without it, and without -f, stdin is read
    #[arg(conflicts_with = "file")]
    prompt: Option<String>,

    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Instructions that come before the prompt, for models with a chat template
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,

    /// Continue the prompt as it is, without the model's chat template; special tokens spelt in it
    /// count
    #[arg(long)]
    raw: bool,

    /// Print the prompt before the answer
    #[arg(long)]
    echo: bool,

    /// Go on past tokens that end a text
    #[arg(long)]
    ignore_eos: bool,

    /// Show tokens per second when done; -v does so too
    #[arg(long)]
    stats: bool,

    /// Tokens of context [default: the model's own, up to 8192 or what the prompt needs]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Context")]
    ctx: Option<usize>,

    #[command(flatten)]
    adapters: Adapters,

    #[command(flatten)]
    products: Products,

    #[command(flatten)]
    kv: Kv,

    #[command(flatten)]
    sampling: Sampling,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    prompt: &'a str,
    text: &'a str,
    tokens: &'a [u32],
    seed: u64,
    temperature: f32,
    context: usize,
    load_seconds: f64,
    #[serde(flatten)]
    stats: Stats,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let prompt = args.prompt()?;
    let Loaded { model, mut tokenizer, cpu, load_time } =
        model::load(&args.model, args.products.exact, &args.adapters, global)?;
    let generation_config = GenerationConfig::of(model.checkpoint())?;
    tokenizer.add_end_of_generation(generation_config.eos().iter().copied());
    let tokens = args.encode(&tokenizer, &prompt)?;
    let seed = global.seed_or_random();
    let options = args.sampling.options(&generation_config, seed, args.ignore_eos);

    let wanted = tokens.len() + options.max_tokens.unwrap_or(2048);
    let context = context(args.ctx, wanted, model.config(), global)?;
    if tokens.len() > context {
        let trained = model.config().context;
        let advice = match args.ctx {
            None => "shorten it",
            Some(ctx) if ctx < trained => "shorten it, or give a larger --ctx",
            Some(_) => "shorten it",
        };
        bail!(
            "the prompt has {} tokens, but the context holds {context} (the model was trained on {trained}); {advice}",
            tokens.len()
        );
    }

    let mut session = Session::new(&model, &cpu, context, args.kv.kv.into())?;
    let _handler = interrupt::handle();
    let mut out = io::stdout().lock();
    if args.echo && !global.json {
        out.write_all(prompt.as_bytes())?;
        out.flush()?;
    }
    let generation = answer(&mut session, &tokenizer, &tokens, &options, global, &mut |text| {
        if global.json || text.is_empty() {
            return Ok(());
        }
        out.write_all(text.as_bytes())?;
        out.flush()
    })?;
    let stats = Stats::of(&generation);
    if global.json {
        drop(out);
        print_json(&Output {
            model: &args.model,
            prompt: &prompt,
            text: &generation.text,
            tokens: &generation.tokens,
            seed,
            temperature: options.sampler.temperature,
            context,
            load_seconds: load_time.as_secs_f64(),
            stats: stats.clone(),
        })?;
    } else if !generation.text.ends_with('\n') {
        writeln!(out)?;
    }
    if args.stats || global.verbose {
        global.note(stats.to_string());
    }
    match generation.finish {
        FinishReason::Cancelled => Err(Interrupted.into()),
        FinishReason::ContextFull => {
            global.warn(format!("the answer was cut off: the context of {context} tokens is full"));
            Ok(())
        }
        _ => Ok(()),
    }
}

impl Args {
    /// The prompt, from wherever it comes.
    fn prompt(&self) -> Result<String> {
        if let Some(prompt) = &self.prompt {
            return Ok(prompt.clone());
        }
        if let Some(file) = &self.file {
            return text::read(file);
        }
        if io::stdin().is_terminal() {
            bail!(
                "there is no prompt: write it behind the model, name a file with -f, or pipe it in; `bevel chat` is for conversations"
            );
        }
        text::read_stdin()
    }

    /// The prompt's tokens: a user's message where the model has a chat template, else text to
    /// continue.
    fn encode(&self, tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
        let template = match tokenizer.chat_template(false) {
            _ if self.raw => None,
            Err(TemplateError::Missing) if self.system.is_none() => None,
            Err(TemplateError::Missing) => bail!(
                "`{}` has no chat template, so --system means nothing to it; put the instructions into the prompt",
                self.model
            ),
            template => Some(template?),
        };
        if let Some(template) = template {
            let mut messages: Vec<Message> = Vec::new();
            messages.extend(self.system.as_ref().map(|text| Message::new("system", text)));
            messages.push(Message::new("user", prompt));
            let text = template.render(&messages, None, true, Default::default())?;
            return Ok(tokenizer.encode(&text, false, true)?);
        }
        let mut tokens = tokenizer.encode(prompt, true, self.raw)?;
        if tokens.is_empty() {
            // An empty prompt asks for any text: it begins where texts begin.
            tokens.extend(tokenizer.bos().or(tokenizer.eos()));
        }
        if tokens.is_empty() {
            bail!("the prompt is empty, and the model has no token that begins a text");
        }
        Ok(tokens)
    }
}
