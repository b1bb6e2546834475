//! The page over several models that were measured against one base.

use std::fmt::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::scatter::{Line, Point, Scatter};
use super::{escape, page};
use crate::ui::units::{bytes, count, rate};

/// The models, the largest first.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) runs: Vec<Run>,
}

/// What is needed of a report of `bevel eval --against`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    pub(crate) model: String,
    pub(crate) against: String,
    pub(crate) file: ModelFile,
    text: String,
    context: usize,
    scored_tokens: u64,
    perplexity: f64,
    base_perplexity: Estimate,
    difference: Estimate,
    kl: Estimate,
    kl_quantiles: Quantiles,
    same_top: Estimate,
    version: String,
    /// From a report of `bevel bench`.
    pub(crate) decode_tokens_per_second: Option<f64>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ModelFile {
    path: String,
    pub(crate) bytes: u64,
    parameters: u64,
    bits_per_weight: f64,
    types: Vec<String>,
    provenance: Option<Provenance>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Provenance {
    recipe: String,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Estimate {
    value: f64,
    error: f64,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Quantiles {
    median: f64,
    q99: f64,
}

impl Run {
    /// The name of the file or directory, without what it lies in.
    pub(crate) fn name(&self) -> String {
        let path = Path::new(&self.file.path);
        let name = path.file_name().map_or(self.model.as_str().into(), |n| n.to_string_lossy());
        name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
    }

    /// Its mix or type: the recipe's, or else the one that most bytes have.
    fn format(&self) -> String {
        let recipe =
            self.file.provenance.as_ref().and_then(|p| p.recipe.parse::<toml::Table>().ok());
        let named = recipe.as_ref().and_then(|recipe| recipe.get("type")?.as_str());
        let most = self.file.types.first().map(String::as_str);
        named.filter(|name| *name != "keep").or(most).unwrap_or("–").to_owned()
    }

    /// Why this and `other` cannot stand in one table, if they cannot.
    pub(crate) fn differs_from(&self, other: &Run) -> Option<String> {
        if self.context != other.context {
            return Some(format!("windows of {} and of {} tokens", self.context, other.context));
        }
        if self.scored_tokens != other.scored_tokens {
            return Some(format!(
                "{} and {} tokens were scored",
                self.scored_tokens, other.scored_tokens
            ));
        }
        // Files of predictions and models are named differently, but their perplexity tells them apart.
        let (a, b) = (self.base_perplexity.value, other.base_perplexity.value);
        let same = (a / b - 1.0).abs() < 1e-4;
        (!same).then(|| format!("their bases have perplexities {a:.4} and {b:.4}"))
    }
}

/// The page.
pub(crate) fn html(comparison: &Comparison) -> String {
    let Some(first) = comparison.runs.first() else { return String::new() };
    let title = format!("{} against {}", models(comparison.runs.len()), base_name(first));
    let body = [
        heading(comparison, first, &title),
        table(comparison, first),
        figures(comparison),
        recipes(comparison),
    ];
    page(&format!("bevel: {title}"), &body.concat())
}

fn models(count: usize) -> String {
    if count == 1 { "1 model".to_owned() } else { format!("{count} models") }
}

fn base_name(run: &Run) -> String {
    let name = Path::new(&run.against).file_name();
    name.map_or(run.against.clone(), |name| name.to_string_lossy().into_owned())
}

/// Whether no other model is as small and as close, or smaller, or closer.
fn on_frontier(runs: &[Run], run: &Run) -> bool {
    let (size, kl) = (run.file.bytes, run.kl.value);
    !runs.iter().any(|other| {
        let (other_size, other_kl) = (other.file.bytes, other.kl.value);
        other_size <= size && other_kl <= kl && (other_size < size || other_kl < kl)
    })
}

fn heading(comparison: &Comparison, first: &Run, title: &str) -> String {
    let beaten = comparison.runs.iter().filter(|run| !on_frontier(&comparison.runs, run)).count();
    let lead = match beaten {
        0 => "Each is the closest to the base at its size.".to_owned(),
        1 => "One of them is larger than another and yet farther from the base.".to_owned(),
        n => format!("{n} of them are larger than another and yet farther from the base."),
    };
    format!(
        "<header>\n<h1>{}</h1>\n<p class=\"lead\">{lead}</p>\n<p class=\"note\">Measured on {} tokens of {}, in windows of {} of which the second half is scored (llama.cpp’s convention). The base’s perplexity is {:.4} ± {:.4}.</p>\n</header>\n",
        escape(title),
        count(first.scored_tokens),
        escape(
            &Path::new(&first.text)
                .file_name()
                .map_or(first.text.clone(), |n| n.to_string_lossy().into_owned())
        ),
        first.context,
        first.base_perplexity.value,
        first.base_perplexity.error,
    )
}

fn table(comparison: &Comparison, first: &Run) -> String {
    let has_speed = comparison.runs.iter().any(|run| run.decode_tokens_per_second.is_some());
    let mut out = String::from(
        "<section>\n<table>\n<thead><tr><th scope=\"col\">model</th><th>type</th><th>size</th><th>bits / weight</th>\
         <th>KL mean</th><th>median</th><th>99 %</th><th>same top<br>token</th><th>perplexity</th><th>change</th>",
    );
    if has_speed {
        out += "<th>decode<br>tokens/s</th>";
    }
    out += "</tr></thead>\n<tbody>\n";
    for run in &comparison.runs {
        let class = if on_frontier(&comparison.runs, run) { "" } else { " class=\"beaten\"" };
        let _ = write!(
            out,
            "<tr{class}><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{:.2}</td><td>{} <small>± {}</small></td><td>{}</td><td>{}</td><td>{:.2} %</td><td>{:.3}</td><td>{:+.3} <small>± {:.3}</small></td>",
            escape(&run.name()),
            escape(&run.format()),
            bytes(run.file.bytes),
            run.file.bits_per_weight,
            nats(run.kl.value),
            nats(run.kl.error),
            nats(run.kl_quantiles.median),
            nats(run.kl_quantiles.q99),
            100.0 * run.same_top.value,
            run.perplexity,
            run.difference.value,
            run.difference.error,
        );
        if has_speed {
            let speed = run.decode_tokens_per_second.map_or("–".to_owned(), rate);
            let _ = write!(out, "<td>{speed}</td>");
        }
        out += "</tr>\n";
    }
    let _ = writeln!(
        out,
        "</tbody>\n</table>\n<p class=\"caption\">KL: divergence from the base’s predictions in nats a token, lower is better; ± is one standard error. Change: of the perplexity from the base’s, with the error of the difference. Grey: another model is at most as large and closer. Written by bevel {}.</p>\n</section>",
        escape(&first.version)
    );
    out
}

/// Nats with three digits.
fn nats(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 7.0) as usize;
    format!("{value:.decimals$}")
}

fn figures(comparison: &Comparison) -> String {
    let runs = &comparison.runs;
    let points = |value: &dyn Fn(&Run) -> Estimate| -> Vec<Point> {
        let point = |run: &Run| {
            let Estimate { value, error } = value(run);
            Point {
                x: run.file.bytes as f64 / 1e6,
                y: value,
                error,
                label: run.name(),
                hollow: !on_frontier(runs, run),
            }
        };
        runs.iter().map(point).collect()
    };
    let divergence = Scatter {
        title: "Size and divergence",
        y_label: "mean KL from the base, nats a token, lower is better",
        from_zero: false,
        // Half the error is a matter of course; ten times less is another kind of model.
        logarithmic: runs.iter().all(|run| run.kl.value > 0.0),
        line: Line::Frontier,
        points: points(&|run| run.kl),
    };
    let percent = |e: Estimate| Estimate { value: 100.0 * e.value, error: 100.0 * e.error };
    let agreement = Scatter {
        title: "Size and agreement",
        y_label: "same top token as the base, %, higher is better",
        from_zero: false,
        logarithmic: false,
        line: Line::None,
        points: points(&|run| percent(run.same_top)),
    };
    format!("<section class=\"figures\">\n{}{}</section>\n", divergence.svg(), agreement.svg())
}

fn recipes(comparison: &Comparison) -> String {
    let mut out = String::new();
    for run in &comparison.runs {
        if let Some(provenance) = &run.file.provenance {
            let _ = writeln!(
                out,
                "<dt>{}</dt><dd><code>{}</code></dd>",
                escape(&run.name()),
                escape(provenance.recipe.trim())
            );
        }
    }
    if out.is_empty() {
        return out;
    }
    format!("<section>\n<h2>Recipes</h2>\n<dl>\n{out}</dl>\n</section>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_of_a_divergence() {
        for (value, expected) in [
            (0.0, "0"),
            (1.234, "1.23"),
            (0.01234, "0.0123"),
            (0.000_123_4, "0.000123"),
            (1e-9, "0.0000000"),
        ] {
            assert_eq!(nats(value), expected);
        }
    }
}
