//! Figures of a run over its steps.

use std::fmt::Write;

use super::escape;
use super::scatter::{Axis, BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes};

/// A plot of one or more series over the steps.
pub(super) struct Curves<'a> {
    pub(super) title: &'a str,
    pub(super) y_label: &'a str,
    /// The vertical axis begins at zero, rather than a little below the least value.
    pub(super) from_zero: bool,
    pub(super) series: Vec<Series>,
}

/// Steps and values. Those that are no numbers are left out.
pub(super) struct Series {
    /// How it is drawn: a class in `page.css`.
    pub(super) class: &'static str,
    /// Points are drawn as well as the line.
    pub(super) dots: bool,
    pub(super) points: Vec<(usize, f64)>,
}

/// Stretches that a long series is drawn in: two for each pixel would not be seen.
const STRETCHES: usize = 400;

impl Curves<'_> {
    pub(super) fn svg(&self) -> String {
        let all = || self.series.iter().flat_map(|s| &s.points).filter(|(_, y)| y.is_finite());
        let (first, last) = all().fold((usize::MAX, 0), |(a, b), &(x, _)| (a.min(x), b.max(x)));
        let (low, high) = all().fold((f64::MAX, f64::MIN), |(a, b), &(_, y)| (a.min(y), b.max(y)));
        let title = escape(self.title);
        let mut svg = format!(
            "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">\n\
             <text class=\"title\" x=\"0\" y=\"16\">{title}</text>\n"
        );
        if low > high {
            return svg + "</svg></figure>\n";
        }
        let margin = if high > low { 0.08 * (high - low) } else { 0.1 * high.abs() };
        let from = if self.from_zero { 0.0 } else { low - margin };
        let x = Axis::whole(first as f64, last as f64, LEFT, WIDTH - RIGHT);
        let y = Axis::new(from, high + margin, HEIGHT - BOTTOM, TOP);
        axes(&mut svg, &x, &y, "step", self.y_label);
        for series in &self.series {
            series.draw(&mut svg, &x, &y);
        }
        svg + "</svg></figure>\n"
    }
}

impl Series {
    fn draw(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let at = |&(step, value): &(usize, f64)| (x.pixel(step as f64), y.pixel(value));
        let points = thinned(&self.points);
        let path: Vec<String> =
            points.iter().map(at).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(svg, "<polyline class=\"{}\" points=\"{}\"/>", self.class, path.join(" "));
        // A line of one point is not seen.
        if self.dots || points.len() == 1 {
            for point in &points {
                let ((px, py), (step, value)) = (at(point), point);
                let _ = writeln!(
                    svg,
                    "<circle class=\"{}\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3\"><title>step {step}: {value:.4}</title></circle>",
                    self.class
                );
            }
        }
    }
}

/// The points of a series; of a long one the least and the largest of each stretch, so that no peak is lost.
fn thinned(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let finite: Vec<(usize, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    if finite.len() <= 2 * STRETCHES {
        return finite;
    }
    let stretch = finite.len().div_ceil(STRETCHES);
    let ends = |stretch: &[(usize, f64)]| {
        let by_value = |a: &&(usize, f64), b: &&(usize, f64)| a.1.total_cmp(&b.1);
        let ends = [stretch.iter().min_by(by_value), stretch.iter().max_by(by_value)];
        let mut ends = ends.map(|end| *end.expect("no stretch is empty"));
        ends.sort_by_key(|(step, _)| *step);
        ends
    };
    finite.chunks(stretch).flat_map(ends).collect()
}

/// The mean of the values up to each, of which every one counts a tenth less than the next. Those that are no
/// numbers are left out.
pub(super) fn smoothed(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    const KEPT: f64 = 0.9;
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |&(step, value): &(usize, f64)| {
        (sum, weight) = (KEPT * sum + value, KEPT * weight + 1.0);
        (step, sum / weight)
    };
    points.iter().filter(|(_, value)| value.is_finite()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_begins_at_the_first_value_and_follows() {
        let flat: Vec<(usize, f64)> = (1..50).map(|step| (step, 2.0)).collect();
        assert!(smoothed(&flat).iter().all(|(_, mean)| (mean - 2.0).abs() < 1e-12));
        let jump: Vec<(usize, f64)> = (0..100).map(|i| (i, f64::from(u8::from(i >= 50)))).collect();
        let means = smoothed(&jump);
        assert_eq!((means[0].1, means[49].1), (0.0, 0.0));
        assert!(means[55].1 > 0.4 && means[99].1 > 0.99 && means[99].1 < 1.0);
    }

    #[test]
    fn no_peak_is_lost() {
        let mut points: Vec<(usize, f64)> = (0..100_000).map(|i| (i, (i % 7) as f64)).collect();
        points[77_777].1 = 99.0;
        points[5].1 = f64::NAN;
        let thin = thinned(&points);
        assert!(thin.len() <= 2 * STRETCHES && thin.contains(&(77_777, 99.0)));
        assert!(thin.is_sorted_by_key(|(step, _)| *step));
        assert_eq!(thinned(&points[..100]).len(), 99);
    }
}
