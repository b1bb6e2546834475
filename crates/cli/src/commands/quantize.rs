//! `bevel quantize`.

use anyhow::Result;

use crate::args::Global;

/// Options of `bevel quantize`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model
    model: String,
}

pub(crate) fn run(args: &Args, _global: &Global) -> Result<()> {
    anyhow::bail!("`quantize` of `{}` is not built yet", args.model)
}
