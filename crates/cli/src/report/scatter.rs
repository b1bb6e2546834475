use std::fmt::Write;

use super::escape;

/// A plot of points over the size of a model in megabytes.
pub(super) struct Scatter {
    pub(super) title: &'static str,
    pub(super) y_label: &'static str,
    /// The vertical axis begins at zero, rather than a little below the least value.
    pub(super) from_zero: bool,
    /// Equal distances on the vertical axis are equal ratios; all values are positive.
    pub(super) logarithmic: bool,
    pub(super) line: Line,
    pub(super) points: Vec<Point>,
}

/// What a line runs through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Nothing.
    None,
    /// All points in the order of their size.
    All,
    /// The points that are not hollow.
    Frontier,
}

/// A labelled point with an error bar of `y ± error`.
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) error: f64,
    pub(super) label: String,
    pub(super) hollow: bool,
}

pub(super) const WIDTH: f64 = 460.0;
pub(super) const HEIGHT: f64 = 300.0;
/// Margins that hold the axes' numbers and names.
pub(super) const LEFT: f64 = 52.0;
pub(super) const RIGHT: f64 = 16.0;
pub(super) const TOP: f64 = 46.0;
pub(super) const BOTTOM: f64 = 44.0;

/// An axis: values to pixels, and where its ticks are.
pub(super) struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
    logarithmic: bool,
}

impl Axis {
    /// An axis over `low..=high`, drawn from pixel `from` to pixel `to`.
    pub(super) fn new(low: f64, high: f64, from: f64, to: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        let step = step((high - low) / 6.0);
        let first = (low / step - 1e-9).ceil();
        let last = (high / step + 1e-9).floor();
        let ticks = (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect();
        Self { low, high, from, to, ticks, logarithmic: false }
    }

    /// As [`Axis::new`], of whole numbers.
    pub(super) fn whole(low: f64, high: f64, from: f64, to: f64) -> Self {
        let mut axis = Self::new(low, high, from, to);
        axis.ticks.retain(|tick| (tick - tick.round()).abs() < 1e-9);
        axis
    }

    /// As [`Axis::new`], logarithmic, with ticks at 1, 2 and 5 times the powers of ten, or at the
    /// powers alone where those would be many. Both ends are positive.
    fn logarithmic(low: f64, high: f64, from: f64, to: f64) -> Self {
        let factors: &[f64] = if high / low < 300.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let all = powers.flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)));
        let inside = low * (1.0 - 1e-9)..=high * (1.0 + 1e-9);
        let ticks = all.filter(|tick| inside.contains(tick)).collect();
        Self { low, high, from, to, ticks, logarithmic: true }
    }

    pub(super) fn pixel(&self, value: f64) -> f64 {
        let part = match self.logarithmic {
            // An error bar may reach to zero or below.
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + part * (self.to - self.from)
    }

    /// A tick's number, with as many decimals as it or the distance to the next needs.
    fn text(&self, value: f64) -> String {
        let finest = match (self.logarithmic, &self.ticks[..]) {
            (false, [first, second, ..]) => second - first,
            _ => value,
        };
        let decimals = (-(finest * (1.0 + 1e-9)).log10().floor()).clamp(0.0, 12.0) as usize;
        format!("{value:.decimals$}")
    }
}

/// The least of 1, 2, 5, 10, 20, 50 … (and their tenths) that is at least `least`.
pub(super) fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * power >= least * 0.999);
    factor.unwrap_or(10.0) * power
}

impl Scatter {
    pub(super) fn svg(&self) -> String {
        let range = |value: &dyn Fn(&Point) -> f64| {
            self.points
                .iter()
                .map(value)
                .fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
        };
        let (x_low, x_high) = range(&|p| p.x);
        let (low, _) = range(&|p| p.y - p.error);
        let (_, high) = range(&|p| p.y + p.error);
        // Sizes that lie close together are looked at closely.
        let x_from = if x_low < 0.5 * x_high { 0.0 } else { x_low - 0.3 * (x_high - x_low) };
        let x = Axis::new(x_from, x_high + 0.15 * (x_high - x_from), LEFT, WIDTH - RIGHT);
        let y = if self.logarithmic {
            let (low, high) = range(&|p| p.y);
            Axis::logarithmic(low / 1.5, high * 1.5, HEIGHT - BOTTOM, TOP)
        } else {
            let y_from = if self.from_zero { 0.0 } else { low - 0.1 * (high - low) };
            Axis::new(y_from, high + 0.08 * (high - y_from), HEIGHT - BOTTOM, TOP)
        };

        let mut svg = format!(
            "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n\
             <text class=\"title\" x=\"0\" y=\"16\">{}</text>\n",
            escape(self.title),
            escape(self.title)
        );
        axes(&mut svg, &x, &y, "size, MB", self.y_label);
        self.marks(&mut svg, &x, &y);
        svg + "</svg></figure>\n"
    }

    fn marks(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let mut order: Vec<&Point> = self.points.iter().collect();
        order.sort_by(|a, b| a.x.total_cmp(&b.x));
        let through = order.iter().filter(|p| match self.line {
            Line::None => false,
            Line::All => true,
            Line::Frontier => !p.hollow,
        });
        let path: Vec<String> =
            through.map(|p| format!("{:.1},{:.1}", x.pixel(p.x), y.pixel(p.y))).collect();
        let _ = writeln!(svg, "<polyline class=\"path\" points=\"{}\"/>", path.join(" "));
        // Points are in the way of labels as other labels are.
        let mut labels: Vec<(f64, f64, f64)> =
            order.iter().map(|p| (x.pixel(p.x) - 5.0, y.pixel(p.y) + 4.0, 10.0)).collect();
        for point in order {
            let (px, py) = (x.pixel(point.x), y.pixel(point.y));
            let (top, bottom) = (y.pixel(point.y + point.error), y.pixel(point.y - point.error));
            let class = if point.hollow { "point hollow" } else { "point" };
            let _ = writeln!(
                svg,
                "<line class=\"error\" x1=\"{px:.1}\" x2=\"{px:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>\
                 <circle class=\"{class}\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"5\"><title>{}: {:.3}</title></circle>",
                escape(&point.label),
                point.y
            );
            let width = point.label.chars().count() as f64 * 6.6;
            let (left, baseline) = place(px, py, width, &labels);
            labels.push((left, baseline, width));
            let _ = writeln!(
                svg,
                "<text class=\"label\" x=\"{left:.1}\" y=\"{baseline:.1}\">{}</text>",
                escape(&point.label)
            );
        }
    }
}

/// Lines and numbers of both axes, and what they are of.
pub(super) fn axes(svg: &mut String, x: &Axis, y: &Axis, x_name: &str, y_name: &str) {
    for &tick in &y.ticks {
        let at = y.pixel(tick);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 7.0,
            at + 3.5,
            y.text(tick)
        );
    }
    let bottom = HEIGHT - BOTTOM;
    for &tick in &x.ticks {
        let at = x.pixel(tick);
        let _ = writeln!(
            svg,
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\"/>\
             <text class=\"tick\" text-anchor=\"middle\" x=\"{at:.1}\" y=\"{}\">{}</text>",
            bottom + 4.0,
            bottom + 17.0,
            x.text(tick)
        );
    }
    let _ = writeln!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
         <text class=\"name\" text-anchor=\"end\" x=\"{}\" y=\"{}\">{}</text>\
         <text class=\"name\" x=\"0\" y=\"31\">{}</text>",
        WIDTH - RIGHT,
        WIDTH - RIGHT,
        HEIGHT - 6.0,
        escape(x_name),
        escape(y_name)
    );
}

/// Where a label begins: right of its point, or left, above or below it, and then farther away, where the
/// label would leave the plot or lie on another one. `labels` are left ends, baselines and widths.
fn place(px: f64, py: f64, width: f64, labels: &[(f64, f64, f64)]) -> (f64, f64) {
    /// Between labels on one line.
    const GAP: f64 = 3.9;
    let (right, left) = (px + 9.0, px - 9.0 - width);
    let (above, below) = (py - 7.0, py + 16.0);
    let candidates = [0.0, 12.0, 24.0].into_iter().flat_map(|away| {
        let (above, below) = (above - away, below + away);
        [(right, above), (left, above), (right, below), (left, below)]
    });
    let fits = |&(x, y): &(f64, f64)| {
        let inside = x >= LEFT && x + width <= WIDTH - RIGHT + 4.0 && y < HEIGHT - BOTTOM;
        inside
            && !labels.iter().any(|&(other, baseline, other_width)| {
                (baseline - y).abs() < 12.0
                    && other < x + width + GAP
                    && x < other + other_width + GAP
            })
    };
    candidates.into_iter().find(fits).unwrap_or((left.max(0.0), above))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|&tick| axis.text(tick)).collect()
    }

    #[track_caller]
    fn check(low: f64, high: f64, expected: &[&str]) {
        let axis = Axis::new(low, high, 0.0, 100.0);
        assert_eq!(texts(&axis), expected);
    }

    #[test]
    fn ticks_are_round_and_lie_on_the_axis() {
        check(0.0, 98.4, &["0", "20", "40", "60", "80"]);
        check(0.0, 8.39, &["0", "2", "4", "6", "8"]);
        check(26.1, 31.7, &["27", "28", "29", "30", "31"]);
        check(1.01, 1.05, &["1.01", "1.02", "1.03", "1.04", "1.05"]);
        check(5.0, 5.0, &["5.0", "5.2", "5.4", "5.6", "5.8", "6.0"]);
    }

    #[test]
    fn ticks_of_ratios() {
        let axis = Axis::logarithmic(0.0009, 0.021, 0.0, 100.0);
        assert_eq!(texts(&axis), ["0.001", "0.002", "0.005", "0.01", "0.02"]);
        let axis = Axis::logarithmic(0.5, 5000.0, 0.0, 100.0);
        assert_eq!(texts(&axis), ["1", "10", "100", "1000"]);
        let axis = Axis::logarithmic(0.01, 1.0, 0.0, 100.0);
        assert_eq!((axis.pixel(0.01), axis.pixel(1.0), axis.pixel(-3.0)), (0.0, 100.0, 0.0));
        assert!((axis.pixel(0.1) - 50.0).abs() < 1e-9);
    }

    #[test]
    fn the_ends_of_an_axis_are_its_pixels() {
        let axis = Axis::new(2.0, 6.0, 300.0, 100.0);
        assert_eq!((axis.pixel(2.0), axis.pixel(5.0), axis.pixel(6.0)), (300.0, 150.0, 100.0));
    }
}
