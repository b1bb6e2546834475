//! `bevel chat`: a conversation.

mod command;
mod conversation;
mod input;

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use bevel_formats::AtomicFile;
use bevel_formats::hub::HubConfig;
use bevel_model::chat::TemplateError;
use bevel_model::{FinishReason, GenerateOptions, Session};
use serde::Serialize;

use crate::adapters::Adapters;
use crate::answer::{Stats, answer};
use crate::args::Global;
use crate::generation::GenerationConfig;
use crate::model::{self, Loaded};
use crate::sampling::{Kv, Products, Sampling, context};
use crate::ui::{interrupt, print_json};
use command::{Command, HELP};
use conversation::{Conversation, Turn};
use input::Input;

/// Options of `bevel chat`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`; it needs a chat template
    model: String,

    /// Instructions that stand before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Show tokens per second after every answer; -v does so too
    #[arg(long)]
    stats: bool,

    /// Tokens of context; when it is full, the oldest turns are dropped [default: the model's own, up
    /// to 8192]
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

/// What `--json` prints, once the input has ended.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    seed: u64,
    context: usize,
    messages: &'a [Turn],
    answers: &'a [Stats],
    /// Messages that left the context because it was full.
    dropped: usize,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let Loaded { model, mut tokenizer, cpu, .. } =
        model::load(&args.model, args.products.exact, &args.adapters, global)?;
    let template = match tokenizer.chat_template(false) {
        Ok(template) => template,
        Err(TemplateError::Missing) => bail!(
            "`{0}` has no chat template, so it was not trained to answer: complete text with `bevel run {0} \"…\"`",
            args.model
        ),
        Err(error) => return Err(error.into()),
    };
    let generation_config = GenerationConfig::of(model.checkpoint())?;
    tokenizer.add_end_of_generation(generation_config.eos().iter().copied());
    let seed = global.seed_or_random();
    let context = context(args.ctx, 0, model.config(), global)?;
    let session = Session::new(&model, &cpu, context, args.kv.kv.into())?;
    let history = HubConfig::from_env().bevel_cache.join("chat-history.txt");
    let mut input = Input::new(history);
    if input.is_terminal() {
        global.note(format!(
            "{}, {context} tokens of context. /help shows what you can type; Ctrl-D ends.",
            args.model
        ));
    }
    let mut chat = Chat {
        args,
        global,
        options: args.sampling.options(&generation_config, seed, false),
        conversation: Conversation::new(&tokenizer, &template, args.system.clone(), context),
        session,
        answers: Vec::new(),
    };
    while let Some(text) = input.read()? {
        let outcome = match Command::parse(&text) {
            None if text.trim().is_empty() => Ok(true),
            None => chat.say(&text).map(|()| true),
            Some(command) => command.map_err(anyhow::Error::msg).and_then(|c| chat.obey(&c)),
        };
        match outcome {
            Ok(true) => {}
            Ok(false) => break,
            // Nobody listens any more.
            Err(error) if error.is::<io::Error>() => return Err(error),
            // At a terminal the user tries again; a script must not go on as if nothing were.
            Err(error) if input.is_terminal() => global.warn(format!("{error:#}")),
            Err(error) => return Err(error),
        }
    }
    if global.json {
        print_json(&Output {
            model: &args.model,
            seed,
            context,
            messages: chat.conversation.turns(),
            answers: &chat.answers,
            dropped: chat.conversation.dropped(),
        })?;
    }
    Ok(())
}

/// A running conversation.
struct Chat<'a> {
    args: &'a Args,
    global: &'a Global,
    options: GenerateOptions,
    conversation: Conversation<'a>,
    session: Session<'a>,
    answers: Vec<Stats>,
}

impl Chat<'_> {
    /// Adds what the user said and answers it.
    fn say(&mut self, text: &str) -> Result<()> {
        self.conversation.push("user", text);
        let said = self.reply();
        if said.is_err() {
            self.conversation.pop_unanswered();
        }
        said
    }

    /// Answers the conversation as it stands. Ctrl-C ends the answer, which stays as far as it got.
    fn reply(&mut self) -> Result<()> {
        let dropped = self.conversation.dropped();
        let prompt = self.conversation.prompt()?;
        let dropped = self.conversation.dropped() - dropped;
        if dropped > 0 {
            self.global.warn(format!(
                "the context of {} tokens is full: the oldest {dropped} messages were dropped",
                self.session.context()
            ));
        }
        let _handler = interrupt::handle();
        let mut out = io::stdout().lock();
        let quiet = self.global.json;
        let generation = answer(
            &mut self.session,
            self.conversation.tokenizer(),
            &prompt,
            &self.options,
            self.global,
            &mut |text| {
                if quiet || text.is_empty() {
                    return Ok(());
                }
                out.write_all(text.as_bytes())?;
                out.flush()
            },
        )?;
        if !quiet {
            writeln!(out)?;
        }
        drop(out);
        self.conversation.push("assistant", &generation.text);
        // The next answer must not repeat this one's random numbers.
        self.options.sampler.seed = self.options.sampler.seed.wrapping_add(1);
        let stats = Stats::of(&generation);
        if self.args.stats || self.global.verbose {
            self.global.note(stats.to_string());
        }
        self.answers.push(stats);
        match generation.finish {
            FinishReason::Cancelled => self.global.note("(stopped)"),
            FinishReason::ContextFull => self.global.warn(format!(
                "the answer was cut off: the context of {} tokens is full",
                self.session.context()
            )),
            _ => {}
        }
        Ok(())
    }

    /// Carries out a command; false ends the program.
    fn obey(&mut self, command: &Command) -> Result<bool> {
        match command {
            Command::Help => self.global.note(HELP),
            Command::Clear => {
                self.conversation.clear();
                self.global.note("The conversation begins anew.");
            }
            Command::System(text) => {
                self.conversation.set_system((!text.is_empty()).then(|| text.clone()));
                self.global.note(if text.is_empty() {
                    "There are no instructions any more."
                } else {
                    "The instructions hold from the next answer on."
                });
            }
            Command::Regenerate => {
                if !self.conversation.forget_answer() {
                    bail!("there is no answer yet that could be given again");
                }
                self.reply()?;
            }
            Command::Save(path) => {
                let text = self.conversation.to_json()?;
                let mut file = AtomicFile::create(path)?;
                file.write_all(text.as_bytes())
                    .with_context(|| format!("cannot write `{}`", path.display()))?;
                file.finish()?;
                self.global.note(format!("The conversation is in `{}`.", path.display()));
            }
            Command::Load(path) => {
                let text = crate::text::read(path)?;
                let count = self
                    .conversation
                    .load_json(&text)
                    .with_context(|| format!("`{}` is no saved conversation", path.display()))?;
                self.global.note(format!("{count} messages from `{}`.", path.display()));
            }
            Command::Stats => {
                let last = self.answers.last().map(ToString::to_string);
                self.global.note(last.unwrap_or_else(|| "no answer yet".to_owned()));
                self.global.note(format!(
                    "{} of {} tokens of context in use",
                    self.session.tokens().len(),
                    self.session.context()
                ));
            }
            Command::Exit => return Ok(false),
        }
        Ok(true)
    }
}
