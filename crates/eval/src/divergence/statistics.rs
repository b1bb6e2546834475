use serde::Serialize;

use super::rows::RowScore;
use crate::{Mean, Perplexity};

/// How far a model lies from its base, over all scored tokens. Errors are standard errors that take
/// tokens as independent, as llama.cpp's do.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// The model's perplexity on the same text.
    #[serde(flatten)]
    pub perplexity: Perplexity,
    /// The base's perplexity.
    pub base_perplexity: Estimate,
    /// ln(perplexity / base perplexity): how much surprise a token has gained, nats. Its error is that of
    /// the difference of each token, far smaller than that of either perplexity.
    pub ln_ratio: Estimate,
    /// perplexity / base perplexity
    pub ratio: Estimate,
    /// perplexity − base perplexity
    pub difference: Estimate,
    /// Pearson's correlation of the tokens' surprises under both; `None` where one of them does not vary.
    pub correlation: Option<f64>,
    /// Mean KL divergence of the model from the base, nats a token.
    pub kl: Estimate,
    /// Where the tokens' KL divergences lie, nats.
    pub kl_quantiles: Quantiles,
    /// The part of the tokens for which both find the same token likeliest, 0 to 1.
    pub same_top: Estimate,
    /// Mean change of the probability of the token that follows, −1 to 1.
    pub delta_p: Estimate,
    /// Root of the mean square of that change.
    pub delta_p_rms: Estimate,
    /// Where these changes lie.
    pub delta_p_quantiles: Quantiles,
}

/// A value and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// One standard error.
    pub error: f64,
}

/// Where values lie; between two of them, quantiles are interpolated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs)] // `q001` is the value that 0.1 % of all lie below, and so on
pub struct Quantiles {
    pub min: f64,
    pub q001: f64,
    pub q01: f64,
    pub q05: f64,
    pub q10: f64,
    pub q25: f64,
    pub median: f64,
    pub q75: f64,
    pub q90: f64,
    pub q95: f64,
    pub q99: f64,
    pub q999: f64,
    pub max: f64,
}

impl Divergence {
    pub(super) fn new(perplexity: Perplexity, scores: &[RowScore]) -> Self {
        let mean = |value: &dyn Fn(&RowScore) -> f64| {
            let mut mean = Mean::default();
            mean.extend(scores.iter().map(value));
            mean
        };
        let nats = mean(&|s| s.nats);
        let base_nats = mean(&|s| s.base_nats);
        let gained = mean(&|s| s.nats - s.base_nats);
        let delta_p = |s: &RowScore| (-s.nats).exp() - (-s.base_nats).exp();
        let squares = mean(&|s| delta_p(s).powi(2));

        // Covariance of the two means.
        let (a, b) = (nats.mean(), base_nats.mean());
        let products: f64 = scores.iter().map(|s| (s.nats - a) * (s.base_nats - b)).sum();
        let count = scores.len() as f64;
        let covariance = if count > 1.0 { products / (count * (count - 1.0)) } else { 0.0 };
        let (error, base_error) = (nats.standard_error(), base_nats.standard_error());
        let correlation = covariance / (error * base_error);

        // d e^x = e^x dx
        let (ppl, base_ppl) = (a.exp(), b.exp());
        let difference_variance = (ppl * error).powi(2) + (base_ppl * base_error).powi(2)
            - 2.0 * ppl * base_ppl * covariance;
        let ratio = gained.mean().exp();
        let rms = squares.mean().sqrt();
        let same = scores.iter().filter(|s| s.same_top).count() as f64 / count;
        Self {
            perplexity,
            base_perplexity: Estimate { value: base_ppl, error: base_ppl * base_error },
            ln_ratio: Estimate::of(&gained),
            ratio: Estimate { value: ratio, error: ratio * gained.standard_error() },
            difference: Estimate {
                value: ppl - base_ppl,
                error: difference_variance.max(0.0).sqrt(),
            },
            correlation: correlation.is_finite().then_some(correlation),
            kl: Estimate::of(&mean(&|s| s.kl)),
            kl_quantiles: Quantiles::of(scores.iter().map(|s| s.kl)),
            same_top: Estimate {
                value: same,
                error: (same * (1.0 - same) / (count - 1.0).max(1.0)).sqrt(),
            },
            delta_p: Estimate::of(&mean(&delta_p)),
            delta_p_rms: Estimate {
                value: rms,
                // d √x = dx / (2 √x)
                error: if rms > 0.0 { 0.5 / rms * squares.standard_error() } else { 0.0 },
            },
            delta_p_quantiles: Quantiles::of(scores.iter().map(delta_p)),
        }
    }
}

impl Estimate {
    /// A mean with its standard error.
    pub fn of(mean: &Mean) -> Self {
        Self { value: mean.mean(), error: mean.standard_error() }
    }
}

impl Quantiles {
    /// The quantiles of `values`; all are NaN where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |fraction: f64| {
            let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
            let place = fraction * last as f64;
            let below = place as usize;
            let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
            // Infinite neighbours have no point between them.
            if low == high { low } else { low + (place - below as f64) * (high - low) }
        };
        Self {
            min: at(0.0),
            q001: at(0.001),
            q01: at(0.01),
            q05: at(0.05),
            q10: at(0.1),
            q25: at(0.25),
            median: at(0.5),
            q75: at(0.75),
            q90: at(0.9),
            q95: at(0.95),
            q99: at(0.99),
            q999: at(0.999),
            max: at(1.0),
        }
    }
}
