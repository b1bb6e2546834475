//! The `bevel` binary: flags in, library calls, messages and tables out.

#![forbid(unsafe_code)]

mod adapters;
mod answer;
mod args;
mod calibration;
mod commands;
mod embedded;
mod generation;
mod model;
mod report;
mod sampling;
mod text;
mod training_data;
mod training_record;
mod ui;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    ui::panic::install();
    let cli = args::Cli::parse();
    ui::interrupt::install();
    bevel_base::refuse_writes_past_the_limit();
    bevel_base::keep_freed_memory();
    let outcome = std::panic::catch_unwind(|| commands::run(&cli));
    ui::exit_code(&cli.global, outcome)
}
