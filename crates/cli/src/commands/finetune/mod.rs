//! `bevel finetune`.

mod args;
mod data;
mod goal;
mod plan;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bevel_eval::{Machine, peak_memory};
use bevel_kernels::Cpu;
use bevel_model::AdapterFile;
use bevel_train::{
    LoraConfig, Memory, MemoryUse, Network, NetworkConfig, OptimizerConfig, Parameters, Precision,
    Recompute, Start, StepReport, TrainConfig, Trainer, start_from,
};
use serde_json::json;

use crate::args::Global;
use crate::model;
use crate::report::training::{self, TrainingReport};
use crate::training_record::{Recorder, write_page};
use crate::ui::interrupt::{self, Interrupted};
use crate::ui::progress::{Progress, Unit};
use crate::ui::units::{bytes, duration};
use crate::ui::{print_json, print_text};

pub(crate) use args::Args;
use goal::{Goal, beginning};

/// Tokens that are computed together: enough for the products to be fast, and not so many that what is kept of them takes
/// more memory than a small model.
const TOGETHER: usize = 512;

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let saved = args.output.join("checkpoint.safetensors");
    may_begin(args, &saved)?;
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
    let trained = parameters.values.len();
    if args.dry_run {
        return plan::show(&data, &config, trained, &memory, global);
    }
    // What cannot be written is better known before hours of training.
    std::fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make `{}`", args.output.display()))?;
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
        "{} examples, {} held out; {} steps of {}; {trained} numbers to train; about {} of memory",
        data.learnt(),
        data.held_out(),
        config.steps,
        config.batch,
        bytes(memory.total() as u64)
    ));
    let done = trainer.steps();
    if args.resume {
        global.note(format!("goes on after step {done}"));
    }
    let mut recorder = Recorder::create(&args.output, args.tensorboard.as_deref(), done, global)?;
    if let Some(loss) = before.filter(|_| done == 0) {
        recorder.before(loss);
    }
    let start = Instant::now();
    let mut places = Places {
        path: &saved,
        settings: &same,
        every: args.checkpoint_every.map_or((config.steps / 10).max(1), |every| every as usize),
        wished: args.checkpoint_every.is_some(),
        last: (done, start),
        cost: Duration::ZERO,
    };
    let mut lesson = Lesson { network: &mut network, parameters: &mut parameters, cpu: &cpu };
    let outcome = lesson.teach(&mut trainer, config.steps, &mut places, &mut recorder, global);
    let stopped = interrupt::requested() && !trainer.is_done();
    let report = TrainingReport {
        model: args.model.clone(),
        settings,
        wanted: config.steps,
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
            "stopped after step {} of {}; `{}` has the {} as it was then, and --resume goes on",
            last.step,
            config.steps,
            args.output.display(),
            goal.noun()
        ));
        bail!(Interrupted);
    }
    remove(&saved)?;
    let summary = Summary { output: goal.output(&args.output), done, best, memory, start };
    summary.show(&report, global)
}

/// Refuses to replace what another run left.
fn may_begin(args: &Args, saved: &Path) -> Result<()> {
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
    ensure!(
        args.force || args.resume || !saved.exists(),
        "`{shown}` has the checkpoint of a run that was stopped; go on with --resume, or begin anew with --force"
    );
    ensure!(
        !args.resume || saved.exists(),
        "`{shown}` has no checkpoint to go on with; leave out --resume"
    );
    Ok(())
}

/// Keeps a run's place in a file.
struct Places<'a> {
    path: &'a Path,
    settings: &'a str,
    /// Steps from one to the next.
    every: usize,
    /// These were asked for. Otherwise a place is kept later where keeping it would take more than a twentieth of the
    /// time: that of a whole model is gigabytes.
    wished: bool,
    /// The step at which the last one was kept, and when.
    last: (usize, Instant),
    /// What keeping it took.
    cost: Duration,
}

impl Places<'_> {
    fn is_due(&self, step: usize) -> bool {
        let (last, when) = self.last;
        match self.wished {
            true => step.is_multiple_of(self.every),
            false => step >= last + self.every && when.elapsed() >= 20 * self.cost,
        }
    }

    fn keep(&mut self, trainer: &Trainer<'_>, parameters: &Parameters) -> Result<()> {
        let start = Instant::now();
        trainer.save(parameters, self.settings, self.path)?;
        self.cost = start.elapsed();
        self.last = (trainer.steps(), Instant::now());
        Ok(())
    }
}

/// What steps are done with.
struct Lesson<'a, 'c> {
    network: &'a mut Network<'c>,
    parameters: &'a mut Parameters,
    cpu: &'a Cpu,
}

impl Lesson<'_, '_> {
    /// Does the steps that are left, until Ctrl-C, and keeps the run's place on the way.
    fn teach(
        &mut self,
        trainer: &mut Trainer<'_>,
        steps: usize,
        places: &mut Places<'_>,
        recorder: &mut Recorder<'_>,
        global: &Global,
    ) -> Result<()> {
        let bar = Progress::new(global, "training", steps as u64, Unit::Items);
        let (mut tokens, mut time) = (0, Duration::ZERO);
        while !trainer.is_done() && !interrupt::requested() {
            let report = trainer.step(self.network, self.parameters, self.cpu)?;
            tokens += report.tokens;
            time += report.time;
            let speed = tokens as f64 / time.as_secs_f64();
            bar.set(report.step as u64);
            bar.message(format!("loss {:.3}, {speed:.0} tokens/s", report.loss));
            if let Some(loss) = report.held_out {
                let StepReport { step, loss: learnt, .. } = report;
                global.note(format!("step {step}: loss {learnt:.3}, held out {loss:.3}"));
            }
            recorder.step(&report);
            if places.is_due(report.step) && !trainer.is_done() {
                places.keep(trainer, self.parameters)?;
            }
        }
        if !trainer.is_done() {
            places.keep(trainer, self.parameters)?;
        }
        Ok(())
    }
}

/// What is said at the end of a run.
struct Summary {
    output: PathBuf,
    /// Steps that were done before it.
    done: usize,
    /// The step whose parameters were written, where it was not the last one.
    best: Option<usize>,
    memory: Memory,
    start: Instant,
}

impl Summary {
    fn show(&self, report: &TrainingReport, global: &Global) -> Result<()> {
        let last = report.steps.last().expect("there were steps");
        let measured = report.steps.iter().filter_map(|step| Some((step.step, step.held_out?)));
        let after = measured.rev().find(|&(step, _)| self.best.is_none_or(|best| step == best));
        let ours = &report.steps[self.done..];
        let tokens: usize = ours.iter().map(|step| step.tokens).sum();
        let time: Duration = ours.iter().map(|step| step.time).sum();
        let speed = tokens as f64 / time.as_secs_f64().max(1e-9);
        if global.json {
            return print_json(&json!({
                "output": self.output,
                "steps": last.step,
                "loss": last.loss,
                "held_out_loss_before": report.before,
                "held_out_loss": after.map(|(_, loss)| loss),
                "best_step": self.best,
                "tokens": tokens,
                "tokens_per_second": speed,
                "seconds": self.start.elapsed().as_secs_f64(),
                "expected_memory_bytes": self.memory.total(),
                "training_memory_bytes": report.peak_memory_bytes,
            }));
        }
        let held_out = match report.before.zip(after) {
            Some((before, (step, loss))) => {
                let when = if self.best.is_some() {
                    format!("after step {step}")
                } else {
                    "now".to_owned()
                };
                format!("held-out loss {before:.3} before, {loss:.3} {when}")
            }
            None => format!("loss {:.3}", last.loss),
        };
        print_text(&format!(
            "{}: {held_out}; {} steps in {}, {speed:.0} tokens/s\n",
            self.output.display(),
            ours.len(),
            duration(self.start.elapsed())
        ))
    }
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
