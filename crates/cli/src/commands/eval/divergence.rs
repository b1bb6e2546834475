use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bevel_eval::{
    BaseLogits, Divergence, DivergenceConfig, Estimate, ModelDigest, Quantiles, Running,
    check_vocabulary,
};
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use serde::Serialize;

use super::file::ModelFile;
use super::{Args, perplexity, warn_of_long_windows};
use crate::adapters::Adapters;
use crate::args::Global;
use crate::model::{self, Loaded};
use crate::ui::print_json;
use crate::ui::progress::{Progress, Unit};
use crate::ui::table::Table;

/// What `--json` prints, and `bevel compare` reads.
#[derive(Debug, Serialize)]
pub(crate) struct Output {
    model: String,
    pub(crate) against: String,
    file: ModelFile,
    /// `None` where the base is a file of predictions.
    base_file: Option<ModelFile>,
    pub(crate) text: PathBuf,
    convention: &'static str,
    pub(crate) context: usize,
    threads: usize,
    isa: String,
    version: &'static str,
    #[serde(flatten)]
    pub(crate) divergence: Divergence,
}

impl Output {
    /// What was found of the model at `path`, which the user calls `model`.
    pub(crate) fn new(
        [model, against]: [&str; 2],
        path: &Path,
        base: Option<&Path>,
        text: PathBuf,
        context: usize,
        cpu: &Cpu,
        divergence: Divergence,
    ) -> Result<Self> {
        Ok(Self {
            model: model.to_owned(),
            against: against.to_owned(),
            file: ModelFile::of(path)?,
            base_file: base.map(ModelFile::of).transpose()?,
            text,
            convention: "llama.cpp",
            context,
            threads: cpu.pool().threads(),
            isa: cpu.isa().to_string(),
            version: bevel_compress::VERSION,
            divergence,
        })
    }
}

/// Where the base's predictions come from.
enum Base {
    Model(Box<Loaded>),
    File(BaseLogits),
}

pub(super) fn run(args: &Args, base: &str, global: &Global) -> Result<()> {
    let content = args.read()?;
    let context = args.window();
    let config = DivergenceConfig {
        context,
        kv_type: args.kv.kv.into(),
        base_kv_type: args.base_kv.unwrap_or(args.kv.kv).into(),
    };
    let path = model::resolve(&args.model, global)?;
    let (base, base_file) = open_base(args, base, &config, &content, global)?;
    let Loaded { model, tokenizer, cpu, .. } =
        model::load(&args.model, args.products.exact, &args.adapters, global)?;
    let text = args.encode(&tokenizer, &content)?;
    warn_of_long_windows(context, model.config().context, global);

    let bar = Progress::new(global, "comparing", text.tokens.len() as u64, Unit::Items);
    let divergence = match &base {
        Base::Model(base) => {
            check_vocabulary(&base.tokenizer, &tokenizer)?;
            config.compare(&base.model, &model, &cpu, &text, &mut |r| show(&bar, r))
        }
        Base::File(base) => {
            config.compare_with_file(base, &model, &cpu, &text, &mut |r| show(&bar, r))
        }
    }?;
    drop(bar);

    if global.json {
        let names = [args.model.as_str(), args.against.as_deref().unwrap_or_default()];
        let (source, base) = (args.source(), base_file.as_deref());
        let output = Output::new(names, &path, base, source, context, &cpu, divergence)?;
        return print_json(&output);
    }
    print(&divergence, context)
}

/// The base with the path of its model, if it is one. With `--base-logits` it runs here, unless the
/// file is there already.
fn open_base(
    args: &Args,
    base: &str,
    config: &DivergenceConfig,
    content: &str,
    global: &Global,
) -> Result<(Base, Option<PathBuf>)> {
    if BaseLogits::is_one(Path::new(base)) {
        ensure!(
            args.base_logits.is_none(),
            "`{base}` is a file of predictions already; leave --base-logits out"
        );
        ensure!(
            !args.base_exact,
            "`{base}` is a file of predictions already; leave --base-exact out"
        );
        ensure!(
            args.base_adapter.is_empty(),
            "`{base}` is a file of predictions already; leave --base-adapter out"
        );
        return Ok((Base::File(BaseLogits::open(Path::new(base))?), None));
    }
    let path = model::resolve(base, global)?;
    let exact = args.products.exact || args.base_exact;
    let Some(file) = &args.base_logits else {
        let loaded = model::load(base, exact, &args.base_adapters(), global)?;
        return Ok((Base::Model(Box::new(loaded)), Some(path)));
    };
    if file.exists() {
        ensure!(
            !args.base_exact,
            "`{}` holds predictions already, with or without --base-exact: leave it out, or name another file",
            file.display()
        );
        let logits = BaseLogits::open(file)?;
        let checkpoint = model::open(base, global)?;
        let cpu = model::cpu(global)?;
        logits.check_model(&ModelDigest::of(&checkpoint, &cpu)?)?;
        return Ok((Base::File(logits), Some(path)));
    }
    let loaded = model::load(base, exact, &Adapters::default(), global)?;
    let candidate = model::open(&args.model, global)?;
    // Before the base runs for nothing.
    check_vocabulary(&loaded.tokenizer, &candidate.tokenizer()?)?;
    record(args, config, &loaded, file, content, global)
        .with_context(|| format!("cannot keep the base's predictions in `{}`", file.display()))?;
    Ok((Base::File(BaseLogits::open(file)?), Some(path)))
}

fn record(
    args: &Args,
    config: &DivergenceConfig,
    base: &Loaded,
    file: &Path,
    content: &str,
    global: &Global,
) -> Result<()> {
    let (tokenizer, cpu): (&Tokenizer, &Cpu) = (&base.tokenizer, &base.cpu);
    let text = args.encode(tokenizer, content)?;
    let bar = Progress::new(global, "running the base", text.tokens.len() as u64, Unit::Items);
    config.record(&base.model, cpu, &text, file, &mut |running| show(&bar, running))?;
    Ok(())
}

fn show(bar: &Progress, running: Running) {
    bar.set_total(running.total as u64);
    bar.set(running.done as u64);
    match (running.kl, running.perplexity) {
        (Some(kl), _) => bar.message(format!("KL divergence {kl:.5}")),
        (None, Some(perplexity)) => bar.message(format!("perplexity {perplexity:.3}")),
        (None, None) => {}
    }
}

fn print(d: &Divergence, context: usize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let convention = format!("windows of {context} tokens, second half scored (llama.cpp)");
    perplexity::print(&mut out, &d.perplexity, &convention)?;
    let plain = |e: Estimate| format!("{:.5} ± {:.5}", e.value, e.error);
    let percent = |e: Estimate| format!("{:.3} ± {:.3} %", 100.0 * e.value, 100.0 * e.error);
    writeln!(out)?;
    writeln!(out, "base            perplexity {}", plain(d.base_perplexity))?;
    writeln!(out, "difference      {}", plain(d.difference))?;
    writeln!(out, "ln of ratio     {}", plain(d.ln_ratio))?;
    if let Some(correlation) = d.correlation {
        writeln!(out, "correlation     {:.3} %", 100.0 * correlation)?;
    }
    writeln!(out)?;
    writeln!(out, "KL divergence   {} nats", plain(d.kl))?;
    writeln!(out, "same top token  {}", percent(d.same_top))?;
    writeln!(out, "mean Δp         {}", percent(d.delta_p))?;
    writeln!(out, "RMS Δp          {}", percent(d.delta_p_rms))?;
    writeln!(out)?;
    let mut table = Table::new(&["<quantile", "KL, nats", "Δp, %"]);
    for (name, kl, delta) in rows(&d.kl_quantiles, &d.delta_p_quantiles) {
        table.row([name.to_owned(), format!("{kl:.5}"), format!("{:.3}", 100.0 * delta)]);
    }
    write!(out, "{table}")?;
    Ok(())
}

/// Names and values, the greatest first.
fn rows(kl: &Quantiles, delta: &Quantiles) -> [(&'static str, f64, f64); 13] {
    [
        ("maximum", kl.max, delta.max),
        ("99.9 %", kl.q999, delta.q999),
        ("99 %", kl.q99, delta.q99),
        ("95 %", kl.q95, delta.q95),
        ("90 %", kl.q90, delta.q90),
        ("75 %", kl.q75, delta.q75),
        ("median", kl.median, delta.median),
        ("25 %", kl.q25, delta.q25),
        ("10 %", kl.q10, delta.q10),
        ("5 %", kl.q05, delta.q05),
        ("1 %", kl.q01, delta.q01),
        ("0.1 %", kl.q001, delta.q001),
        ("minimum", kl.min, delta.min),
    ]
}
