//! `bevel eval`.

use anyhow::Result;

use crate::args::Global;

/// Options of `bevel eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model
    model: String,
}

pub(crate) fn run(args: &Args, _global: &Global) -> Result<()> {
    anyhow::bail!("`eval` of `{}` is not built yet", args.model)
}
