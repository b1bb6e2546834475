//! Reports: HTML files that need nothing beside them.

mod bars;
pub(crate) mod comparison;
mod curves;
mod layers;
pub(crate) mod run;
mod scatter;
pub(crate) mod training;

use std::fmt::Write;

use bevel_eval::{Bench, Machine, Perplexity, Series};
use bevel_model::Checkpoint;
use serde::Serialize;

use crate::ui::units::{bytes, duration, rate};
use bars::Bar;
use scatter::{Line, Point, Scatter};

/// Everything a tour found out. `--json` prints it as it is.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) note: Option<String>,
    pub(crate) machine: Machine,
    pub(crate) version: &'static str,
    pub(crate) command: String,
    pub(crate) text: &'static str,
    /// Tokens of a window.
    pub(crate) context: usize,
    /// What every variant was asked.
    pub(crate) prompt: String,
    pub(crate) seconds: f64,
    pub(crate) peak_memory_bytes: Option<u64>,
    /// The original first, then smaller and smaller ones.
    pub(crate) variants: Vec<Variant>,
}

/// One model of the comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Variant {
    pub(crate) name: String,
    /// Bytes of all tensors.
    pub(crate) bytes: u64,
    pub(crate) bits_per_weight: f64,
    pub(crate) shares: Vec<Share>,
    pub(crate) perplexity: Perplexity,
    pub(crate) bench: Bench,
    /// `None` for the original.
    pub(crate) quantize_seconds: Option<f64>,
    pub(crate) warnings: Vec<String>,
    /// What it answered.
    pub(crate) sample: String,
}

/// The tensors of one type.
#[derive(Debug, Serialize)]
pub(crate) struct Share {
    pub(crate) format: String,
    pub(crate) tensors: usize,
    pub(crate) bytes: u64,
}

impl Share {
    /// A model's types, the one with most bytes first.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Vec<Self> {
        let tensor =
            |entry: &bevel_model::Entry| (entry.dtype.to_string(), entry.byte_len() as u64);
        Self::sum(checkpoint.tensors().values().map(tensor))
    }

    /// Sums over tensors, each a type and bytes; the type with most bytes first.
    fn sum(tensors: impl Iterator<Item = (String, u64)>) -> Vec<Self> {
        let mut shares: Vec<Self> = Vec::new();
        for (format, bytes) in tensors {
            match shares.iter_mut().find(|share| share.format == format) {
                Some(share) => {
                    share.tensors += 1;
                    share.bytes += bytes;
                }
                None => shares.push(Self { format, tensors: 1, bytes }),
            }
        }
        shares.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        shares
    }
}

impl Variant {
    pub(crate) fn is_original(&self) -> bool {
        self.quantize_seconds.is_none()
    }
}

/// The page of a tour.
pub(crate) fn html(report: &Report) -> String {
    let body =
        [heading(report), table(report), figures(report), samples(report), conditions(report)];
    page(&format!("bevel tour: {}", report.model), &body.concat())
}

/// A whole page around `body`.
fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title),
        include_str!("page.css"),
    )
}

fn heading(report: &Report) -> String {
    let mut out = format!("<header>\n<h1>{}, cut to size</h1>\n", escape(&report.model));
    let original = &report.variants[0];
    if let Some(smallest) = report.variants.iter().skip(1).min_by_key(|v| v.bytes) {
        let _ = writeln!(
            out,
            "<p class=\"lead\">From {} to {}: {} takes {:.0} % of the space, and its perplexity is {} that of the original.</p>",
            bytes(original.bytes),
            bytes(smallest.bytes),
            escape(&smallest.name),
            100.0 * smallest.bytes as f64 / original.bytes as f64,
            ratio(smallest.perplexity.perplexity / original.perplexity.perplexity),
        );
    }
    if let Some(note) = &report.note {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(note));
    }
    out + "</header>\n"
}

/// `1.04 times`
fn ratio(ratio: f64) -> String {
    format!("{ratio:.2} times")
}

fn median(series: &Option<Series>) -> f64 {
    series.as_ref().map_or(0.0, |s| s.spread.median)
}

fn table(report: &Report) -> String {
    let mut out = String::from(
        "<section>\n<table>\n<thead><tr><th scope=\"col\">model</th><th>size</th><th>bits / weight</th>\
         <th>perplexity</th><th>change</th><th>bits / byte</th><th>prefill<br>tokens/s</th>\
         <th>decode<br>tokens/s</th><th>made in</th></tr></thead>\n<tbody>\n",
    );
    let base = report.variants[0].perplexity.perplexity;
    for variant in &report.variants {
        let p = &variant.perplexity;
        let change = match variant.is_original() {
            true => "–".to_owned(),
            false => format!("{:+.1} %", (p.perplexity / base - 1.0) * 100.0),
        };
        let made = variant
            .quantize_seconds
            .map_or("–".to_owned(), |s| duration(std::time::Duration::from_secs_f64(s)));
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{:.2}</td><td>{:.2} <small>± {:.2}</small></td>\
             <td>{change}</td><td>{}</td><td>{}</td><td>{}</td><td>{made}</td></tr>",
            escape(&variant.name),
            bytes(variant.bytes),
            variant.bits_per_weight,
            p.perplexity,
            p.perplexity_error,
            p.bits_per_byte.map_or("–".to_owned(), |b| format!("{b:.3}")),
            rate(median(&variant.bench.prefill)),
            rate(median(&variant.bench.decode)),
        );
    }
    let first = &report.variants[0];
    let tokens = |series: &Option<Series>| series.as_ref().map_or(0, |s| s.tokens);
    let _ = writeln!(
        out,
        "</tbody>\n</table>\n<p class=\"caption\">Perplexity: lower is better. Measured on {} tokens of {}, in windows of {} of which the second half is scored (llama.cpp’s convention); ± is one standard error of each figure alone, and as all models read the same text, differences between them are surer than that. Speed: medians of {} runs, prompts of {} tokens, answers of {}.</p>\n</section>",
        first.perplexity.tokens,
        escape(report.text),
        report.context,
        first.bench.decode.as_ref().map_or(0, |s| s.samples.len()),
        tokens(&first.bench.prefill),
        tokens(&first.bench.decode),
    );
    out
}

fn figures(report: &Report) -> String {
    let megabytes = |v: &Variant| v.bytes as f64 / 1e6;
    let point = |v: &Variant, y: f64, error: f64| Point {
        x: megabytes(v),
        y,
        error,
        label: v.name.clone(),
        hollow: v.is_original(),
    };
    let quality = Scatter {
        title: "Size and quality",
        y_label: "perplexity, lower is better",
        from_zero: false,
        logarithmic: false,
        line: Line::All,
        points: report
            .variants
            .iter()
            .map(|v| point(v, v.perplexity.perplexity, v.perplexity.perplexity_error))
            .collect(),
    };
    let speed = Scatter {
        title: "Size and speed",
        y_label: "decode, tokens/s",
        from_zero: true,
        logarithmic: false,
        line: Line::All,
        points: report
            .variants
            .iter()
            .map(|v| {
                let deviation = v.bench.decode.as_ref().map_or(0.0, |s| s.spread.deviation);
                point(v, median(&v.bench.decode), deviation)
            })
            .collect(),
    };
    let bars = report.variants.iter().map(|v| Bar { name: &v.name, shares: &v.shares });
    let bars: Vec<Bar<'_>> = bars.collect();
    format!(
        "<section class=\"figures\">\n{}{}</section>\n<section>\n{}</section>\n",
        quality.svg(),
        speed.svg(),
        bars::html(&bars)
    )
}

fn samples(report: &Report) -> String {
    let mut out = format!(
        "<section>\n<h2>What they write</h2>\n<p class=\"caption\">Each was given “{}” and drew the same random numbers.</p>\n<dl>\n",
        escape(&report.prompt)
    );
    for variant in &report.variants {
        let _ = writeln!(
            out,
            "<dt>{}</dt><dd>{}</dd>",
            escape(&variant.name),
            escape(variant.sample.trim())
        );
    }
    out + "</dl>\n</section>\n"
}

fn conditions(report: &Report) -> String {
    let machine = &report.machine;
    let memory = |b: Option<u64>| b.map_or("unknown".to_owned(), bytes);
    let mut out = String::from("<section>\n<h2>Conditions</h2>\n<table class=\"plain\">\n");
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(out, "<tr><th scope=\"row\">{name}</th><td>{}</td></tr>", escape(value));
    };
    row("machine", &machine.cpu);
    row("threads", &format!("{}, {} kernels", machine.threads, machine.isa));
    row("system", &format!("{}, {} of memory", machine.system, memory(machine.memory)));
    row("peak memory", &memory(report.peak_memory_bytes));
    row("took", &duration(std::time::Duration::from_secs_f64(report.seconds)));
    row("version", &format!("bevel {}", report.version));
    row("command", &report.command);
    out += "</table>\n";
    let warned: Vec<&Variant> = report.variants.iter().filter(|v| !v.warnings.is_empty()).collect();
    if !warned.is_empty() {
        out += "<h2>What went otherwise than asked for</h2>\n<dl>\n";
        for variant in warned {
            let _ = writeln!(out, "<dt>{}</dt>", escape(&variant.name));
            for warning in &variant.warnings {
                let _ = writeln!(out, "<dd>{}</dd>", escape(warning));
            }
        }
        out += "</dl>\n";
    }
    out + "</section>\n"
}

/// Text as HTML, in attributes too.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with so many digits that count.
fn digits(value: f64, digits: i32) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let decimals = f64::from(digits - 1) - value.abs().log10().floor();
    format!("{value:.*}", decimals.clamp(0.0, 6.0) as usize)
}

#[cfg(test)]
mod tests {
    use super::digits;

    #[test]
    fn digits_that_count() {
        for (value, count, expected) in [
            (0.0, 3, "0"),
            (1.234, 3, "1.23"),
            (81.75, 3, "81.8"),
            (0.0277, 2, "0.028"),
            (1234.5, 3, "1234"),
        ] {
            assert_eq!(digits(value, count), expected);
        }
    }
}
