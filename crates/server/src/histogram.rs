/// Durations in buckets, as Prometheus has them.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    /// In each bucket, and above the last.
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

/// Upper ends of the buckets, in seconds.
const BOUNDS: [f64; 17] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0,
    120.0, 300.0,
];

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; _], sum: 0.0 }
    }
}

impl Histogram {
    pub(crate) fn add(&mut self, seconds: f64) {
        self.counts[BOUNDS.partition_point(|&bound| bound < seconds)] += 1;
        self.sum += seconds;
    }

    /// Lines of Prometheus' text format.
    pub(crate) fn write(&self, out: &mut String, name: &str, labels: &str) {
        use std::fmt::Write;
        let mut count = 0;
        let bounds = BOUNDS.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        for (bound, here) in bounds.zip(self.counts) {
            count += here;
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", self.sum);
        let _ = writeln!(out, "{name}_count{{{labels}}} {count}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let mut histogram = Histogram::default();
        for seconds in [0.0005, 0.001, 0.3, 1e9] {
            histogram.add(seconds);
        }
        let mut text = String::new();
        histogram.write(&mut text, "t", "m=\"x\"");
        for line in [
            "t_bucket{m=\"x\",le=\"0.001\"} 2",
            "t_bucket{m=\"x\",le=\"0.25\"} 2",
            "t_bucket{m=\"x\",le=\"0.5\"} 3",
            "t_bucket{m=\"x\",le=\"+Inf\"} 4",
            "t_count{m=\"x\"} 4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }
}
