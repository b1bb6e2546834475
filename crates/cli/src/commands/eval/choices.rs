use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bevel_eval::{Accuracy, Agreement, Choices, ChoicesConfig, Estimate, Question};
use serde::Serialize;

use super::Args;
use super::file::ModelFile;
use crate::adapters::Adapters;
use crate::args::Global;
use crate::model::{self, Loaded};
use crate::text;
use crate::ui::print_json;
use crate::ui::progress::{Progress, Unit};
use crate::ui::table::Table;
use crate::ui::units::duration;

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    against: Option<&'a str>,
    file: ModelFile,
    choices: &'a Path,
    chat: bool,
    version: &'static str,
    #[serde(flatten)]
    result: Choices,
    /// The base's accuracy, where there is one.
    base: Option<Accuracy>,
    agreement: Option<Agreement>,
}

pub(super) fn run(args: &Args, file: &PathBuf, global: &Global) -> Result<()> {
    let named = || format!("`{}`", file.display());
    let questions = Question::parse_jsonl(&text::read(file)?).with_context(named)?;
    let path = model::resolve(&args.model, global)?;
    let ask = |name: &str, adapters: &Adapters, label: &str| {
        let Loaded { model, tokenizer, cpu, .. } =
            model::load(name, args.products.exact, adapters, global)?;
        let template = args.chat.then(|| tokenizer.chat_template(false)).transpose();
        let template = template.with_context(|| format!("--chat: `{name}`"))?;
        let config = ChoicesConfig { context: args.ctx, kv_type: args.kv.kv.into() };
        let bar = Progress::new(global, label, questions.len() as u64, Unit::Items);
        config
            .run(&model, &tokenizer, &cpu, &questions, template.as_ref(), &mut |done| {
                bar.set(done as u64);
            })
            .with_context(named)
    };
    let base = args
        .against
        .as_deref()
        .map(|base| ask(base, &args.base_adapters(), "asking the base"))
        .transpose()?;
    let result = ask(&args.model, &args.adapters, "asking")?;
    let agreement = base.as_ref().map(|base| result.agreement(base));

    if global.json {
        return print_json(&Output {
            model: &args.model,
            against: args.against.as_deref(),
            file: ModelFile::of(&path)?,
            choices: file,
            chat: args.chat,
            version: bevel_compress::VERSION,
            result,
            base: base.map(|base| base.accuracy),
            agreement,
        });
    }
    print(&result, base.as_ref(), agreement)
}

fn print(result: &Choices, base: Option<&Choices>, agreement: Option<Agreement>) -> Result<()> {
    let percent = |e: Estimate| format!("{:.2} ± {:.2}", 100.0 * e.value, 100.0 * e.error);
    let mut table = Table::new(&["<%", "questions", "acc", "acc_norm", "by tokens"]);
    let mut row = |name: &str, a: &Accuracy| {
        let parts = [a.acc, a.acc_norm, a.acc_tokens].map(percent);
        table.row([name.to_owned(), a.questions.to_string()].into_iter().chain(parts));
    };
    for subject in &result.subjects {
        row(&subject.subject, &subject.accuracy);
    }
    row("all", &result.accuracy);
    if let Some(base) = base {
        row("base", &base.accuracy);
    }
    let mut out = std::io::stdout().lock();
    write!(out, "{table}")?;
    writeln!(out)?;
    if let Some(agreement) = agreement {
        let signed = |e: Estimate| format!("{:+.2} ± {:.2}", 100.0 * e.value, 100.0 * e.error);
        let mut table = Table::new(&["<against the base, %", "acc", "acc_norm"]);
        table.row(["same choice".to_owned(), percent(agreement.acc), percent(agreement.acc_norm)]);
        let changes = [agreement.acc_difference, agreement.acc_norm_difference].map(signed);
        table.row(["change".to_owned()].into_iter().chain(changes));
        writeln!(out, "{table}")?;
    }
    let took = duration(std::time::Duration::from_secs_f64(result.seconds));
    writeln!(out, "{} tokens run in {took}", result.tokens)?;
    Ok(())
}
