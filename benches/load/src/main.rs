//! Sends a mixture of requests to a server that speaks OpenAI's API and reports how long clients waited.
//!
//! `cargo run --release --manifest-path benches/load/Cargo.toml -- URL --text FILE`
//!
//! Requests and their times are random numbers of a seed, so two servers given the same options get the same
//! load. Clients come at random times (a Poisson process, `--rate`), or a fixed number of them asks one
//! request after the other (`--clients`).

mod client;
mod mix;
mod statistics;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use client::Outcome;
use mix::{Mix, Planned};
use statistics::Quantiles;

/// Loads a server.
#[derive(Debug, Parser)]
struct Args {
    /// The server, for example http://127.0.0.1:8080
    url: String,

    /// Prompts are pieces of this text
    #[arg(long)]
    text: std::path::PathBuf,

    /// Requests in all
    #[arg(long, default_value_t = 64)]
    requests: usize,

    /// Clients that ask one request after the other
    #[arg(long, default_value_t = 16, conflicts_with = "rate")]
    clients: usize,

    /// Requests that come in a second, at random times
    #[arg(long)]
    rate: Option<f64>,

    /// Words that every prompt begins with
    #[arg(long, default_value_t = 0)]
    prefix: usize,

    /// Words of a prompt, from .. to; lengths between are equally likely on a logarithmic scale
    #[arg(long, num_args = 2, default_values_t = [20, 400])]
    prompt: Vec<usize>,

    /// Tokens of an answer, from .. to
    #[arg(long, num_args = 2, default_values_t = [16, 128])]
    answer: Vec<usize>,

    /// The model to ask for
    #[arg(long)]
    model: Option<String>,

    /// Start of the random numbers
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Requests that are sent before anything is measured
    #[arg(long, default_value_t = 2)]
    warm_up: usize,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    requests: usize,
    errors: Vec<String>,
    seconds: f64,
    prompt_tokens: usize,
    answer_tokens: usize,
    /// Tokens of answers, of all clients together.
    tokens_per_second: f64,
    /// Prompts counted.
    tokens_per_second_with_prompts: f64,
    first_token_seconds: Quantiles,
    between_tokens_seconds: Quantiles,
    whole_request_seconds: Quantiles,
    /// Of samples taken ten times a second, where the server tells: the mean part of places in used blocks
    /// that are empty.
    kv_waste: Option<f64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.requests == 0 || args.clients == 0 || args.rate.is_some_and(|rate| rate <= 0.0) {
        bail!("there has to be something to do");
    }
    let text = std::fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read `{}`", args.text.display()))?;
    let mut mix =
        Mix::new(&text, args.prefix, range(&args.prompt)?, range(&args.answer)?, args.seed)?;
    for planned in mix.take(args.warm_up, None) {
        client::ask(&args.url, args.model.as_deref(), &planned).context("the first request")?;
    }
    let plan = mix.take(args.requests, args.rate);
    let report = run(&args, &plan);
    println!("{}", serde_json::to_string_pretty(&report)?);
    if report.errors.len() == report.requests {
        bail!("no request succeeded");
    }
    Ok(())
}

fn range(bounds: &[usize]) -> Result<(usize, usize)> {
    match *bounds {
        [from, to] if 0 < from && from <= to => Ok((from, to)),
        _ => bail!("expected two numbers from 1 up, the second not smaller: {bounds:?}"),
    }
}

fn run(args: &Args, plan: &[Planned]) -> Report {
    let model = args.model.as_deref();
    let outcomes = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let running = AtomicUsize::new(1);
    let start = Instant::now();
    let send = |planned: &Planned| {
        let outcome = client::ask(&args.url, model, planned);
        outcomes.lock().expect("no client panics").push(outcome);
    };
    let send_at = |planned: &Planned| {
        let due = Duration::from_secs_f64(planned.at);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        send(planned);
    };
    let send_in_turn = || {
        while let Some(planned) = plan.get(next.fetch_add(1, Ordering::Relaxed)) {
            send(planned);
        }
    };
    let waste = std::thread::scope(|scope| {
        let waste = scope.spawn(|| watch_waste(&args.url, &running));
        let clients: Vec<_> = match args.rate {
            Some(_) => plan.iter().map(|planned| scope.spawn(|| send_at(planned))).collect(),
            None => (0..args.clients).map(|_| scope.spawn(send_in_turn)).collect(),
        };
        for client in clients {
            client.join().expect("no client panics");
        }
        running.store(0, Ordering::Relaxed);
        waste.join().expect("nothing panics")
    });
    let seconds = start.elapsed().as_secs_f64();
    report(outcomes.into_inner().expect("no client panicked"), seconds, waste)
}

fn report(outcomes: Vec<Result<Outcome>>, seconds: f64, kv_waste: Option<f64>) -> Report {
    let requests = outcomes.len();
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    for outcome in outcomes {
        match outcome {
            Ok(outcome) => done.push(outcome),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    let prompt_tokens: usize = done.iter().map(|outcome| outcome.prompt_tokens).sum();
    let answer_tokens: usize = done.iter().map(|outcome| outcome.answer_tokens).sum();
    Report {
        requests,
        errors,
        seconds,
        prompt_tokens,
        answer_tokens,
        tokens_per_second: answer_tokens as f64 / seconds,
        tokens_per_second_with_prompts: (prompt_tokens + answer_tokens) as f64 / seconds,
        first_token_seconds: Quantiles::of(
            done.iter().map(|outcome| outcome.first_token).collect(),
        ),
        between_tokens_seconds: Quantiles::of(
            done.iter().flat_map(|outcome| outcome.between_tokens.iter().copied()).collect(),
        ),
        whole_request_seconds: Quantiles::of(done.iter().map(|outcome| outcome.whole).collect()),
        kv_waste,
    }
}

/// Looks at the server's waste until nobody runs any more.
fn watch_waste(url: &str, running: &AtomicUsize) -> Option<f64> {
    let mut samples = Vec::new();
    while running.load(Ordering::Relaxed) > 0 {
        samples.extend(client::metric(url, "bevel:kv_waste"));
        std::thread::sleep(Duration::from_millis(100));
    }
    (!samples.is_empty()).then(|| samples.iter().sum::<f64>() / samples.len() as f64)
}
