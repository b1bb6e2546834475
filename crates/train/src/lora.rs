//! Low-rank adaptation (LoRA, arXiv 2106.09685): y = W x + b + s B A x, with W frozen, A `[r, in]`, B `[out, r]` and
//! s = α / r, or α / √r (rsLoRA, arXiv 2312.03732).

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{Region, Update, View, gemm};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::Parameters;

/// A linear layer of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Target {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// GGUF's name, relative to the block.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "attn_q",
            Self::Key => "attn_k",
            Self::Value => "attn_v",
            Self::Output => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        }
    }
}

/// Which adapters there are.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r
    pub rank: usize,
    /// α
    pub alpha: f32,
    /// s is α / √r and not α / r.
    pub rank_stabilized: bool,
    /// The layers that have one.
    pub targets: Vec<Target>,
    /// Start of the random numbers that A begins with; B begins with zeros.
    pub seed: u64,
}

impl LoraConfig {
    /// Adapters of rank 8 with α = 16 on queries and values: PEFT's usual choice.
    pub fn new() -> Self {
        let targets = vec![Target::Query, Target::Value];
        Self { rank: 8, alpha: 16.0, rank_stabilized: false, targets, seed: 0 }
    }

    /// s
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self::new()
    }
}

/// An adapter of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Lora {
    /// Numbers of A and B among the parameters.
    a: usize,
    b: usize,
    rank: usize,
    scale: f32,
}

impl Lora {
    /// Adds an adapter to the parameters: A uniform in ±1 / √in (Kaiming's with a = √5, as PEFT has it), B zero.
    pub(crate) fn new(
        config: &LoraConfig,
        name: &str,
        (rows, cols): (usize, usize),
        random: &mut Pcg64Mcg,
        parameters: &mut Parameters,
    ) -> Self {
        let bound = 1.0 / (cols as f32).sqrt();
        let a: Vec<f32> =
            (0..config.rank * cols).map(|_| random.random_range(-bound..bound)).collect();
        let b = vec![0.0; rows * config.rank];
        Self {
            a: parameters.add(format!("{name}.lora_a"), (config.rank, cols), &a),
            b: parameters.add(format!("{name}.lora_b"), (rows, config.rank), &b),
            rank: config.rank,
            scale: config.scale(),
        }
    }

    /// The random numbers that adapters begin with.
    pub(crate) fn random(config: &LoraConfig) -> Pcg64Mcg {
        Pcg64Mcg::seed_from_u64(config.seed)
    }

    /// `y += s (x Aᵀ) Bᵀ`
    pub(crate) fn forward(
        &self,
        cpu: &Cpu,
        parameters: &Parameters,
        y: &mut [f32],
        x: &[f32],
        n: usize,
    ) {
        let (a, b) = (parameters.get(self.a), parameters.get(self.b));
        let inner = self.inner(cpu, a, x, n);
        let rows = b.len() / self.rank;
        let b = View::new(b, rows, self.rank).transposed();
        gemm(cpu, Update::Add, View::new(&inner, n, self.rank), b, y, rows, Region::Whole);
    }

    /// `d_x += s (d_y B) A`, and the gradients of A and B.
    pub(crate) fn backward(
        &self,
        cpu: &Cpu,
        parameters: &mut Parameters,
        d_x: &mut [f32],
        d_y: &[f32],
        x: &[f32],
        n: usize,
    ) {
        let rank = self.rank;
        let inner = self.inner(cpu, parameters.get(self.a), x, n);
        let (b, d_b) = parameters.with_gradient(self.b);
        let rows = b.len() / rank;
        let d_y = View::new(d_y, n, rows);
        // Ḃ = s ẏᵀ (x Aᵀ)
        gemm(
            cpu,
            Update::Add,
            d_y.transposed(),
            View::new(&inner, n, rank),
            d_b,
            rank,
            Region::Whole,
        );
        let mut d_inner = vec![0.0; n * rank];
        gemm(cpu, Update::Add, d_y, View::new(b, rows, rank), &mut d_inner, rank, Region::Whole);
        d_inner.iter_mut().for_each(|d| *d *= self.scale);
        let (a, d_a) = parameters.with_gradient(self.a);
        let cols = a.len() / rank;
        let d_inner = View::new(&d_inner, n, rank);
        // Ȧ = s (ẏ B)ᵀ x
        let x = View::new(x, n, cols);
        gemm(cpu, Update::Add, d_inner.transposed(), x, d_a, cols, Region::Whole);
        gemm(cpu, Update::Add, d_inner, View::new(a, rank, cols), d_x, cols, Region::Whole);
    }

    /// s x Aᵀ, `[n, r]`
    fn inner(&self, cpu: &Cpu, a: &[f32], x: &[f32], n: usize) -> Vec<f32> {
        let (rank, cols) = (self.rank, a.len() / self.rank);
        let mut inner = vec![0.0; n * rank];
        let a = View::new(a, rank, cols).transposed();
        gemm(cpu, Update::Add, View::new(x, n, cols), a, &mut inner, rank, Region::Whole);
        inner.iter_mut().for_each(|value| *value *= self.scale);
        inner
    }
}
