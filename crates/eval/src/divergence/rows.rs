use bevel_kernels::{Cpu, kl_divergence};

/// What two rows of logits say about the token that follows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowScore {
    /// KL divergence of the model's distribution from the base's, nats.
    pub(super) kl: f64,
    /// −ln p of the token, by the model.
    pub(super) nats: f64,
    /// −ln p of the token, by the base.
    pub(super) base_nats: f64,
    /// Whether both find the same token the likeliest.
    pub(super) same_top: bool,
}

impl RowScore {
    /// Compares the logits of base and model, of which `next` is the token that follows.
    ///
    /// Where the base's `logits` are logarithms of probabilities that are to be taken as they are, the
    /// divergence is Σ p · ln(p / q) over those that are there, whatever they add up to, as in llama.cpp.
    pub(super) fn of(cpu: &Cpu, base: BaseRow<'_>, logits: &[f32], next: u32) -> Self {
        let rows = kl_divergence(cpu, base.logits, logits);
        let kl = if base.as_they_are {
            // With L = ln Σ p, the normalised divergence is Σ p · ln(p / q) / e^L − L.
            rows.base.exp() * (rows.kl + rows.base)
        } else if rows.kl < 0.0 {
            // Rounding must not make a distance negative.
            0.0
        } else {
            rows.kl
        };
        let base_nats = rows.base - f64::from(base.logits[next as usize]);
        Self {
            kl,
            nats: rows.other - f64::from(logits[next as usize]),
            base_nats: base.nats.unwrap_or(base_nats),
            same_top: argmax(base.logits) == argmax(logits),
        }
    }
}

/// What is known of the base's prediction.
#[derive(Clone, Copy, Debug)]
pub(super) struct BaseRow<'a> {
    pub(super) logits: &'a [f32],
    /// −ln p of the token that follows, where it is known better than from `logits`.
    pub(super) nats: Option<f64>,
    /// Whether the logits are logarithms of probabilities that need no normalising.
    pub(super) as_they_are: bool,
}

/// Position of the greatest logit, the first of equals.
pub(super) fn argmax(logits: &[f32]) -> usize {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == highest).unwrap_or(0)
}
