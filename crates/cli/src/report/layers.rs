//! Errors by layer: a small plot for each kind of matrix, all on one scale.

use std::fmt::Write;

use super::escape;
use super::scatter::step;

/// A kind of matrix, by its name within a layer.
pub(super) struct Panel {
    pub(super) name: String,
    /// By layer.
    pub(super) points: Vec<LayerError>,
}

/// Errors of a layer's matrix, in percent.
pub(super) struct LayerError {
    pub(super) layer: usize,
    /// Of what it was compared with.
    pub(super) before: Option<f64>,
    /// Of what was written.
    pub(super) after: f64,
}

const WIDTH: f64 = 232.0;
const HEIGHT: f64 = 132.0;
const LEFT: f64 = 36.0;
const RIGHT: f64 = 8.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 22.0;

/// The plots, with what the error is of.
pub(super) fn html(panels: &[Panel], what: &str) -> String {
    let all = || panels.iter().flat_map(|p| &p.points);
    let high = all().map(|p| p.after.max(p.before.unwrap_or(0.0))).fold(0.0, f64::max);
    let last = all().map(|p| p.layer).max().unwrap_or(0);
    let has_before = all().any(|p| p.before.is_some());
    let mut out = format!("<section>\n<h2>{}</h2>\n", escape(what));
    if has_before {
        out += "<p class=\"legend\"><span><i class=\"before\"></i>rounding each weight to nearest</span><span><i class=\"after\"></i>this model</span></p>\n";
    }
    out += "<div class=\"panels\">\n";
    for panel in panels {
        out += &panel.svg(high.max(1e-6), last);
    }
    out + "</div>\n"
}

impl Panel {
    fn svg(&self, high: f64, last: usize) -> String {
        let step = step(high / 2.5);
        let top = (high / step).ceil() * step;
        let x = |layer: usize| {
            let width = WIDTH - LEFT - RIGHT;
            LEFT + width * if last == 0 { 0.5 } else { 0.03 + 0.94 * layer as f64 / last as f64 }
        };
        let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / top;
        let name = escape(&self.name);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{name}\"><text class=\"panel\" x=\"0\" y=\"13\">{name}</text>\n"
        );
        let decimals = (-(step * (1.0 + 1e-9)).log10().floor()).clamp(0.0, 9.0) as usize;
        for i in 0..=(top / step).round() as usize {
            let value = i as f64 * step;
            let (at, right, left) = (y(value), WIDTH - RIGHT, LEFT - 6.0);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" text-anchor=\"end\" x=\"{left}\" y=\"{:.1}\">{value:.decimals$}</text>",
                at + 3.5,
            );
        }
        for layer in ticks(last) {
            let _ = write!(
                svg,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{}\">{layer}</text>",
                x(layer),
                HEIGHT - 7.0
            );
        }
        let before = self.points.iter().filter_map(|p| Some((p.layer, p.before?)));
        let after = self.points.iter().map(|p| (p.layer, p.after));
        let series: [(&str, Vec<(usize, f64)>); 2] =
            [("before", before.collect()), ("after", after.collect())];
        for (class, points) in series {
            let path: Vec<String> =
                points.iter().map(|&(l, v)| format!("{:.1},{:.1}", x(l), y(v))).collect();
            let _ = write!(svg, "\n<polyline class=\"{class}\" points=\"{}\"/>", path.join(" "));
            for (layer, value) in points {
                let _ = write!(
                    svg,
                    "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\"><title>layer {layer}: {value:.3} %</title></circle>",
                    x(layer),
                    y(value)
                );
            }
        }
        svg + "</svg>\n"
    }
}

/// Layers that are named below a plot: the first, the last, and some between.
fn ticks(last: usize) -> Vec<usize> {
    let step = [1, 2, 5, 10, 20, 50, 100].into_iter().find(|step| last / step <= 5).unwrap_or(200);
    (0..=last).step_by(step).collect()
}
