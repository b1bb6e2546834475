use serde::Serialize;

/// Where values lie.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Quantiles {
    count: usize,
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Quantiles {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len();
        let at = |part: f64| {
            let index = (part * count as f64).ceil() as usize;
            values.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
        };
        let mean = values.iter().sum::<f64>() / count as f64;
        Self { count, mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}
