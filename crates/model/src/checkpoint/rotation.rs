//! Rotation of the residual stream before quantization (QuaRot, arXiv 2404.00456).
//!
//! RMSNorm without gain commutes with an orthogonal `R`: `norm(x R) = norm(x) R`. So a model whose
//! residual stream is multiplied by `R` everywhere computes the same function, and its weights, each a
//! mixture of many, have no outliers left.
//!
//! 1. A norm's gain `g` moves into the matrices that read its output: `W ← W diag(g)`, `g ← 1`.
//! 2. Matrices that read the residual stream, the router and the output head among them: `W ← W R`.
//! 3. Matrices that write to it: `W ← Rᵀ W`, and their biases `b ← b R`.
//! 4. The embedding: `E ← E R`. A head that was the embedding becomes a matrix of its own, because
//!    only it takes the last norm's gain.
//!
//! `R = S (H ⊗ Q)`: random signs, a Hadamard matrix of the power of two in the width, and a random
//! orthogonal matrix of its odd part. A width of 576 is 64 · 9.

use std::borrow::Cow;

use bevel_base::DType;
use indexmap::IndexMap;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::{Checkpoint, Entry, Place};
use crate::family::NormPlacement;
use crate::{Error, Result};

/// A checkpoint's rotation, and its tensors as the files have them.
#[derive(Debug)]
pub(super) struct Rotated {
    rotation: Rotation,
    stored: IndexMap<String, Entry>,
}

/// What rotation does to a tensor.
enum Role {
    /// Rows read the residual stream, behind the norm of this name.
    Reads(String),
    /// Columns are written to it.
    Writes,
    /// Rows are points of it: the embedding, a bias.
    Lies,
    /// A norm on it, whose gain has moved.
    Norm,
}

impl Checkpoint {
    /// The same function with its residual stream rotated by the random orthogonal matrix of `seed`:
    /// weights without outliers, in f32.
    ///
    /// # Errors
    /// [`Error::NotRotatable`] for families that normalise what a block adds to the stream.
    pub fn rotated(mut self, seed: u64) -> Result<Self> {
        if self.config.family.norms != NormPlacement::Pre {
            let family = self.config.family.hf[0].to_owned();
            return Err(Error::NotRotatable { path: self.path, family });
        }
        if self.config.tied {
            let embedding = self.tensors["token_embd.weight"].clone();
            self.tensors.insert("output.weight".to_owned(), embedding);
            self.config.tied = false;
        }
        let rotation = Rotation::new(self.config.dim, seed);
        let stored = self.tensors.clone();
        for (name, entry) in &mut self.tensors {
            if role(name).is_some() {
                entry.dtype = DType::F32;
            }
        }
        self.rotated = Some(Rotated { rotation, stored });
        Ok(self)
    }

    /// The type of a tensor in the file, also where what is [read](Checkpoint::read) of it is f32
    /// because it is rotated, or because an adapter is merged into it.
    pub fn stored_dtype(&self, name: &str) -> DType {
        self.stored_entry(name).dtype
    }

    /// Bytes that a tensor takes in the file; the head that rotation makes of a tied embedding takes
    /// as many as that.
    pub fn stored_len(&self, name: &str) -> u64 {
        self.stored_entry(name).stored_len()
    }

    fn stored_entry(&self, name: &str) -> &Entry {
        let rotated = self.rotated.as_ref().and_then(|rotated| rotated.stored.get(name));
        // What replaces a tensor was not rounded to its type.
        let adapted = self
            .adapted
            .stored(name)
            .filter(|_| self.random_seed().is_none() && !self.replacements().contains_key(name));
        adapted.or(rotated).unwrap_or_else(|| &self.tensors[name])
    }

    /// A tensor's bytes, rotated where that concerns it.
    pub(super) fn read_rotated(&self, rotated: &Rotated, name: &str) -> Result<Cow<'_, [u8]>> {
        let stored = |name: &str| rotated.stored.get(name).ok_or_else(|| self.missing(name));
        let entry = stored(name)?;
        let Some(role) = role(name) else { return self.read_entry(name, entry) };
        let mut values = self.entry_to_f32(name, entry)?;
        let (dim, rotation) = (self.config.dim, &rotated.rotation);
        match role {
            Role::Reads(norm) => {
                let gain = self.entry_to_f32(&norm, stored(&norm)?)?;
                for row in values.chunks_exact_mut(dim) {
                    row.iter_mut().zip(&gain).for_each(|(w, g)| *w *= g);
                }
                rotation.rotate_rows(&mut values);
            }
            Role::Writes => {
                let cols = entry.shape.row_len();
                values.chunks_exact_mut(dim * cols).for_each(|w| rotation.rotate_columns(w, cols));
            }
            Role::Lies => rotation.rotate_rows(&mut values),
            Role::Norm => values.fill(1.0),
        }
        Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into())
    }
}

fn role(name: &str) -> Option<Role> {
    let (layer, rest) = match Place::of(name) {
        Place::Global("token_embd.weight") => return Some(Role::Lies),
        Place::Global("output_norm.weight") => return Some(Role::Norm),
        Place::Global("output.weight") => {
            return Some(Role::Reads("output_norm.weight".to_owned()));
        }
        Place::Global(_) => return None,
        Place::Layer(layer, rest) => (layer, rest),
    };
    let reads = |norm: &str| Some(Role::Reads(format!("blk.{layer}.{norm}.weight")));
    match rest {
        "attn_norm.weight" | "ffn_norm.weight" => Some(Role::Norm),
        "attn_q.weight" | "attn_k.weight" | "attn_v.weight" | "attn_qkv.weight" => {
            reads("attn_norm")
        }
        "ffn_gate.weight"
        | "ffn_up.weight"
        | "ffn_gate_inp.weight"
        | "ffn_gate_exps.weight"
        | "ffn_up_exps.weight" => reads("ffn_norm"),
        "attn_output.weight" | "ffn_down.weight" | "ffn_down_exps.weight" => Some(Role::Writes),
        "attn_output.bias" | "ffn_down.bias" => Some(Role::Lies),
        _ => None,
    }
}

/// A random orthogonal matrix of a model's width.
#[derive(Clone, Debug)]
struct Rotation {
    dim: usize,
    /// The odd part of `dim`.
    odd: usize,
    /// `[dim]`
    signs: Vec<f32>,
    /// `[odd, odd]`, times the Hadamard matrix's `1/√(dim/odd)`.
    q: Vec<f32>,
}

impl Rotation {
    /// The rotation of a seed.
    fn new(dim: usize, seed: u64) -> Self {
        let odd = dim >> dim.trailing_zeros();
        let mut rng = Pcg64::seed_from_u64(seed);
        let signs = (0..dim).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect();
        let scale = 1.0 / ((dim / odd) as f64).sqrt();
        let q = orthogonal(odd, &mut rng).into_iter().map(|v| (v * scale) as f32).collect();
        Self { dim, odd, signs, q }
    }

    /// `x ← x R` for each row of `x`, `[n, dim]`.
    fn rotate_rows(&self, x: &mut [f32]) {
        let mut mixed = vec![0.0; self.odd];
        for row in x.chunks_exact_mut(self.dim) {
            row.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
            self.rotate_signed(row, 1, &mut mixed);
        }
    }

    /// `w ← Rᵀ w` for `w`, `[dim, cols]`: each column is rotated.
    fn rotate_columns(&self, w: &mut [f32], cols: usize) {
        for (row, &sign) in w.chunks_exact_mut(cols).zip(&self.signs) {
            row.iter_mut().for_each(|x| *x *= sign);
        }
        self.rotate_signed(w, cols, &mut vec![0.0; self.odd * cols]);
    }

    /// Multiplies with `H ⊗ Q` along the first dimension of `[power of two, odd, cols]`.
    fn rotate_signed(&self, w: &mut [f32], cols: usize, mixed: &mut [f32]) {
        let mut half = self.odd * cols;
        while half < w.len() {
            for pair in w.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        for part in w.chunks_exact_mut(self.odd * cols) {
            mixed.fill(0.0);
            for (x, q) in part.chunks_exact(cols).zip(self.q.chunks_exact(self.odd)) {
                for (mixed, q) in mixed.chunks_exact_mut(cols).zip(q) {
                    mixed.iter_mut().zip(x).for_each(|(mixed, x)| *mixed += x * q);
                }
            }
            part.copy_from_slice(mixed);
        }
    }
}

/// A random orthogonal matrix `[n, n]`: the rows of a normal one, made orthonormal one after the
/// other, twice each.
fn orthogonal(n: usize, rng: &mut Pcg64) -> Vec<f64> {
    let mut q = vec![0.0; n * n];
    for i in 0..n {
        let (done, rest) = q.split_at_mut(i * n);
        let row = &mut rest[..n];
        row.iter_mut().for_each(|v| *v = normal(rng));
        for _ in 0..2 {
            for other in done.chunks_exact(n) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
    }
    q
}

/// A standard normal number (Box and Muller).
fn normal(rng: &mut Pcg64) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix itself: rotated unit vectors.
    fn matrix(rotation: &Rotation) -> Vec<f32> {
        let n = rotation.dim;
        let mut r: Vec<f32> = (0..n * n).map(|i| f32::from(i / n == i % n)).collect();
        rotation.rotate_rows(&mut r);
        r
    }

    #[track_caller]
    fn check(dim: usize) {
        let rotation = Rotation::new(dim, 7);
        let r = matrix(&rotation);
        for i in 0..dim {
            for j in 0..dim {
                let rows = r[i * dim..][..dim].iter().zip(&r[j * dim..][..dim]);
                let dot: f32 = rows.map(|(a, b)| a * b).sum();
                assert!((dot - f32::from(i == j)).abs() < 1e-5, "{dim}: rows {i} and {j}: {dot}");
            }
        }
        // Rᵀ w, by columns, against the matrix.
        let cols = 3;
        let w: Vec<f32> = (0..dim * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let mut rotated = w.clone();
        rotation.rotate_columns(&mut rotated, cols);
        for i in 0..dim {
            for c in 0..cols {
                let expected: f32 = (0..dim).map(|k| r[k * dim + i] * w[k * cols + c]).sum();
                assert!((rotated[i * cols + c] - expected).abs() < 1e-4, "{dim}: [{i}, {c}]");
            }
        }
        assert_eq!(r, matrix(&Rotation::new(dim, 7)));
        if dim > 8 {
            assert_ne!(r, matrix(&Rotation::new(dim, 8)));
        }
    }

    #[test]
    fn rotations_are_orthogonal() {
        for dim in [1, 8, 9, 12, 36, 72] {
            check(dim);
        }
    }
}
