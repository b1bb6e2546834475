//! `bevel bench`: speed and memory.

use std::io::Write;

use anyhow::Result;
use bevel_eval::{Bench, BenchConfig, Limits, Machine, Series, peak_memory};
use serde::Serialize;

use crate::adapters::Adapters;
use crate::args::Global;
use crate::model::{self, Loaded};
use crate::sampling::{Kv, Products};
use crate::ui::print_json;
use crate::ui::progress::{Progress, Unit};
use crate::ui::table::Table;
use crate::ui::units::{bytes, duration, rate};

/// Options of `bevel bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a path, a hub name, an alias or `tiny-austen`
    model: String,

    /// Tokens of the prompt; 0 to leave prefill out
    #[arg(short, long, value_name = "N", allow_negative_numbers = true, default_value_t = 512)]
    prompt: usize,

    /// Tokens to generate; 0 to leave decoding out
    #[arg(
        short = 'n',
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 128
    )]
    decode: usize,

    /// Sequences to generate together; the speed is that of all of them
    #[arg(short, long, value_name = "N", allow_negative_numbers = true, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    sequences: u32,

    /// Measurements of each, after a warm-up that does not count
    #[arg(short, long, value_name = "N", allow_negative_numbers = true, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repetitions: u32,

    /// Tokens in the cache before each measurement
    #[arg(short, long, value_name = "N", allow_negative_numbers = true, default_value_t = 0)]
    depth: usize,

    /// Tokens of context [default: as many as needed]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Context")]
    ctx: Option<usize>,

    #[command(flatten)]
    adapters: Adapters,

    #[command(flatten)]
    products: Products,

    #[command(flatten)]
    kv: Kv,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    architecture: &'a str,
    parameters: u64,
    tensor_bytes: u64,
    load_seconds: f64,
    peak_memory_bytes: Option<u64>,
    machine: &'a Machine,
    #[serde(flatten)]
    bench: &'a Bench,
    limits: Limits,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let Loaded { model, cpu, load_time, .. } =
        model::load(&args.model, args.products.exact, &args.adapters, global)?;
    let config = BenchConfig {
        prompt: args.prompt,
        decode: args.decode,
        sequences: args.sequences as usize,
        repetitions: args.repetitions as usize,
        depth: args.depth,
        context: args.ctx,
        kv_type: args.kv.kv.into(),
    };
    let bar = Progress::new(global, "measuring", 0, Unit::Items);
    let bench = config.run(&model, &cpu, &mut |step| {
        bar.set_total(step.total as u64);
        bar.set(step.done as u64);
        bar.message(step.what);
    })?;
    drop(bar);

    let checkpoint = model.checkpoint();
    let output = Output {
        model: &args.model,
        architecture: checkpoint.config().family.gguf,
        parameters: checkpoint.parameters(),
        tensor_bytes: checkpoint.tensor_bytes(),
        load_seconds: load_time.as_secs_f64(),
        peak_memory_bytes: peak_memory(),
        machine: &Machine::new(&cpu),
        bench: &bench,
        // After the peak of memory was read.
        limits: Limits::measure(&bench, &model, &cpu),
    };
    if global.json { print_json(&output) } else { print(&output, load_time) }
}

fn print(output: &Output<'_>, load_time: std::time::Duration) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let machine = output.machine;
    writeln!(out, "machine  {}, {} threads, {}", machine.cpu, machine.threads, machine.isa)?;
    writeln!(
        out,
        "model    {}, {} of weights, loaded in {}",
        output.model,
        bytes(output.tensor_bytes),
        duration(load_time)
    )?;
    if let Some(peak) = output.peak_memory_bytes {
        writeln!(out, "memory   {} at most", bytes(peak))?;
    }
    writeln!(out)?;
    let mut table =
        Table::new(&["<tokens/s", "tokens", "depth", "mean", "±", "median", "min", "max"]);
    let mut row = |name: &str, series: &Option<Series>| {
        let Some(Series { tokens, spread, .. }) = series else { return };
        table.row([
            name.to_owned(),
            tokens.to_string(),
            output.bench.depth.to_string(),
            rate(spread.mean),
            rate(spread.deviation),
            rate(spread.median),
            rate(spread.min),
            rate(spread.max),
        ]);
    };
    row("prefill", &output.bench.prefill);
    match output.bench.sequences {
        1 => row("decode", &output.bench.decode),
        n => row(&format!("decode of {n}"), &output.bench.decode),
    }
    write!(out, "{table}")?;
    write_limits(&mut out, &output.limits)
}

/// What of the machine's limits was reached.
fn write_limits(out: &mut impl Write, limits: &Limits) -> Result<()> {
    writeln!(out)?;
    if let (Some(read), Some(part)) = (limits.decode_bytes, limits.decode_part) {
        let read = read / 1e9;
        let bandwidth = limits.read_bandwidth / 1e9;
        let cache = if part > 1.0 { ", out of a cache" } else { "" };
        writeln!(
            out,
            "decode   reads {read:.1} GB/s: {:.0} % of the {bandwidth:.1} that memory gives{cache}",
            part * 100.0
        )?;
    }
    if let Some(part) = limits.prefill_part {
        let bf16 = limits.bf16_operations.map(|peak| format!(", {:.2} of bf16", peak / 1e12));
        writeln!(
            out,
            "prefill  reaches {:.0} % of what the processor can multiply: {:.2} TOP/s of bytes{}, {:.2} of floats",
            part * 100.0,
            limits.byte_operations / 1e12,
            bf16.unwrap_or_default(),
            limits.float_operations / 1e12
        )?;
    }
    Ok(())
}
