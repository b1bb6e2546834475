//! Optimizers: AdamW (arXiv 1711.05101), the same with a state of 8 bits (arXiv 2110.02861), and Lion (arXiv 2302.06675).
//!
//! AdamW:
//! 1. θ = θ − η λ θ
//! 2. m = β₁ m + (1 − β₁) g
//! 3. v = β₂ v + (1 − β₂) g²
//! 4. θ = θ − η · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
//!
//! Lion:
//! 1. θ = θ − η λ θ
//! 2. θ = θ − η sign(β₁ m + (1 − β₁) g)
//! 3. m = β₂ m + (1 − β₂) g
//!
//! λ is 0 for norms and biases.

use std::path::Path;

use bevel_base::PagedVec;
use bevel_kernels::Cpu;

use crate::eight_bit::{BLOCK, Levels};
use crate::{Parameters, Result};

/// Which optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OptimizerKind {
    /// AdamW: 8 bytes of state for each number.
    #[default]
    AdamW,
    /// AdamW with 8-bit moments, a scale for every 256: 2 bytes.
    AdamW8bit,
    /// Lion: 4 bytes.
    Lion,
}

/// Settings of an [`Optimizer`]; those that do not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// Which one.
    pub kind: OptimizerKind,
    /// β₁
    pub beta1: f32,
    /// β₂
    pub beta2: f32,
    /// ε, below which gradients count as small.
    pub epsilon: f32,
    /// λ, the part of a weight that is lost in a step, times the learning rate.
    pub weight_decay: f32,
}

impl OptimizerConfig {
    /// PyTorch's AdamW without decay, or Lion with its authors' β.
    pub fn new(kind: OptimizerKind) -> Self {
        let beta2 = if kind == OptimizerKind::Lion { 0.99 } else { 0.999 };
        Self { kind, beta1: 0.9, beta2, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::new(OptimizerKind::AdamW)
    }
}

/// Values that a task updates; whole blocks of the 8-bit state.
const TASK: usize = 64 * BLOCK;

/// An optimizer and its state.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// t
    step: u64,
    values: usize,
    state: State,
}

/// Moments, in memory or in a file that the system pages out under pressure.
#[derive(Debug)]
enum State {
    /// m and v of each value, one after the other.
    AdamW(PagedVec<f32>),
    /// Codes of m and v of each value, and their scales of each block.
    AdamW8bit { codes: PagedVec<u8>, scales: PagedVec<f32>, levels: Box<[Levels; 2]> },
    /// m
    Lion(PagedVec<f32>),
}

impl Optimizer {
    /// For so many values, with the state in memory.
    pub fn new(config: OptimizerConfig, values: usize) -> Self {
        Self::with(config, values, None).expect("memory is no file that can fail")
    }

    /// The same with its state in files of a directory, which have no name and go away with the process.
    ///
    /// # Errors
    /// Where there is no room for them.
    pub fn paged(config: OptimizerConfig, values: usize, directory: &Path) -> Result<Self> {
        Self::with(config, values, Some(directory))
    }

    fn with(config: OptimizerConfig, values: usize, directory: Option<&Path>) -> Result<Self> {
        fn room<T: bytemuck::Pod>(len: usize, directory: Option<&Path>) -> Result<PagedVec<T>> {
            Ok(match directory {
                None => PagedVec::in_memory(len),
                Some(directory) => PagedVec::in_file(len, directory)?,
            })
        }
        let state = match config.kind {
            OptimizerKind::AdamW => State::AdamW(room(2 * values, directory)?),
            OptimizerKind::Lion => State::Lion(room(values, directory)?),
            OptimizerKind::AdamW8bit => State::AdamW8bit {
                codes: room(2 * values, directory)?,
                scales: room(2 * values.div_ceil(BLOCK), directory)?,
                levels: Box::new([Levels::signed(), Levels::unsigned()]),
            },
        };
        Ok(Self { config, step: 0, values, state })
    }

    /// Bytes of the state.
    pub fn state_bytes(&self) -> usize {
        self.parts().iter().map(|(_, part)| part.len()).sum()
    }

    /// Bytes of the state for so many values.
    pub fn bytes(config: &OptimizerConfig, values: usize) -> usize {
        match config.kind {
            OptimizerKind::AdamW => 8 * values,
            OptimizerKind::Lion => 4 * values,
            OptimizerKind::AdamW8bit => 2 * values + 8 * values.div_ceil(BLOCK),
        }
    }

    /// Takes a step against the gradients, with the learning rate η.
    ///
    /// # Panics
    /// Where the parameters are not as many as at the beginning.
    pub fn step(&mut self, cpu: &Cpu, parameters: &mut Parameters, learning_rate: f32) {
        assert_eq!(parameters.values.len(), self.values, "parameters were added");
        self.step += 1;
        let config = self.config;
        decay(cpu, parameters, learning_rate * config.weight_decay);
        let values = parameters.values.chunks_mut(TASK).zip(parameters.gradients.chunks(TASK));
        match &mut self.state {
            State::AdamW(moments) => {
                let adam = Adam::new(&config, self.step, learning_rate);
                let mut tasks: Vec<_> = values.zip(moments.chunks_mut(2 * TASK)).collect();
                cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
                    let ((values, gradients), moments) = &mut task[0];
                    let moments = moments.as_chunks_mut::<2>().0;
                    for ((value, &g), [m, v]) in values.iter_mut().zip(*gradients).zip(moments) {
                        adam.update(value, g, m, v);
                    }
                });
            }
            State::AdamW8bit { codes, scales, levels } => {
                let adam = Adam::new(&config, self.step, learning_rate);
                let states = codes.chunks_mut(2 * TASK).zip(scales.chunks_mut(2 * TASK / BLOCK));
                let mut tasks: Vec<_> = values.zip(states).collect();
                cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
                    let ((values, gradients), (codes, scales)) = &mut task[0];
                    let blocks = values.chunks_mut(BLOCK).zip(gradients.chunks(BLOCK));
                    let states = codes.chunks_mut(2 * BLOCK).zip(scales.as_chunks_mut::<2>().0);
                    for ((values, gradients), (codes, scales)) in blocks.zip(states) {
                        adam.update_block(values, gradients, codes, scales, levels);
                    }
                });
            }
            State::Lion(moments) => {
                let OptimizerConfig { beta1, beta2, .. } = config;
                let mut tasks: Vec<_> = values.zip(moments.chunks_mut(TASK)).collect();
                cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
                    let ((values, gradients), moments) = &mut task[0];
                    for ((value, &g), m) in values.iter_mut().zip(*gradients).zip(&mut **moments) {
                        let direction = beta1 * *m + (1.0 - beta1) * g;
                        let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
                        *value -= learning_rate * sign;
                        *m = beta2 * *m + (1.0 - beta2) * g;
                    }
                });
            }
        }
    }

    /// t
    pub(crate) fn steps(&self) -> u64 {
        self.step
    }

    /// The state's parts by name, as bytes.
    pub(crate) fn parts(&self) -> Vec<(&'static str, &[u8])> {
        match &self.state {
            State::AdamW(moments) => vec![("optimizer.moments", bytemuck::cast_slice(moments))],
            State::Lion(moments) => vec![("optimizer.moments", bytemuck::cast_slice(moments))],
            State::AdamW8bit { codes, scales, .. } => {
                vec![("optimizer.codes", codes), ("optimizer.scales", bytemuck::cast_slice(scales))]
            }
        }
    }

    /// Takes up the state after so many steps; `part` gives the bytes that [`Optimizer::parts`] gave.
    pub(crate) fn restore(
        &mut self,
        step: u64,
        mut part: impl FnMut(&str, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.step = step;
        match &mut self.state {
            State::AdamW(moments) | State::Lion(moments) => {
                part("optimizer.moments", bytemuck::cast_slice_mut(moments))
            }
            State::AdamW8bit { codes, scales, .. } => {
                part("optimizer.codes", codes)?;
                part("optimizer.scales", bytemuck::cast_slice_mut(scales))
            }
        }
    }
}

/// θ = θ − part · θ
fn decay(cpu: &Cpu, parameters: &mut Parameters, part: f32) {
    if part == 0.0 {
        return;
    }
    for parameter in parameters.all().to_vec().into_iter().filter(|parameter| parameter.decays) {
        cpu.pool().run_chunks(&mut parameters.values[parameter.range], TASK, |_, values| {
            values.iter_mut().for_each(|value| *value *= 1.0 - part);
        });
    }
}

/// AdamW's numbers in one step.
struct Adam {
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    /// η / (1 − β₁ᵗ)
    size: f32,
    /// √(1 − β₂ᵗ)
    second: f32,
}

impl Adam {
    fn new(config: &OptimizerConfig, step: u64, learning_rate: f32) -> Self {
        let OptimizerConfig { beta1, beta2, epsilon, .. } = *config;
        let corrected = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
        Self {
            beta1,
            beta2,
            epsilon,
            size: (f64::from(learning_rate) / corrected(beta1)) as f32,
            second: corrected(beta2).sqrt() as f32,
        }
    }

    fn update(&self, value: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        *m += (1.0 - self.beta1) * (g - *m);
        *v += (1.0 - self.beta2) * (g * g - *v);
        *value -= self.size * *m / (v.sqrt() / self.second + self.epsilon);
    }

    fn update_block(
        &self,
        values: &mut [f32],
        gradients: &[f32],
        codes: &mut [u8],
        scales: &mut [f32; 2],
        [signed, unsigned]: &[Levels; 2],
    ) {
        let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
        let (m_codes, v_codes) = codes.split_at_mut(values.len());
        let (first, second) = (&mut first[..values.len()], &mut second[..values.len()]);
        signed.read(m_codes, scales[0], first);
        unsigned.read(v_codes, scales[1], second);
        let moments = first.iter_mut().zip(&mut *second);
        for ((value, &g), (m, v)) in values.iter_mut().zip(gradients).zip(moments) {
            self.update(value, g, m, v);
        }
        scales[0] = signed.write(first, m_codes);
        scales[1] = unsigned.write(second, v_codes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Σ (x − i)² of values x with gradients 2 (x − i).
    fn distance(kind: OptimizerKind, steps: usize, rate: f32, paged: Option<&Path>) -> Vec<f32> {
        let cpu = Cpu::new(2).unwrap();
        let n = 3 * BLOCK + 17;
        let goal = |i: usize| (i % 11) as f32 / 10.0 - 0.5;
        let mut parameters = Parameters::default();
        parameters.add("x".into(), (1, n), &vec![0.0; n]);
        let config = OptimizerConfig::new(kind);
        let mut optimizer = match paged {
            None => Optimizer::new(config, n),
            Some(directory) => Optimizer::paged(config, n, directory).unwrap(),
        };
        for step in 0..steps {
            for i in 0..n {
                parameters.gradients[i] = 2.0 * (parameters.values[i] - goal(i));
            }
            optimizer.step(&cpu, &mut parameters, rate * (1.0 - step as f32 / steps as f32));
        }
        (0..n).map(|i| parameters.values[i] - goal(i)).collect()
    }

    #[test]
    fn all_of_them_find_a_minimum() {
        for (kind, bytes) in [
            (OptimizerKind::AdamW, 8.0),
            (OptimizerKind::AdamW8bit, 2.0),
            (OptimizerKind::Lion, 4.0),
        ] {
            let left = distance(kind, 300, 0.02, None);
            let worst = left.iter().fold(0.0f32, |most, d| most.max(d.abs()));
            assert!(worst < 0.01, "{kind:?}: {worst}");
            let optimizer = Optimizer::new(OptimizerConfig::new(kind), 1 << 16);
            assert_eq!(
                Optimizer::bytes(&OptimizerConfig::new(kind), 1 << 16),
                optimizer.state_bytes()
            );
            let each = optimizer.state_bytes() as f64 / f64::from(1 << 16);
            assert!((bytes..bytes * 1.02).contains(&each), "{kind:?}: {each} bytes each");
        }
    }

    /// Without a gradient nothing changes but what decays.
    #[test]
    fn matrices_decay_and_vectors_do_not() {
        let cpu = Cpu::new(2).unwrap();
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion] {
            let mut parameters = Parameters::default();
            parameters.add("a matrix".into(), (2, 2), &[1.0, 2.0, 3.0, 4.0]);
            parameters.add_vector("a norm".into(), &[1.0; 2]);
            let config = OptimizerConfig { weight_decay: 0.5, ..OptimizerConfig::new(kind) };
            Optimizer::new(config, 6).step(&cpu, &mut parameters, 0.5);
            assert_eq!(parameters.values, [0.75, 1.5, 2.25, 3.0, 1.0, 1.0], "{kind:?}");
        }
    }

    #[test]
    fn a_state_in_a_file_is_the_same_to_the_bit() {
        let directory = tempfile::tempdir().unwrap();
        for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion] {
            let (memory, file) =
                (distance(kind, 20, 0.02, None), distance(kind, 20, 0.02, Some(directory.path())));
            assert_eq!(memory, file, "{kind:?}");
        }
        // Nothing is left behind.
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
