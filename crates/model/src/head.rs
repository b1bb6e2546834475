//! From the residual stream to logits.

use bevel_base::DType;
use bevel_kernels::{Cpu, PackedMatrix, rms_norm, scale, softcap};

use crate::adapter::StageAdapters;
use crate::linear::{Linear, LinearState, project};
use crate::weights::Loader;
use crate::{Checkpoint, Error, ModelConfig, Result};

/// The output norm and the output head.
#[derive(Debug)]
pub struct Head {
    /// `[dim]`
    pub(crate) norm: Vec<f32>,
    /// `[vocab, dim]`
    pub(crate) output: Linear,
}

/// Buffers of [`Head::logits`].
#[derive(Debug, Default)]
pub struct HeadState {
    /// `[n, dim]`
    normed: Vec<f32>,
    /// `[n, vocab]`
    logits: Vec<f32>,
    linear: LinearState,
}

impl HeadState {
    /// What [`Head::logits`] computed last, `[n, vocab]`.
    pub fn last(&self) -> &[f32] {
        &self.logits
    }
}

impl Head {
    /// Reads a model's head; packed weights are unpacked, as those of a [`Block`](crate::Block).
    ///
    /// # Errors
    /// Those of reading and packing a tensor.
    pub fn load(checkpoint: &Checkpoint, cpu: &Cpu) -> Result<Self> {
        Self::load_with(&mut Loader::exact(checkpoint, cpu, &mut |_| {}))
    }

    pub(crate) fn load_with(loader: &mut Loader<'_>) -> Result<Self> {
        let (norm, output) = loader.head()?;
        Ok(Self { norm, output })
    }

    pub(crate) fn with_exact_products(self) -> Self {
        Self { output: self.output.with_exact_products(), ..self }
    }

    /// Replaces the weights by rows of another type, `[vocab, dim]`.
    ///
    /// # Errors
    /// Those of packing.
    pub fn set_weight(&mut self, cpu: &Cpu, dtype: DType, bytes: &[u8]) -> Result<()> {
        let (rows, cols) = (self.output.weight.rows(), self.output.weight.cols());
        let weight = PackedMatrix::pack(cpu, dtype, rows, cols, bytes).map_err(|source| {
            Error::Kernel { path: "the head".to_owned(), tensor: "output".to_owned(), source }
        })?;
        self.output = Linear::new(weight);
        Ok(())
    }

    /// Logits, `[n, vocab]`, after the rows `x`, `[n, dim]`, of the residual stream.
    pub fn logits<'s>(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        x: &[f32],
        state: &'s mut HeadState,
    ) -> &'s [f32] {
        let n = x.len() / config.dim;
        state.logits.resize(n * config.vocab_size, 0.0);
        if n == 0 {
            return &[];
        }
        self.normed(cpu, config, x, state);
        let product = [(&self.output, &mut state.logits)];
        project(cpu, &state.normed, n, product, StageAdapters::NONE, &mut state.linear);
        if config.logit_divisor != 1.0 {
            scale(cpu, &mut state.logits, 1.0 / config.logit_divisor);
        }
        if let Some(cap) = config.logit_softcap {
            softcap(cpu, &mut state.logits, cap);
        }
        &state.logits
    }

    /// The rows `x`, `[n, dim]`, of the residual stream after the output norm: what logits are made of.
    pub(crate) fn normed<'s>(
        &self,
        cpu: &Cpu,
        config: &ModelConfig,
        x: &[f32],
        state: &'s mut HeadState,
    ) -> &'s [f32] {
        let n = x.len() / config.dim;
        state.normed.resize(x.len(), 0.0);
        rms_norm(cpu, &mut state.normed, x, &self.norm, config.norm_eps, n, config.dim);
        &state.normed
    }
}
