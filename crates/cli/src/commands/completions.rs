//! `bevel completions`: a shell's completion script.

use std::io::Write;

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;

/// Options of `bevel completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell to write it for
    shell: Shell,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // Into memory first: the generator panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "bevel", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(())
}
