//! The page over several models that were measured against one base.

use std::fmt::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::scatter::{Line, Point, Scatter};
use super::{digits, escape, page};
use crate::ui::units::{bytes, rate};

/// The models, the largest first.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) runs: Vec<Run>,
}

impl Comparison {
    /// Each model's name without what all of them begin with, up to a dot or a dash.
    fn labels(&self) -> Vec<String> {
        let names: Vec<String> = self.runs.iter().map(Run::name).collect();
        let first = names.first().map_or("", String::as_str);
        let mut separators = first.match_indices(['.', '-']).map(|(at, _)| at + 1);
        let shared =
            |&at: &usize| names.iter().all(|n| n.starts_with(&first[..at]) && n.len() > at);
        let cut = separators.rfind(shared).filter(|_| names.len() > 1).unwrap_or(0);
        names.iter().map(|name| name[cut..].to_owned()).collect()
    }
}

/// What is needed of a report of `bevel eval --against`, and of what `bevel quantize` measured.
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
    /// From a report of `bevel bench`, or of `bevel quantize`.
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
        first.scored_tokens,
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
        "<section>\n<table class=\"wide\">\n<thead><tr><th scope=\"col\">model</th><th>type</th><th>size</th><th>bits / weight</th>\
         <th>KL mean<br>mnats</th><th>KL median<br>mnats</th><th>KL 99 %<br>mnats</th><th>same top<br>token</th><th>perplexity</th><th>change</th>",
    );
    if has_speed {
        out += "<th>decode<br>tokens/s</th>";
    }
    out += "</tr></thead>\n<tbody>\n";
    for (run, label) in comparison.runs.iter().zip(comparison.labels()) {
        let class = if on_frontier(&comparison.runs, run) { "" } else { " class=\"beaten\"" };
        let _ = write!(
            out,
            "<tr{class}><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{:.2}</td><td>{} <small>± {}</small></td><td>{}</td><td>{}</td><td>{:.2} %</td><td>{:.2}</td><td>{} <small>± {:.2}</small></td>",
            escape(&label),
            escape(&run.format()),
            bytes(run.file.bytes),
            run.file.bits_per_weight,
            digits(run.kl.value * 1e3, 3),
            digits(run.kl.error * 1e3, 2),
            digits(run.kl_quantiles.median * 1e3, 3),
            digits(run.kl_quantiles.q99 * 1e3, 3),
            100.0 * run.same_top.value,
            run.perplexity,
            format!("{:+.2}", run.difference.value).replace('-', "−"),
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
        "</tbody>\n</table>\n<p class=\"caption\">KL: divergence from the base’s predictions in thousandths of a nat for each token, lower is better; ± is one standard error. Change: of the perplexity from the base’s, with the error of the difference. Grey: another model is at most as large and closer. Written by bevel {}.</p>\n</section>",
        escape(&first.version)
    );
    out
}

fn figures(comparison: &Comparison) -> String {
    let runs = &comparison.runs;
    let labels = comparison.labels();
    let points = |value: &dyn Fn(&Run) -> Estimate| -> Vec<Point> {
        let point = |(run, label): (&Run, &String)| {
            let Estimate { value, error } = value(run);
            let x = run.file.bytes as f64 / 1e6;
            Point { x, y: value, error, label: label.clone(), hollow: !on_frontier(runs, run) }
        };
        runs.iter().zip(&labels).map(point).collect()
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

    #[track_caller]
    fn check(names: &[&str], expected: &[&str]) {
        let run = |name: &&str| {
            let json = serde_json::json!({
                "model": name, "against": "base", "text": "a.txt", "context": 8, "scored_tokens": 3,
                "perplexity": 2.0, "version": "1",
                "file": {"path": format!("dir/{name}.gguf"), "bytes": 1, "parameters": 1, "bits_per_weight": 8.0, "types": []},
                "base_perplexity": {"value": 1.0, "error": 0.0}, "difference": {"value": 1.0, "error": 0.0},
                "kl": {"value": 1.0, "error": 0.0}, "kl_quantiles": {"median": 1.0, "q99": 1.0},
                "same_top": {"value": 1.0, "error": 0.0},
            });
            serde_json::from_value(json).unwrap()
        };
        let comparison = Comparison { runs: names.iter().map(run).collect() };
        assert_eq!(comparison.labels(), expected);
    }

    #[test]
    fn labels_begin_where_names_differ() {
        check(&["tiny-austen.Q4_0", "tiny-austen.Q4_K"], &["Q4_0", "Q4_K"]);
        check(&["a-b.Q4", "a-c.Q4"], &["b.Q4", "c.Q4"]);
        check(&["model", "other"], &["model", "other"]);
        check(&["a.Q4"], &["a.Q4"]);
        check(&["a.", "a.Q4"], &["a.", "a.Q4"]);
        check(&["é.x", "é.y"], &["x", "y"]);
    }
}
