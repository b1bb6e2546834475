//! `bevel run`.

use anyhow::Result;

use crate::args::Global;

/// Options of `bevel run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model
    model: String,
}

pub(crate) fn run(args: &Args, _global: &Global) -> Result<()> {
    anyhow::bail!("`run` of `{}` is not built yet", args.model)
}
