//! Rotary position embedding (RoFormer, arXiv 2104.09864).
//!
//! A pair (a, b) of a head's values at position `p` and frequency ω turns by the angle p·ω:
//! (a·cos − b·sin, b·cos + a·sin). Frequencies are ωᵢ = θ^(−2i / `rotary_dim`), divided by a factor
//! for each where the context was extended. Angles are rounded to f32 where Hugging Face
//! transformers rounds them, because at position 100,000 that rounding can be seen in the logits.

use crate::Cpu;
use crate::dispatch::for_each_isa;
use crate::elementwise::TASK;

/// Which of a head's values form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Values 2i and 2i + 1: GGUF files of Llama and Mistral.
    Interleaved,
    /// Values i and i + `rotary_dim` / 2: Hugging Face checkpoints, and GGUF files of most other
    /// families.
    Halves,
}

/// A model's rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Leading values of a head that turn; even, at most `head_dim`. The others stay.
    pub rotary_dim: usize,
    /// Base of the frequencies.
    pub theta: f32,
    /// Divisors of the frequencies, `[rotary_dim / 2]`: Llama 3's and LongRoPE's scaling, or linear
    /// scaling with all of them equal.
    pub factors: Option<Vec<f32>>,
    /// The pairs.
    pub style: RopeStyle,
    /// Multiplies sine and cosine; 1 but for LongRoPE and YaRN.
    pub attention_factor: f32,
}

/// Cosines and sines for the tokens of one forward pass, computed once for all layers.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// ωᵢ, `[rotary_dim / 2]`.
    frequencies: Vec<f32>,
    style: RopeStyle,
    attention_factor: f32,
    /// What the table is filled for.
    positions: Vec<u32>,
    /// `[n, rotary_dim / 2]`.
    cos: Vec<f32>,
    /// `[n, rotary_dim / 2]`.
    sin: Vec<f32>,
}

impl RopeTable {
    /// An empty table for `spec`; [`RopeTable::prepare`] fills it.
    ///
    /// # Panics
    /// Where `rotary_dim` is odd or the factors are not half as many.
    pub fn new(spec: &RopeSpec) -> Self {
        let d = spec.rotary_dim;
        assert!(d.is_multiple_of(2), "rotary_dim {d} is odd");
        // As torch computes them: a power rounded to f32, and its inverse rounded to f32.
        let power =
            |i: usize| f64::from(spec.theta).powf(f64::from((2 * i) as f32 / d as f32)) as f32;
        let mut frequencies: Vec<f32> = (0..d / 2).map(|i| 1.0 / power(i)).collect();
        if let Some(factors) = &spec.factors {
            assert_eq!(factors.len(), d / 2, "rope factors for rotary_dim {d}");
            for (frequency, factor) in frequencies.iter_mut().zip(factors) {
                *frequency /= factor;
            }
        }
        Self {
            frequencies,
            style: spec.style,
            attention_factor: spec.attention_factor,
            positions: Vec::new(),
            cos: Vec::new(),
            sin: Vec::new(),
        }
    }

    /// Leading values of a head that turn.
    pub fn rotary_dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Tokens the table is prepared for.
    pub fn tokens(&self) -> usize {
        if self.frequencies.is_empty() { 0 } else { self.cos.len() / self.frequencies.len() }
    }

    /// Fills the table for tokens at `positions`, in the order of the batch; where it is filled for them
    /// already, as in calibration, whose sequences all begin at 0, it stays. Allocates only when the batch
    /// is larger than any before.
    pub fn prepare(&mut self, cpu: &Cpu, positions: &[u32]) {
        if self.positions == positions {
            return;
        }
        self.positions.clear();
        self.positions.extend_from_slice(positions);
        let half = self.frequencies.len();
        self.cos.resize(positions.len() * half, 0.0);
        self.sin.resize(positions.len() * half, 0.0);
        if half == 0 {
            return;
        }
        let (frequencies, factor) = (&self.frequencies, self.attention_factor);
        let rows = (TASK / 8).div_ceil(half);
        let fill = |values: &mut [f32], function: fn(f32) -> f32| {
            cpu.pool().run_chunks(values, rows * half, |chunk, part| {
                for (i, row) in part.chunks_exact_mut(half).enumerate() {
                    let position = positions[chunk * rows + i] as f32;
                    for (value, frequency) in row.iter_mut().zip(frequencies) {
                        *value = function(frequency * position) * factor;
                    }
                }
            });
        };
        fill(&mut self.cos, f32::cos);
        fill(&mut self.sin, f32::sin);
    }
}

/// Turns each head of `x` (`[n, heads, head_dim]`) by its token's row of `table`.
///
/// # Panics
/// Where `x` does not hold the table's tokens, or `head_dim` is less than `rotary_dim`.
pub fn rope(cpu: &Cpu, x: &mut [f32], heads: usize, head_dim: usize, table: &RopeTable) {
    turn(cpu, x, heads, head_dim, table, 1.0);
}

/// The gradient of [`rope`]'s input in the place of that of its output, `d_x`: turned back, by the transposed
/// matrices.
///
/// # Panics
/// As [`rope`].
pub fn rope_backward(cpu: &Cpu, d_x: &mut [f32], heads: usize, head_dim: usize, table: &RopeTable) {
    turn(cpu, d_x, heads, head_dim, table, -1.0);
}

fn turn(
    cpu: &Cpu,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    table: &RopeTable,
    direction: f32,
) {
    let half = table.frequencies.len();
    assert!(2 * half <= head_dim, "rotary_dim {} exceeds head_dim {head_dim}", 2 * half);
    let row = heads * head_dim;
    if half == 0 || row == 0 {
        return;
    }
    assert_eq!(x.len(), table.tokens() * row, "rope: length of x");
    let rows = TASK.div_ceil(row);
    cpu.pool().run_chunks(x, rows * row, |chunk, part| {
        for (i, token) in part.chunks_exact_mut(row).enumerate() {
            let at = (chunk * rows + i) * half;
            let (cos, sin) = (&table.cos[at..][..half], &table.sin[at..][..half]);
            match table.style {
                RopeStyle::Interleaved => {
                    turn_interleaved(cpu.isa(), token, head_dim, cos, sin, direction);
                }
                RopeStyle::Halves => {
                    turn_halves(cpu.isa(), token, head_dim, cos, sin, direction);
                }
            }
        }
    });
}

for_each_isa! {
    fn turn_halves(
        token: &mut [f32],
        head_dim: usize,
        cos: &[f32],
        sin: &[f32],
        direction: f32,
    ) {
        for head in token.chunks_exact_mut(head_dim) {
            let (first, rest) = head.split_at_mut(cos.len());
            for (((a, b), &cos), &sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
                let sin = direction * sin;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }

    fn turn_interleaved(
        token: &mut [f32],
        head_dim: usize,
        cos: &[f32],
        sin: &[f32],
        direction: f32,
    ) {
        for head in token.chunks_exact_mut(head_dim) {
            let pairs = head.as_chunks_mut::<2>().0;
            for ((pair, &cos), &sin) in pairs.iter_mut().zip(cos).zip(sin) {
                let ([a, b], sin) = (*pair, direction * sin);
                *pair = [a * cos - b * sin, b * cos + a * sin];
            }
        }
    }
}
