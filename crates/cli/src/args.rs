//! The command line's one definition: parsing, help, man pages and completions come from it.

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::{
    bench, chat, compare, completions, convert, eval, finetune, imatrix, inspect, man, merge,
    quantize, run, serve, tour,
};

const ABOUT: &str = "cut a language model to fit a small machine, and run it there";

const MODEL_HELP: &str = "\
MODEL is one of
  a path        a .gguf file (or the first of its shards), or a Hugging Face directory
  a hub name    owner/name, owner/name@revision, owner/name:Q4_K_M or owner/name:file.gguf;
                fetched once into the Hugging Face cache
  smollm2       SmolLM2-135M-Instruct, from the hub or, where there is none, a Python package
  tiny-austen   a model of 4 million parameters inside this program, for trying things out

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C,
143 by the system (SIGTERM).";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "bevel", version, about = ABOUT, after_help = MODEL_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what a model is made of; reads headers only
    Inspect(inspect::Args),
    /// Convert a model between formats
    Convert(convert::Args),
    /// Make a model smaller by storing its weights in fewer bits
    Quantize(Box<quantize::Args>),
    /// Make a model and an adapter of it one model
    Merge(merge::Args),
    /// Find out which inputs of a model's weights are large, for rounding with importance
    Imatrix(imatrix::Args),
    /// Teach a model from examples: train an adapter beside it, or the model itself
    Finetune(Box<finetune::Args>),
    /// Measure how well a model predicts a text
    Eval(eval::Args),
    /// Write a page that compares measured models
    Compare(compare::Args),
    /// Measure speed and memory
    Bench(bench::Args),
    /// Continue a text, or answer one question
    Run(run::Args),
    /// Talk with a model
    Chat(chat::Args),
    /// Answer requests over HTTP, as OpenAI's and Anthropic's APIs have them, and in a browser
    Serve(Box<serve::Args>),
    /// Evaluate, quantize and compare a model, and write a report
    Tour(tour::Args),
    /// Print a shell's completion script
    Completions(completions::Args),
    /// Print the manual, or write one page for each command
    Man(man::Args),
}

/// Options that mean the same for every verb.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Threads; 0 means one for each processor
    #[arg(short, long, global = true, value_name = "N", allow_negative_numbers = true, default_value_t = 0, value_parser = threads)]
    pub(crate) threads: usize,

    /// Start of the random numbers; a run with the same seed gives the same result
    #[arg(long, global = true, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,

    /// Print results, warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,

    /// Say more about what happens
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,

    /// Print exactly one JSON object on stdout, and everything else on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Colour messages
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: Color,
}

/// When to colour messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// More threads than any machine has are a slip of the finger, and each one costs memory.
fn threads(text: &str) -> Result<usize, String> {
    const MOST: usize = 1024;
    match text.parse() {
        Ok(n) if n <= MOST => Ok(n),
        _ => Err(format!("expected a number from 0 to {MOST}")),
    }
}

/// Reads `5GB`, `500M` or `1000000`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_uppercase().trim_end_matches('B') {
        "" => 1.0,
        "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        _ => return Err("expected a size such as 5GB or 500M".to_owned()),
    };
    match number.parse::<f64>().map(|n| n * factor) {
        Ok(size) if (1.0..1e18).contains(&size) => Ok(size as u64),
        _ => Err("expected a size such as 5GB or 500M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("1.5M"), Ok(1_500_000));
        assert_eq!(size("17"), Ok(17));
        assert!(size("5 apples").is_err());
        assert!(size("0").is_err());
    }
}
