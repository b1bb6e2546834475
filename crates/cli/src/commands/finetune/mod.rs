//! `bevel finetune`.

mod args;
mod data;
mod goal;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bevel_eval::{Machine, peak_memory};
use bevel_model::AdapterFile;
use bevel_train::{
    LoraConfig, Memory, MemoryUse, Network, NetworkConfig, OptimizerConfig, Parameters, Precision,
    Recompute, Start, TrainConfig, Trainer, start_from,
};
use serde_json::json;

use crate::args::Global;
use crate::model;
use crate::report::training::{self, TrainingReport};
use crate::training_record::{Recorder, write_page};
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::progress::{Progress, Unit};
use crate::ui::table::Table;
use crate::ui::units::{bytes, duration};
use crate::ui::{print_json, print_text};

pub(crate) use args::Args;
use data::Data;
use goal::{Goal, beginning};

/// Tokens that are computed together: enough for the products to be fast, and not so many that what is kept of them takes
/// more memory than a small model.
const TOGETHER: usize = 512;

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let shown = args.output.display();
    for (name, what) in [
        ("adapter_model.safetensors", "an adapter"),
        ("model.gguf", "a model"),
        ("model", "a model"),
    ] {
        ensure!(
            args.force || args.resume || !args.output.join(name).exists(),
            "`{shown}` has {what}; choose another name, or replace it with --force"
        );
    }
    let saved = args.output.join("checkpoint.safetensors");
    ensure!(
        args.force || args.resume || !saved.exists(),
        "`{shown}` has the checkpoint of a run that was stopped; go on with --resume, or begin anew with --force"
    );
    ensure!(
        !args.resume || saved.exists(),
        "`{shown}` has no checkpoint to go on with; leave out --resume"
    );
    let checkpoint = beginning(args, global)?;
    let cpu = model::cpu(global)?;
    let data = args.data(&checkpoint, &cpu, global)?;
    let config = args.train_config(data.learnt(), global);
    let goal = Goal::of(args, &checkpoint, global);
    let network_config = NetworkConfig {
        context: args.ctx as usize,
        precision: if args.exact { Precision::Single } else { Precision::Bf16 },
        recompute: args.recompute.map_or(Recompute::Nothing, |n| Recompute::Layers(n.into())),
    };
    let mut parameters = Parameters::default();
    let mut trainable = goal.trainable(&checkpoint, &cpu)?;
    if let Some(original) = &args.loftq {
        trainable.original = Some(Arc::new(model::open(original, global)?));
    }
    let mut network =
        Network::new(&cpu, &checkpoint, &trainable, &network_config, &mut parameters)?;
    ensure!(
        !parameters.values.is_empty(),
        "no layer of this model is called as --targets says; `bevel inspect` shows their names"
    );
    if let (Some(from), Goal::Adapter(lora, _)) = (&args.from, &goal) {
        let file = AdapterFile::open(from, checkpoint.config())?;
        start_from(&file, lora, &mut parameters)?;
    }
    let (lessons, held_out) = data.lessons(args.dpo);
    let memory = network.memory(
        &cpu,
        &parameters,
        &MemoryUse {
            tokens: lessons.tokens_together(config.batch, config.tokens_together),
            optimizer: config.optimizer,
            paged: args.page_optimizer,
            keep_best: config.keep_best,
        },
    );
    if args.dry_run {
        return show_plan(&data, &config, parameters.values.len(), &memory, global);
    }
    // What cannot be written is better known before hours of training.
    std::fs::create_dir_all(&args.output).with_context(|| format!("cannot make `{shown}`"))?;
    let (steps, trained) = (config.steps, parameters.values.len());
    let settings = training::settings(
        &args.data.join(", "),
        [data.learnt(), data.held_out(), args.ctx as usize],
        goal.settings(trained),
        &config,
    );
    let handler = interrupt::handle();
    let paged = args.page_optimizer.then_some(args.output.as_path());
    let mut trainer =
        Trainer::new(&mut network, &parameters, &cpu, lessons, held_out, config.clone(), paged)?;
    let before = trainer.held_out_loss(&mut network, &parameters, &cpu)?;
    // Whatever changes what a step computes.
    let same = format!(
        "{} {:?} {:?} {:?} {network_config:?} {config:?} {:?} {:?} {}",
        args.model,
        trainable.lora,
        trainable.tensors,
        trainable.roundings,
        args.dpo,
        (&args.from, &args.loftq),
        data.hash()
    );
    if args.resume {
        trainer.resume(&mut parameters, &same, &saved)?;
    }
    global.note(format!(
        "{} examples, {} held out; {steps} steps of {}; {trained} numbers to train; about {} of memory",
        data.learnt(),
        data.held_out(),
        config.batch,
        bytes(memory.total() as u64)
    ));
    if args.resume {
        global.note(format!("goes on after step {}", trainer.steps()));
    }
    let done = trainer.steps();
    let mut recorder = Recorder::create(&args.output, args.tensorboard.as_deref(), done, global)?;
    if let Some(loss) = before.filter(|_| done == 0) {
        recorder.before(loss);
    }
    let checkpoint_every =
        args.checkpoint_every.map_or((steps / 10).max(1), |every| every as usize);
    let start = Instant::now();
    let bar = Progress::new(global, "training", steps as u64, Unit::Items);
    let (mut tokens, mut time) = (0, Duration::ZERO);
    let mut outcome = Ok(());
    while !trainer.is_done() && !interrupt::requested() {
        let report = match trainer.step(&mut network, &mut parameters, &cpu) {
            Ok(report) => report,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        };
        tokens += report.tokens;
        time += report.time;
        let speed = tokens as f64 / time.as_secs_f64();
        bar.set(report.step as u64);
        bar.message(format!("loss {:.3}, {speed:.0} tokens/s", report.loss));
        if let Some(loss) = report.held_out {
            global
                .note(format!("step {}: loss {:.3}, held out {loss:.3}", report.step, report.loss));
        }
        recorder.step(&report);
        if report.step.is_multiple_of(checkpoint_every) && !trainer.is_done() {
            trainer.save(&parameters, &same, &saved)?;
        }
    }
    drop(bar);
    let stopped = interrupt::requested() && !trainer.is_done();
    if stopped {
        trainer.save(&parameters, &same, &saved)?;
    }
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
    drop(handler);
    let Some(last) = report.steps.last() else { bail!(Interrupted) };
    let best = trainer.finish(&mut parameters);
    let result = network.into_trained(parameters);
    goal.write(&args.output, &args.model, checkpoint, result, &cpu, global)?;
    if stopped {
        global.warn(format!(
            "stopped after step {} of {steps}; `{shown}` has the {} as it was then, and --resume goes on",
            last.step,
            goal.noun()
        ));
        bail!(Interrupted);
    }
    remove(&saved)?;
    let measured = report.steps.iter().filter_map(|step| Some((step.step, step.held_out?)));
    let after = measured.rev().find(|&(step, _)| best.is_none_or(|best| step == best));
    let speed = tokens as f64 / time.as_secs_f64().max(1e-9);
    if global.json {
        return print_json(&json!({
            "output": goal.output(&args.output),
            "steps": last.step,
            "loss": last.loss,
            "held_out_loss_before": before,
            "held_out_loss": after.map(|(_, loss)| loss),
            "best_step": best,
            "tokens": tokens,
            "tokens_per_second": speed,
            "seconds": start.elapsed().as_secs_f64(),
            "expected_memory_bytes": memory.total(),
            "training_memory_bytes": report.peak_memory_bytes,
        }));
    }
    let held_out = match before.zip(after) {
        Some((before, (step, loss))) => {
            let when = if best.is_some() { format!("after step {step}") } else { "now".to_owned() };
            format!("held-out loss {before:.3} before, {loss:.3} {when}")
        }
        None => format!("loss {:.3}", last.loss),
    };
    let written = goal.output(&args.output);
    print_text(&format!(
        "{}: {held_out}; {} steps in {}, {speed:.0} tokens/s\n",
        written.display(),
        last.step - done,
        duration(start.elapsed())
    ))
}

/// What a run would do, and what it would take.
fn show_plan(
    data: &Data,
    config: &TrainConfig,
    trained: usize,
    memory: &Memory,
    global: &Global,
) -> Result<()> {
    let Memory { weights, trained: values, optimizer, best, activations, working, process } =
        *memory;
    let parts = [
        ("weights", "frozen weights, as their file has them", weights),
        ("trained", "what is trained, and its gradient", values),
        ("optimizer", "the optimizer's state", optimizer),
        ("best", "the parameters of the lowest loss", best),
        ("activations", "what is kept for the backward pass", activations),
        ("working", "logits and other buffers", working),
        ("process", "the process, tokenizer and data", process),
    ];
    if global.json {
        let memory: serde_json::Map<String, serde_json::Value> =
            parts.iter().map(|(key, _, value)| ((*key).to_owned(), json!(value))).collect();
        return print_json(&json!({
            "examples": data.learnt(),
            "held_out": data.held_out(),
            "steps": config.steps,
            "trained_numbers": trained,
            "expected_memory_bytes": parts.iter().map(|(_, _, value)| value).sum::<usize>(),
            "memory": memory,
        }));
    }
    let mut table = Table::new(&["<", "memory"]);
    for (_, label, value) in parts.iter().filter(|(_, _, value)| *value > 0) {
        table.row([(*label).to_owned(), bytes(*value as u64)]);
    }
    table.row(["all".to_owned(), bytes(memory.total() as u64)]);
    print_text(&format!(
        "{} examples, {} held out; {} steps of {}; {trained} numbers to train\n\n{table}",
        data.learnt(),
        data.held_out(),
        config.steps,
        config.batch,
    ))
}

/// Removes a file that may not be there.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove `{}`", path.display()))
        }
        _ => Ok(()),
    }
}

impl Args {
    fn lora_config(&self, global: &Global) -> LoraConfig {
        LoraConfig {
            rank: self.rank.into(),
            alpha: self.alpha as f32,
            rank_stabilized: self.rslora,
            targets: self.targets.iter().flat_map(|targets| targets.0.clone()).collect(),
            dropout: self.dropout as f32,
            dora: self.dora,
            start: if self.loftq.is_some() { Start::LoftQ } else { self.init.into() },
            seed: global.seed.unwrap_or(0),
        }
    }

    fn train_config(&self, examples: usize, global: &Global) -> TrainConfig {
        let per_epoch = examples as f64 / f64::from(self.batch);
        let all = (self.epochs * per_epoch).ceil() as usize;
        let steps = self.steps.map_or(all, |steps| steps as usize);
        let usual_rate = if self.scratch {
            1e-3
        } else if self.full || self.qat.is_some() || !self.train.is_empty() {
            2e-5
        } else {
            2e-4
        };
        TrainConfig {
            steps,
            batch: self.batch.into(),
            tokens_together: TOGETHER.max(self.ctx as usize),
            learning_rate: self.lr.unwrap_or(usual_rate),
            warmup: self.warmup,
            schedule: self.schedule.into(),
            clip: self.clip,
            optimizer: OptimizerConfig {
                weight_decay: self.weight_decay as f32,
                ..OptimizerConfig::new(self.optimizer.into())
            },
            neftune: self.neftune as f32,
            patience: self.patience.unwrap_or(0) as usize,
            keep_best: self.keep_best,
            in_order: self.in_order,
            evaluate_every: self.evaluate_every.map_or((steps / 10).max(1), |every| every as usize),
            seed: global.seed.unwrap_or(0),
        }
    }
}
