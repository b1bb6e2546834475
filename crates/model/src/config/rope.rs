/// A rotary position embedding (RoFormer, arXiv 2104.09864) and how it was stretched for long
/// contexts.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading values of a head that are rotated; the rest passes through.
    pub rotary_dim: usize,
    /// The stretch.
    pub scaling: RopeScaling,
}

/// Ways to stretch rotary embeddings.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Positions divided by `factor` (arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context before stretching.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// The divisor of interpolated frequencies.
        factor: f64,
        /// Context before stretching.
        original_context: usize,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is interpolated in full.
        beta_slow: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each frequency, one set up to the original context
    /// and one beyond it.
    LongRope {
        /// Divisors up to the original context.
        short: Vec<f32>,
        /// Divisors beyond.
        long: Vec<f32>,
        /// Context before stretching.
        original_context: usize,
        /// Factor on cosine and sine.
        attention_factor: f64,
    },
    /// A divisor for each frequency, however it came about.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// Names the scheme behind a GGUF file's `rope_freqs.weight`: Llama 3.1's, where its published
    /// constants give these divisors, else [`RopeScaling::Divisors`].
    pub(crate) fn of_divisors(divisors: Vec<f32>, theta: f64, rotary_dim: usize) -> Self {
        let factor = divisors.iter().copied().fold(1.0f32, f32::max);
        let scaling = RopeScaling::Llama3 {
            factor: factor.into(),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let rope = RopeConfig { theta, rotary_dim, scaling };
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        match rope.divisors(0) {
            Some(llama3) if llama3.iter().zip(&divisors).all(close) => rope.scaling,
            _ => RopeScaling::Divisors(divisors),
        }
    }

    /// The lists of divisors that a file spells out, with their names in `config.json`.
    pub(crate) fn factors(&self) -> Vec<(&'static str, &[f32])> {
        match self {
            RopeScaling::LongRope { short, long, .. } => {
                vec![("short_factor", short), ("long_factor", long)]
            }
            RopeScaling::Divisors(divisors) => vec![("rope factors", divisors)],
            _ => Vec::new(),
        }
    }

    /// YaRN's recommended factor on cosine and sine.
    pub(crate) fn yarn_attention_factor(factor: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
    }
}

impl RopeConfig {
    /// The divisor of each of the `rotary_dim / 2` frequencies for a run over `context` tokens, or
    /// `None` where all are one.
    pub fn divisors(&self, context: usize) -> Option<Vec<f32>> {
        let half = self.rotary_dim / 2;
        match &self.scaling {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } => Some(vec![*factor as f32; half]),
            RopeScaling::Llama3 { .. } | RopeScaling::Yarn { .. } => {
                Some((0..half).map(|i| self.ramped_divisor(i) as f32).collect())
            }
            RopeScaling::LongRope { short, long, original_context, .. } => {
                Some(if context > *original_context { long.clone() } else { short.clone() })
            }
            RopeScaling::Divisors(divisors) => Some(divisors.clone()),
        }
    }

    /// Factor on cosine and sine.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::LongRope { attention_factor, .. } => *attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Llama 3 and YaRN divide by `factor` where a frequency is low and by one where it is high, and
    /// mix the two frequencies linearly between.
    fn ramped_divisor(&self, i: usize) -> f64 {
        let dim = self.rotary_dim as f64;
        let tau = 2.0 * std::f64::consts::PI;
        let frequency = self.theta.powf(-2.0 * i as f64 / dim);
        let (factor, kept) = match &self.scaling {
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                // How often the frequency turns within the original context.
                let turns = *original_context as f64 * frequency / tau;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (*factor, kept.clamp(0.0, 1.0))
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
                // The (fractional) index of the frequency that turns `beta` times.
                let index = |beta: f64| {
                    dim * (*original_context as f64 / (beta * tau)).ln() / (2.0 * self.theta.ln())
                };
                let low = index(*beta_fast).floor().max(0.0);
                let high = index(*beta_slow).ceil().min(dim - 1.0);
                let high = if low == high { high + 0.001 } else { high };
                (*factor, 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0))
            }
            _ => return 1.0,
        };
        1.0 / (kept + (1.0 - kept) / factor)
    }
}
