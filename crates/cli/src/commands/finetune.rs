//! `bevel finetune`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bevel_eval::{Machine, peak_memory};
use bevel_formats::hub::HubConfig;
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;
use bevel_model::chat::{CHATML, ChatTemplate, DateTime};
use bevel_train::data::{Cached, Examples, Reader};
use bevel_train::{
    AdamWConfig, LoraConfig, Network, NetworkConfig, Parameters, Precision, Recompute, Schedule,
    Target, TrainConfig, mean_loss, train, write_adapter,
};
use clap::ValueEnum;
use serde_json::json;

use crate::args::Global;
use crate::model;
use crate::report::training::{self, TrainingReport};
use crate::text;
use crate::training_data;
use crate::training_record::{Recorder, write_page};
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::progress::{Progress, Unit};
use crate::ui::units::{bytes, duration};
use crate::ui::{print_json, print_text};

const EXPLANATION: &str = "\
Trains an adapter (LoRA): small matrices beside the model's own, which stay as they are, in whatever format \
the file has them. DIR becomes an adapter as PEFT writes and reads them.

DATA is files or directories of them, hub:owner/name[:split] for a data set of the hub, or - for lines of JSON on stdin. \
JSON, a line each or an array, has an object for each example:
  {\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, {\"role\": \"assistant\", \"content\": \"...\"}]}
  {\"prompt\": \"...\", \"completion\": \"...\"}
  {\"text\": \"...\"}
ShareGPT's `conversations` and Alpaca's `instruction`, `input` and `output` are known as well. Columns of CSV and Parquet \
have the same names. A file that ends in .txt or .md is one text. What an assistant says is learnt, and completions \
and texts; prompts are read only.";

/// Options of `bevel finetune`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXPLANATION)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// What to learn: files, directories, or hub:owner/name[:split]
    #[arg(required = true)]
    data: Vec<String>,

    /// The directory to write the adapter to
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,

    /// Rank of the adapter's matrices
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Adapter")]
    rank: u16,

    /// The adapter counts ALPHA / R times
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0, allow_negative_numbers = true, value_parser = positive, help_heading = "Adapter")]
    alpha: f64,

    /// The adapter counts ALPHA / sqrt(R) times (rsLoRA)
    #[arg(long, help_heading = "Adapter")]
    rslora: bool,

    /// The layers that have an adapter, with commas between
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "all-linear",
        help_heading = "Adapter"
    )]
    targets: Vec<TargetName>,

    /// Times that every example is seen
    #[arg(long, value_name = "N", default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    epochs: f64,

    /// Steps, whatever --epochs says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000), help_heading = "Training")]
    steps: Option<u64>,

    /// Examples of a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Training")]
    batch: u16,

    /// Learning rate at its highest
    #[arg(long, value_name = "RATE", default_value_t = 2e-4, allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    lr: f64,

    /// How the learning rate falls
    #[arg(long, value_name = "NAME", default_value = "cosine", help_heading = "Training")]
    schedule: ScheduleName,

    /// Part of the steps in which the learning rate rises
    #[arg(long, value_name = "PART", default_value_t = 0.03, allow_negative_numbers = true, value_parser = part, help_heading = "Training")]
    warmup: f64,

    /// Part of every weight that is lost in a step, times the learning rate
    #[arg(long, value_name = "LAMBDA", default_value_t = 0.0, allow_negative_numbers = true, value_parser = not_negative, help_heading = "Training")]
    weight_decay: f64,

    /// Largest norm of a gradient
    #[arg(long, value_name = "NORM", default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive, help_heading = "Training")]
    clip: f64,

    /// Part of the examples that is not learnt and tells how well the others were
    #[arg(long, value_name = "PART", default_value_t = 0.05, allow_negative_numbers = true, value_parser = part, help_heading = "Training")]
    held_out: f64,

    /// Measure that every so many steps [default: a tenth of all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Training")]
    evaluate_every: Option<u64>,

    /// Most tokens of an example; longer ones are cut off
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..), help_heading = "Training")]
    ctx: u32,

    /// Learn prompts as well
    #[arg(long, help_heading = "Training")]
    train_on_prompt: bool,

    /// Render conversations by this Jinja template instead of the model's own; `chatml` for the format of that name
    #[arg(long, value_name = "FILE", help_heading = "Training")]
    chat_template: Option<String>,

    /// Multiply single-precision numbers, and never bf16
    #[arg(long, help_heading = "Training")]
    exact: bool,

    /// Keep the inputs of every N layers only, and compute the rest twice: less memory, and a third more time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), num_args = 0..=1, default_missing_value = "1", help_heading = "Training")]
    recompute: Option<u16>,

    /// Write the figures of every step into DIR as well, for TensorBoard
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,

    /// Replace an adapter that exists
    #[arg(long)]
    force: bool,
}

/// Names of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TargetName {
    /// All of them
    AllLinear,
    /// q, k, v and o
    Attention,
    /// gate, up and down
    Mlp,
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl TargetName {
    fn targets(self) -> &'static [Target] {
        match self {
            Self::AllLinear => &Target::ALL,
            Self::Attention => &Target::ALL[..4],
            Self::Mlp => &Target::ALL[4..],
            Self::Q => &[Target::Query],
            Self::K => &[Target::Key],
            Self::V => &[Target::Value],
            Self::O => &[Target::Output],
            Self::Gate => &[Target::Gate],
            Self::Up => &[Target::Up],
            Self::Down => &[Target::Down],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScheduleName {
    Cosine,
    Linear,
    Constant,
}

fn number(text: &str, fits: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|&value: &f64| value.is_finite() && fits(value));
    value.ok_or_else(|| format!("expected {expected}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0, "a number above 0")
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |value| value >= 0.0, "a number from 0 up")
}

fn part(text: &str) -> Result<f64, String> {
    number(text, |value| (0.0..1.0).contains(&value), "a number from 0 up, less than 1")
}

/// Tokens that are computed together: enough for the products to be fast.
const TOGETHER: usize = 1024;

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let shown = args.output.display();
    let exists = args.output.join("adapter_model.safetensors").exists();
    ensure!(
        args.force || !exists,
        "`{shown}` has an adapter; choose another name, or replace it with --force"
    );
    let checkpoint = model::open(&args.model, global)?;
    let cpu = model::cpu(global)?;
    let Examples { all: mut examples, cut, empty } = args.examples(&checkpoint, &cpu, global)?;
    if cut > 0 {
        global.warn(format!(
            "{cut} examples are longer than {} tokens and were cut off: give a larger --ctx",
            args.ctx
        ));
    }
    if empty > 0 {
        global.warn(format!("{empty} examples have nothing to be learnt and were left out"));
    }
    // Every n-th one, so that it does not matter how they are sorted.
    let every = if args.held_out > 0.0 {
        (1.0 / args.held_out).round().max(2.0) as usize
    } else {
        usize::MAX
    };
    let mut held_out = Vec::new();
    let mut number = 0;
    examples.retain(|example| {
        number += 1;
        let is_held_out = number % every == 0;
        if is_held_out {
            held_out.push(example.clone());
        }
        !is_held_out
    });
    if examples.is_empty() {
        bail!("`{}` has no example to learn from", args.data.join("`, `"));
    }
    let seed = global.seed.unwrap_or(0);
    let targets = args.targets.iter().flat_map(|name| name.targets());
    let targets = targets.map(|target| target.everywhere()).collect();
    let lora = LoraConfig {
        rank: args.rank.into(),
        alpha: args.alpha as f32,
        rank_stabilized: args.rslora,
        targets,
        seed,
        ..LoraConfig::new()
    };
    let mut parameters = Parameters::default();
    let network = NetworkConfig {
        context: args.ctx as usize,
        precision: if args.exact { Precision::Single } else { Precision::Bf16 },
        recompute: args.recompute.map_or(Recompute::Nothing, |n| Recompute::Layers(n.into())),
    };
    let mut network =
        Network::new(&cpu, &checkpoint, &lora.clone().into(), &network, &mut parameters)?;
    let per_epoch = examples.len() as f64 / f64::from(args.batch);
    let steps =
        args.steps.map_or((args.epochs * per_epoch).ceil() as usize, |steps| steps as usize);
    let config = TrainConfig {
        steps,
        batch: args.batch.into(),
        tokens_together: TOGETHER.max(args.ctx as usize),
        learning_rate: args.lr,
        warmup: args.warmup,
        schedule: match args.schedule {
            ScheduleName::Cosine => Schedule::Cosine,
            ScheduleName::Linear => Schedule::Linear,
            ScheduleName::Constant => Schedule::Constant,
        },
        clip: args.clip,
        adamw: AdamWConfig { weight_decay: args.weight_decay as f32, ..AdamWConfig::default() },
        evaluate_every: args.evaluate_every.map_or((steps / 10).max(1), |every| every as usize),
        seed,
    };
    // What cannot be written is better known before hours of training.
    std::fs::create_dir_all(&args.output).with_context(|| format!("cannot make `{shown}`"))?;
    global.note(format!(
        "{} examples, {} held out; {} steps of {}; {} numbers to train, {}",
        examples.len(),
        held_out.len(),
        steps,
        args.batch,
        parameters.values.len(),
        bytes(4 * parameters.values.len() as u64)
    ));
    let mut recorder = Recorder::create(&args.output, args.tensorboard.as_deref(), global)?;
    let settings = training::settings(
        &args.data.join(", "),
        [examples.len(), held_out.len(), args.ctx as usize, parameters.values.len()],
        &lora,
        &config,
    );
    let handler = interrupt::handle();
    let before = match held_out.is_empty() {
        true => None,
        false => {
            Some(mean_loss(&mut network, &parameters, &cpu, &held_out, config.tokens_together)?)
        }
    };
    if let Some(loss) = before {
        recorder.before(loss);
    }
    let start = Instant::now();
    let bar = Progress::new(global, "training", steps as u64, Unit::Items);
    let (mut after, mut tokens, mut time) = (before, 0, Duration::ZERO);
    let observe = &mut |report: &bevel_train::StepReport| {
        tokens += report.tokens;
        time += report.time;
        let speed = tokens as f64 / time.as_secs_f64();
        bar.set(report.step as u64);
        bar.message(format!("loss {:.3}, {speed:.0} tokens/s", report.loss));
        if let Some(loss) = report.held_out {
            after = Some(loss);
            global
                .note(format!("step {}: loss {:.3}, held out {loss:.3}", report.step, report.loss));
        }
        recorder.step(report);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome =
        train(&mut network, &mut parameters, &cpu, &examples, &held_out, &config, observe);
    drop(bar);
    let report = TrainingReport {
        model: args.model.clone(),
        settings,
        wanted: steps,
        steps: recorder.steps,
        before,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        machine: Machine::new(&cpu),
        version: env!("CARGO_PKG_VERSION"),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory(),
    };
    // What a run that failed did says why.
    write_page(&args.output, &report)?;
    outcome?;
    let stopped = interrupt::requested();
    drop(handler);
    let adapters = network.adapters(&parameters);
    write_adapter(&args.output, &args.model, checkpoint.config(), &lora, &adapters)?;
    let last = report.steps.last().expect("there is a step at least");
    if stopped {
        global.warn(format!(
            "stopped after step {} of {steps}; `{shown}` has the adapter as it was then",
            last.step
        ));
        bail!(Interrupted);
    }
    let speed = tokens as f64 / time.as_secs_f64();
    if global.json {
        return print_json(&json!({
            "output": args.output,
            "steps": last.step,
            "loss": last.loss,
            "held_out_loss_before": before,
            "held_out_loss": after,
            "tokens": tokens,
            "tokens_per_second": speed,
            "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    let held_out = match before.zip(after) {
        Some((before, after)) => format!("held-out loss {before:.3} before, {after:.3} now"),
        None => format!("loss {:.3}", last.loss),
    };
    print_text(&format!(
        "{shown}: {held_out}; {} steps in {}, {speed:.0} tokens/s\n",
        last.step,
        duration(start.elapsed())
    ))
}

impl Args {
    fn examples(&self, checkpoint: &Checkpoint, cpu: &Cpu, global: &Global) -> Result<Examples> {
        let tokenizer = model::tokenizer(checkpoint, global)?;
        let source = match self.chat_template.as_deref() {
            None => tokenizer.chat_template(false).ok().map(|own| own.source().to_owned()),
            Some("chatml") => Some(CHATML.to_owned()),
            Some(file) => Some(text::read(file.as_ref())?),
        };
        // A template that writes the date writes the same one in every run.
        let clock = || DateTime::from_unix(1_735_689_600);
        let special = tokenizer.special_texts();
        let template =
            source.map(|source| ChatTemplate::with_clock(&source, special, clock)).transpose()?;
        let reader = Reader {
            tokenizer: &tokenizer,
            template: template.as_ref(),
            context: self.ctx as usize,
            whole: self.train_on_prompt,
        };
        let files = training_data::files(&self.data, global)?;
        let cache = HubConfig::from_env().bevel_cache.join("tokens");
        let (examples, cached) = reader.cached_examples(&files, cpu.pool(), &cache)?;
        if let Cached::Failed(error) = cached {
            global.warn(format!("the data's tokens could not be kept for the next run: {error}"));
        }
        Ok(examples)
    }
}
