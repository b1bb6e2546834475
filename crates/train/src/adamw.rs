//! AdamW (arXiv 1711.05101): Adam with the decay of weights apart from the gradient.
//!
//! 1. m = β₁ m + (1 − β₁) g
//! 2. v = β₂ v + (1 − β₂) g²
//! 3. θ = θ − η λ θ
//! 4. θ = θ − η · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)

use crate::Parameters;

/// Settings of [`AdamW`]; those that do not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// β₁, of the mean of gradients.
    pub beta1: f32,
    /// β₂, of the mean of their squares.
    pub beta2: f32,
    /// ε, below which gradients count as small.
    pub epsilon: f32,
    /// λ, the part of a weight that is lost in a step, times the learning rate.
    pub weight_decay: f32,
}

impl Default for AdamWConfig {
    /// PyTorch's, without decay.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimizer's state.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// t
    step: u64,
    /// m and v of each value.
    moments: Vec<[f32; 2]>,
}

impl AdamW {
    /// For so many values.
    pub fn new(config: AdamWConfig, values: usize) -> Self {
        Self { config, step: 0, moments: vec![[0.0; 2]; values] }
    }

    /// Takes a step against the gradients, with the learning rate η.
    ///
    /// # Panics
    /// Where the parameters are not as many as at the beginning.
    pub fn step(&mut self, parameters: &mut Parameters, learning_rate: f32) {
        assert_eq!(parameters.values.len(), self.moments.len(), "parameters were added");
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        self.step += 1;
        let corrected = |beta: f32| 1.0 - f64::from(beta).powf(self.step as f64);
        let (first, second) = (corrected(beta1), corrected(beta2).sqrt());
        let size = (f64::from(learning_rate) / first) as f32;
        let second = second as f32;
        let Parameters { values, gradients, .. } = parameters;
        for ((value, &g), [m, v]) in values.iter_mut().zip(&*gradients).zip(&mut self.moments) {
            *m += (1.0 - beta1) * (g - *m);
            *v += (1.0 - beta2) * (g * g - *v);
            *value *= 1.0 - learning_rate * weight_decay;
            *value -= size * *m / (v.sqrt() / second + epsilon);
        }
    }
}
