//! One verb a file: its options, and what it does with them.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod eval;
pub(crate) mod finetune;
pub(crate) mod imatrix;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod merge;
pub(crate) mod quantize;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod tour;

use crate::args::{Cli, Command};

/// Runs the verb that the command line names.
pub(crate) fn run(cli: &Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match &cli.command {
        Command::Inspect(args) => inspect::run(args, global),
        Command::Convert(args) => convert::run(args, global),
        Command::Quantize(args) => quantize::run(args, global),
        Command::Merge(args) => merge::run(args, global),
        Command::Imatrix(args) => imatrix::run(args, global),
        Command::Finetune(args) => finetune::run(args, global),
        Command::Eval(args) => eval::run(args, global),
        Command::Compare(args) => compare::run(args, global),
        Command::Bench(args) => bench::run(args, global),
        Command::Run(args) => run::run(args, global),
        Command::Chat(args) => chat::run(args, global),
        Command::Serve(args) => serve::run(args, global),
        Command::Tour(args) => tour::run(args, global),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
    }
}
