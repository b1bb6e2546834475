//! Solvers against naive computations in f64.

mod awq;
mod formats;
mod gptq;
mod naive;
mod sparsegpt;
mod wanda;

use bevel_base::DType;
use bevel_compress::solve::{
    Codes, Form, Gptq, GroupSpec, Method, Order, Range, Rtn, ScaleType, Solved, Target, solve,
};
use bevel_compress::{Needs, Stats};
use bevel_kernels::Cpu;
use bevel_model::Checkpoint;

use crate::support::tiny_austen;

/// A layer to be quantized: weights and statistics of its inputs.
pub(super) struct Layer {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) w: Vec<f32>,
    pub(super) stats: Stats,
}

/// Numbers without a pattern between −1 and 1.
pub(super) fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

impl Layer {
    /// Weights at random, and inputs that have something in common.
    pub(super) fn random(rows: usize, cols: usize, seed: u64) -> Self {
        let mut random = random(seed);
        let w = (0..rows * cols).map(|_| random().powi(3)).collect();
        let tokens = cols + 7;
        let sizes: Vec<f32> = (0..cols).map(|_| 0.3 + random().abs().powi(4) * 4.0).collect();
        let mut x = Vec::with_capacity(tokens * cols);
        for _ in 0..tokens {
            let common = random();
            x.extend(sizes.iter().map(|size| size * (random() + common)));
        }
        let mut stats = Stats::new(cols, Needs { gram: true, cross: false });
        stats.add(&Cpu::new(1).unwrap(), &x, tokens, None);
        Self { rows, cols, w, stats }
    }

    /// The first query projection of the small real model, with its embedded tokens as inputs.
    pub(super) fn real() -> Self {
        let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let dtype = checkpoint.tensors()[name].dtype;
            let bytes = checkpoint.read(name).unwrap();
            let mut values = vec![0.0; bytes.len() / dtype.block_bytes()];
            bevel_base::pack::dequantize(dtype, &bytes, &mut values).unwrap();
            values
        };
        let (w, x) = (values("blk.0.attn_q.weight"), values("token_embd.weight"));
        let cols = 256;
        let mut stats = Stats::new(cols, Needs { gram: true, cross: false });
        stats.add(&Cpu::new(2).unwrap(), &x, x.len() / cols, None);
        Self { rows: w.len() / cols, cols, w, stats }
    }

    pub(super) fn solve(&self, cpu: &Cpu, target: &Target, method: &Method) -> Solved {
        solve(cpu, &self.w, self.rows, self.cols, &self.stats, target, method).unwrap()
    }

    /// `H_ij`
    pub(super) fn h(&self, i: usize, j: usize) -> f64 {
        f64::from(self.stats.gram().unwrap()[i.max(j) * self.cols + i.min(j)])
    }

    /// `tr(ΔW H ΔWᵀ)` for `ΔW` = the weights less `q`.
    pub(super) fn loss(&self, q: &[f32]) -> f64 {
        let rows = self.w.chunks_exact(self.cols).zip(q.chunks_exact(self.cols));
        rows.map(|(w, q)| {
            let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
            let row = |i: usize| (0..self.cols).map(|j| self.h(i, j) * d[j]).sum::<f64>();
            (0..self.cols).map(|i| d[i] * row(i)).sum::<f64>()
        })
        .sum()
    }
}

pub(super) fn integers(bits: u32, symmetric: bool, group_size: usize, range: Range) -> Target {
    let codes = Codes::Integer { bits, symmetric };
    let scale = ScaleType::F32;
    Target::Grouped(GroupSpec { codes, group_size: Some(group_size), scale, range })
}

/// GPTQ without what comes after the walk.
pub(super) fn walk(order: Order) -> Method {
    Method::Gptq(Gptq { order, refine: Some(0), ..Gptq::default() })
}

/// One of each kind of target.
pub(super) fn targets() -> Vec<Target> {
    let grouped = |codes, group_size, scale, range| {
        Target::Grouped(GroupSpec { codes, group_size, scale, range })
    };
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let e2m1: [f32; 16] = std::array::from_fn(|i| if i < 8 { e2m1[i] } else { -e2m1[i - 8] });
    let mut targets = vec![
        integers(4, true, 128, Range::MinMax),
        integers(3, false, 32, Range::MSE),
        integers(2, true, 64, Range::Search),
        integers(2, false, 64, Range::Search),
        integers(8, false, 256, Range::Search),
        grouped(Codes::Integer { bits: 4, symmetric: true }, None, ScaleType::F16, Range::Search),
        grouped(Codes::Affine { bits: 4 }, Some(64), ScaleType::Bf16, Range::Search),
        grouped(Codes::Affine { bits: 3 }, Some(32), ScaleType::F16, Range::MinMax),
        grouped(Codes::Levels(e2m1), Some(32), ScaleType::PowerOfTwo, Range::Search),
        grouped(Codes::Levels(e2m1), Some(16), ScaleType::E4m3, Range::Search),
        grouped(Codes::Float8, None, ScaleType::F32, Range::MinMax),
    ];
    use DType::*;
    targets.extend(
        [Q4_0, Q4_1, Q5_0, Q8_0, Q2_K, Q3_K, Q4_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4].map(Target::Packed),
    );
    targets
}

pub(super) const RTN: Method = Method::Rtn(Rtn { weighted: false });

/// The bytes or codes and scales of a form.
pub(super) fn bits(form: &Form) -> Vec<u8> {
    match form {
        Form::Packed { bytes, .. } => bytes.clone(),
        Form::Grouped { matrix, .. } => {
            let scales = matrix.scales.iter().flat_map(|scale| scale.to_le_bytes());
            matrix.codes.iter().copied().chain(scales).collect()
        }
    }
}
