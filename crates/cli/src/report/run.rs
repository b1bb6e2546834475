//! The page of one run of `bevel quantize`.

use std::fmt::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use bevel_compress::{Base, Report, TensorReport};
use bevel_eval::{Bench, Machine, peak_memory};
use bevel_kernels::Cpu;
use bevel_model::{Place, Stage};
use serde::Serialize;

use super::bars::{self, Bar};
use super::layers::{self, LayerError, Panel};
use super::{Share, digits, escape, median, page};
use crate::commands::eval::Compared;
use crate::ui::plain;
use crate::ui::units::{bytes, duration, rate};

/// Everything a run found out: what `report.json` holds.
#[derive(Debug, Serialize)]
pub(crate) struct RunReport {
    #[serde(flatten)]
    pub(crate) report: Report,
    pub(crate) command: String,
    pub(crate) machine: Machine,
    /// Of the whole command so far.
    pub(crate) seconds: f64,
    /// Of these for calibration data.
    pub(crate) calibration_seconds: Option<f64>,
    pub(crate) peak_memory_bytes: Option<u64>,
    pub(crate) statistics: Option<Rate>,
    pub(crate) measured: Option<Measured>,
    /// Why nothing was measured.
    pub(crate) not_measured: Option<String>,
}

/// How fast statistics were gathered.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Rate {
    pub(crate) operations_per_second: f64,
    /// What the processor reached without memory, right after.
    pub(crate) peak_operations_per_second: f64,
}

/// What was lost and won.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    #[serde(flatten)]
    pub(crate) compared: Compared,
    /// What `bevel compare` shows.
    pub(crate) decode_tokens_per_second: f64,
    pub(crate) speed: Bench,
    pub(crate) base_speed: Bench,
    pub(crate) seconds: f64,
}

impl RunReport {
    /// That of a run which has written its model and measured nothing so far.
    pub(crate) fn begun(report: Report, start: Instant, cpu: &Cpu) -> Self {
        Self {
            report,
            command: std::env::args().collect::<Vec<_>>().join(" "),
            machine: Machine::new(cpu),
            seconds: start.elapsed().as_secs_f64(),
            calibration_seconds: None,
            peak_memory_bytes: peak_memory(),
            statistics: None,
            measured: None,
            not_measured: Some("the run was ended before that".to_owned()),
        }
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.compared.divergence;
        writeln!(
            f,
            "\nKL divergence from the source  {:.5} ± {:.5} nats, same top token {:.1} %, on {} tokens of {}",
            d.kl.value,
            d.kl.error,
            100.0 * d.same_top.value,
            d.perplexity.scored_tokens,
            plain(&self.compared.text.display().to_string())
        )?;
        let speed = |bench: &Bench| rate(median(&bench.decode));
        writeln!(
            f,
            "decode {} tokens/s, the source {}\n",
            speed(&self.speed),
            speed(&self.base_speed)
        )
    }
}

/// Lines of a recipe that are shown unfolded.
const LONGEST_RECIPE: usize = 24;

/// The page.
pub(crate) fn html(run: &RunReport) -> String {
    let title = format!("{} as {}", source(run), kind(run));
    let body =
        [heading(run, &title), summary(run), errors(run), sizes(run), tensors(run), made(run)];
    page(&format!("bevel: {title}"), &body.concat())
}

fn source(run: &RunReport) -> String {
    let path = &run.report.input;
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into())
}

/// What was asked for, in a word or two.
fn kind(run: &RunReport) -> String {
    let recipe = &run.report.recipe;
    let base = match recipe.base {
        Base::Keep => "a mix of its own".to_owned(),
        base => base.to_string(),
    };
    if recipe.method.is_calibrated() { format!("{base}, by {}", recipe.method) } else { base }
}

fn heading(run: &RunReport, title: &str) -> String {
    let t = &run.report.totals;
    let mut lead = format!(
        "From {} to {}: {:.2} bits a weight instead of {:.2}.",
        bytes(t.bytes_before),
        bytes(t.bytes_after),
        t.bits_per_weight_after,
        t.bits_per_weight_before
    );
    if let Some(measured) = &run.measured {
        let _ = write!(
            lead,
            " For {:.0} % of tokens it would have chosen the same next one, and it writes {:.2} times as fast.",
            100.0 * measured.compared.divergence.same_top.value,
            median(&measured.speed.decode) / median(&measured.base_speed.decode)
        );
    }
    let mut out = format!("<header>\n<h1>{}</h1>\n<p class=\"lead\">{lead}</p>\n", escape(title));
    if let Some(reason) = &run.not_measured {
        let _ = writeln!(
            out,
            "<p class=\"note\">Quality and speed were not measured: {}</p>",
            escape(reason)
        );
    }
    out += "</header>\n";
    if run.report.warnings.is_empty() {
        return out;
    }
    out += "<section>\n<h2>What went otherwise than asked for</h2>\n<ul>\n";
    for warning in &run.report.warnings {
        let _ = writeln!(out, "<li>{}</li>", escape(warning));
    }
    out + "</ul>\n</section>\n"
}

/// Before and after, and what each figure means.
fn summary(run: &RunReport) -> String {
    let t = &run.report.totals;
    let mut out = String::from(
        "<section>\n<table class=\"meanings\">\n<thead><tr><th scope=\"col\"></th><th>before</th><th>after</th><th class=\"words\">what it is</th></tr></thead>\n<tbody>\n",
    );
    let mut row = |name: &str, before: &str, after: &str, meaning: &str| {
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{name}</th><td>{before}</td><td>{after}</td><td class=\"words\">{meaning}</td></tr>"
        );
    };
    row("size", &bytes(t.bytes_before), &bytes(t.bytes_after), "all weights as they are stored");
    row(
        "bits a weight",
        &format!("{:.2}", t.bits_per_weight_before),
        &format!("{:.2}", t.bits_per_weight_after),
        "the scales that belong to small groups of weights counted",
    );
    if let Some((after, before)) = run.report.output_error() {
        let percent = |error: f64| format!("{:.2} %", 100.0 * error.sqrt());
        let rounding = before.map(percent).unwrap_or_default();
        row(
            "error of the layers’ outputs",
            &format!("{rounding}<br><small>by rounding</small>"),
            &percent(after),
            "how far what the quantized layers compute is off, on the calibration data; mean over all matrices. Beside it what it would be with each weight rounded to the nearest number",
        );
    }
    let predicted = run.report.allocation.as_ref().map(|allocation| allocation.predicted_kl);
    match (&run.measured, predicted) {
        (Some(measured), _) => quality(measured, predicted, &mut row),
        (None, Some(predicted)) => row(
            "KL divergence, predicted",
            "0",
            &thousandths(predicted),
            "in thousandths of a nat: the sum of what each tensor’s type costs alone, by which types were chosen",
        ),
        (None, None) => {}
    }
    out += "</tbody>\n</table>\n";
    if let Some(Measured { compared, speed, seconds, .. }) = &run.measured {
        let _ = writeln!(
            out,
            "<p class=\"caption\">Quality: measured on {} tokens of {}, in windows of {} of which the second half is scored (llama.cpp’s convention); ± is one standard error. Both models read the same text, so the change of perplexity is surer than either. This is a small measurement, made with every run to notice what went wrong; <code>bevel eval --against</code> makes a large one. Speed: medians of {} runs, prompts of {} tokens, answers of {}. Measuring took {}.</p>",
            compared.divergence.perplexity.scored_tokens,
            escape(&compared.text.display().to_string()),
            compared.context,
            speed.decode.as_ref().map_or(0, |s| s.samples.len()),
            speed.prefill.as_ref().map_or(0, |s| s.tokens),
            speed.decode.as_ref().map_or(0, |s| s.tokens),
            duration(Duration::from_secs_f64(*seconds)),
        );
    }
    out + "</section>\n"
}

fn thousandths(nats: f64) -> String {
    digits(nats * 1e3, 3)
}

/// `predicted` is the divergence that types were chosen by.
fn quality(
    measured: &Measured,
    predicted: Option<f64>,
    row: &mut dyn FnMut(&str, &str, &str, &str),
) {
    let d = &measured.compared.divergence;
    let mut kl =
        format!("{} <small>± {}</small>", thousandths(d.kl.value), digits(d.kl.error * 1e3, 2));
    let mut meaning = format!(
        "how different the two models’ predictions of the next token are, in thousandths of a nat; below 1 can hardly be noticed, above 100 is another model. Half of the tokens are below {}, one in a hundred above {}",
        thousandths(d.kl_quantiles.median),
        thousandths(d.kl_quantiles.q99)
    );
    if let Some(predicted) = predicted {
        kl += &format!("<br><small>predicted {}</small>", thousandths(predicted));
        meaning += ". Predicted: the sum of what each tensor’s type costs alone, by which types were chosen";
    }
    row("KL divergence", "0", &kl, &meaning);
    row(
        "same likeliest token",
        "100 %",
        &format!(
            "{:.1} % <small>± {:.1}</small>",
            100.0 * d.same_top.value,
            100.0 * d.same_top.error
        ),
        "how often both find the same next token likeliest",
    );
    row(
        "perplexity",
        &format!("{:.3}", d.base_perplexity.value),
        &format!(
            "{:.3}<br><small>{:+.3} ± {:.3}</small>",
            d.perplexity.perplexity, d.difference.value, d.difference.error
        ),
        "as if it had to choose among so many tokens; lower is better. Below it the change",
    );
    let speed = |bench: &Bench| [&bench.prefill, &bench.decode].map(|s| rate(median(s)));
    let ([read, write], [base_read, base_write]) =
        (speed(&measured.speed), speed(&measured.base_speed));
    row("reading, tokens/s", &base_read, &read, "how fast it takes in a prompt (prefill)");
    row("writing, tokens/s", &base_write, &write, "how fast it answers (decode)");
}

/// The mean error of a tensor's matrices before and after, in percent.
fn output_errors(tensor: &TensorReport) -> Option<(Option<f64>, f64)> {
    let count = tensor.solved.len() as f64;
    let after: f64 = tensor.solved.iter().map(|s| s.error).sum();
    let before: Option<f64> = tensor.solved.iter().map(|s| s.rtn_error).sum();
    let percent = |sum: f64| 100.0 * (sum / count).sqrt();
    (!tensor.solved.is_empty()).then(|| (before.map(percent), percent(after)))
}

fn errors(run: &RunReport) -> String {
    let is_solved = run.report.tensors.iter().any(|t| !t.solved.is_empty());
    let mut panels: Vec<(Option<Stage>, Panel)> = Vec::new();
    for tensor in &run.report.tensors {
        let Place::Layer(layer, name) = Place::of(&tensor.name) else { continue };
        let errors = match is_solved {
            true => output_errors(tensor),
            false => (tensor.relative_error > 0.0).then_some((None, 100.0 * tensor.relative_error)),
        };
        let Some((before, after)) = errors else { continue };
        let point = LayerError { layer, before, after };
        let name = name.strip_suffix(".weight").unwrap_or(name);
        match panels.iter_mut().find(|(_, panel)| panel.name == name) {
            Some((_, panel)) => panel.points.push(point),
            None => {
                let panel = Panel { name: name.to_owned(), points: vec![point] };
                panels.push((Stage::of(&format!("{name}.weight")), panel));
            }
        }
    }
    if panels.is_empty() {
        return String::new();
    }
    // In the order of computation; what is none of the linear layers, last.
    panels.sort_by_key(|(stage, _)| stage.map_or(usize::MAX, |stage| stage as usize));
    let mut panels: Vec<Panel> = panels.into_iter().map(|(_, panel)| panel).collect();
    panels.iter_mut().for_each(|panel| panel.points.sort_by_key(|point| point.layer));
    if is_solved {
        return layers::html(&panels, "Error of each layer’s outputs, %")
            + "<p class=\"caption\">Each plot is one kind of matrix, from the first layer on the left to the last; all have one scale. The error is the root of tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), where H comes from the inputs that the layer gets in this model, whose layers before are quantized already. The dashed line is an estimate from up to 64 rows of each matrix.</p>\n</section>\n";
    }
    layers::html(&panels, "How far each layer’s weights moved, %")
        + "<p class=\"caption\">Each plot is one kind of matrix, from the first layer on the left to the last; all have one scale: √(Σ(w − ŵ)² / Σw²). What that does to the outputs a calibrated method tells (<code>--method gptq</code>).</p>\n</section>\n"
}

fn sizes(run: &RunReport) -> String {
    let tensors = || run.report.tensors.iter();
    let before = Share::sum(tensors().map(|t| (t.from.to_string(), t.bytes_before)));
    let after = Share::sum(tensors().map(|t| (t.to.to_string(), t.bytes_after)));
    let bars = [Bar { name: "before", shares: &before }, Bar { name: "after", shares: &after }];
    format!("<section>\n{}</section>\n", bars::html(&bars))
}

/// All tensors, folded away.
fn tensors(run: &RunReport) -> String {
    let is_solved = run.report.tensors.iter().any(|t| !t.solved.is_empty());
    let mut out = format!(
        "<section>\n<details>\n<summary>All {} tensors</summary>\n<table class=\"tight\">\n<thead><tr><th scope=\"col\">tensor</th><th>shape</th><th>from</th><th>to</th><th>size</th><th>weights<br>moved</th>",
        run.report.tensors.len()
    );
    if is_solved {
        out += "<th>outputs,<br>by rounding</th><th>outputs</th>";
    }
    out += "<th class=\"words\">notes</th></tr></thead>\n<tbody>\n";
    let percent = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{v:.3} %"));
    for tensor in &run.report.tensors {
        let moved = (tensor.relative_error > 0.0).then_some(100.0 * tensor.relative_error);
        let _ = write!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>",
            escape(&tensor.name),
            tensor.shape,
            tensor.from,
            tensor.to,
            bytes(tensor.bytes_after),
            percent(moved)
        );
        if is_solved {
            let errors = output_errors(tensor);
            let before = errors.and_then(|(before, _)| before);
            let after = errors.map(|(_, after)| after);
            let _ = write!(out, "<td>{}</td><td>{}</td>", percent(before), percent(after));
        }
        let _ = writeln!(out, "<td class=\"words\">{}</td></tr>", escape(&notes(tensor)));
    }
    out += "</tbody>\n</table>\n<p class=\"caption\">Weights moved: √(Σ(w − ŵ)² / Σw²), how far the values are from what they were, as a part of their size.";
    if is_solved {
        out += " Outputs: the error of what the matrix computes on the calibration data, which is what a calibrated method makes small; weights may move further for that. By rounding: what it would be with each weight rounded to the nearest number of the same type.";
    }
    out + "</p>\n</details>\n</section>\n"
}

/// What is worth saying about a tensor.
fn notes(tensor: &TensorReport) -> String {
    let mut notes = Vec::new();
    if let Some(wanted) = tensor.wanted {
        notes.push(format!("should be {wanted}, which does not fit its rows"));
    }
    let solved = &tensor.solved;
    let count = |holds: &dyn Fn(&bevel_compress::solve::SolveReport) -> bool| {
        solved.iter().filter(|s| holds(s)).count()
    };
    let (alone, blind) =
        (count(&|s| s.fell_back && s.tokens > 0), count(&|s| s.fell_back && s.tokens == 0));
    if blind > 0 {
        notes.push(format!("no calibration token came to {blind} of {} matrices", solved.len()));
    }
    if alone > 0 {
        notes.push("rounded to nearest, with importance".to_owned());
    }
    let damped = count(&|s| s.damping_retries > 0);
    if damped > 0 {
        notes.push(match solved.len() {
            1 => "damping was raised".to_owned(),
            all => format!("damping was raised for {damped} of {all} matrices"),
        });
    }
    let dead: usize = solved.iter().map(|s| s.dead_columns).sum();
    if dead > 0 {
        notes.push(format!("{dead} inputs were always zero"));
    }
    if tensor.saturated > 0 {
        notes.push(format!("{} values were too large", tensor.saturated));
    }
    notes.join("; ")
}

/// How the model was made.
fn made(run: &RunReport) -> String {
    let report = &run.report;
    let machine = &run.machine;
    let memory = |b: Option<u64>| b.map_or("unknown".to_owned(), bytes);
    let mut out = String::from("<section>\n<h2>How it was made</h2>\n<table class=\"plain\">\n");
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(out, "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>");
    };
    let shown = |path: &Path| escape(&path.display().to_string());
    row("source", &shown(&report.input));
    row("its sha256", &format!("<code>{}</code>", report.provenance.source_sha256));
    let recipe = escape(report.provenance.recipe.trim());
    let recipe = format!("<code class=\"block\">{recipe}</code>");
    // A budget's has an entry for each tensor.
    let recipe = match recipe.lines().count() {
        ..=LONGEST_RECIPE => recipe,
        lines => format!("<details><summary>{lines} lines</summary>{recipe}</details>"),
    };
    row("recipe", &recipe);
    if let Some(data) = &report.calibration {
        row("calibration", &escape(&data.description));
        row("its sha256", &format!("<code>{}</code>", data.sha256));
    }
    let files: Vec<String> = report.files.iter().map(|file| shown(file)).collect();
    row("wrote", &files.join("<br>"));
    row("command", &format!("<code>{}</code>", escape(&run.command)));
    row("version", &format!("bevel {}", escape(&report.provenance.version)));
    row("machine", &escape(&machine.cpu));
    row("threads", &format!("{}, {} kernels", machine.threads, escape(&machine.isa)));
    row("system", &format!("{}, {} of memory", escape(&machine.system), memory(machine.memory)));
    row("peak memory", &memory(run.peak_memory_bytes));
    row("took", &times(run));
    if let Some(Rate { operations_per_second, peak_operations_per_second }) = run.statistics {
        row(
            "statistics",
            &format!(
                "{:.1} GFLOP/s, {:.0} % of the {:.0} that the processor reached without memory",
                operations_per_second / 1e9,
                100.0 * operations_per_second / peak_operations_per_second,
                peak_operations_per_second / 1e9
            ),
        );
    }
    out + "</table>\n</section>\n"
}

/// The time of each step.
fn times(run: &RunReport) -> String {
    let times = &run.report.times;
    let shown = |seconds: f64| duration(Duration::from_secs_f64(seconds));
    let mut steps: Vec<(&str, f64)> = Vec::new();
    steps.extend(run.calibration_seconds.map(|s| ("calibration data", s)));
    steps.extend(times.steps.iter().map(|&(step, seconds)| {
        let name = match step {
            "hash" => "hashing the source",
            "types" => "choosing types within the budget",
            "forward" => "running the model layer by layer",
            "statistics" => "statistics of the layers’ inputs",
            "scales" => "searching scales of channels",
            "solve" => "choosing codes",
            "compare" => "comparing with rounding",
            "keep" => "keeping what is done, for a run that goes on",
            "write" => "packing and writing",
            other => other,
        };
        (name, seconds)
    }));
    steps.extend(run.measured.as_ref().map(|m| ("measuring", m.seconds)));
    let steps: Vec<String> =
        steps.iter().map(|(name, seconds)| format!("{name} {}", shown(*seconds))).collect();
    let mut text = format!("{}: {}", shown(run.seconds), steps.join(", "));
    if times.taken_up > 0 {
        let _ = write!(
            text,
            ". The run went on with another one, which had done {} parts (layers, and the output head); their time is not counted",
            times.taken_up
        );
    }
    text
}
