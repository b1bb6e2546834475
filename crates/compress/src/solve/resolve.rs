//! A span solved again with everything else as it is: its scales too, which packed layouts fix
//! together with the bytes they are stored in.
//!
//! 1. With all other columns fixed, the error is `(q_S − t_S) H_SS (q_S − t_S)ᵀ` plus a constant,
//!    where `t_S = q_S − G_S H_SS⁻¹`.
//! 2. GPTQ for `t_S` alone: scales by the layout's search, then the walk along the factor of `H_SS⁻¹`.
//! 3. Each row keeps the new span where its error is smaller.

use std::ops::Range;

use bevel_kernels::linalg::{Region, Update, View, gemm, inverse_cholesky_upper};

use super::obs::Surgeon;
use super::quantizer::{Quantizer, Rounded};
use super::refine::Refinement;
use super::stripes::STRIPE;

impl Refinement<'_> {
    /// Solves the span at the positions `span` again; its gradient `g` and its weights `q` are
    /// `[len, rows]`. Results in what was gained.
    pub(super) fn resolve(
        &self,
        span: Range<usize>,
        g: &[f32],
        q: &mut [f32],
        stripes: &mut [Rounded],
    ) -> f64 {
        let (rows, len) = (self.rows, span.len());
        let cols = self.h.len().isqrt();
        let mut h = Vec::with_capacity(len * len);
        for row in self.h[span.start * cols..span.end * cols].chunks_exact(cols) {
            h.extend_from_slice(&row[span.clone()]);
        }
        // (1)
        let mut u = h.clone();
        if inverse_cholesky_upper(self.cpu, &mut u, len).is_err() {
            return 0.0;
        }
        let product = |update, a: View<'_>, b: &[f32], out: &mut [f32]| {
            let b = View::new(b, len, b.len() / len);
            gemm(self.cpu, update, a, b, out, b.cols(), Region::Whole);
        };
        let mut moved = vec![0.0; len * rows];
        let mut target = q.to_vec();
        product(Update::Add, View::new(&u, len, len), g, &mut moved);
        product(Update::Subtract, View::new(&u, len, len).transposed(), &moved, &mut target);
        // (2)
        let order: Vec<usize> = (0..len).collect();
        let importance: Vec<f32> = (0..len).map(|i| h[i * len + i]).collect();
        let mut quantizer = Quantizer {
            grid: self.grid,
            order: &order,
            importance: &importance,
            fixed: false,
            isa: self.cpu.isa(),
        };
        let own = quantizer.stripes(rows);
        let surgeon = Surgeon { cpu: self.cpu, u: &u };
        let mut solved = target.clone();
        let (own, _) = surgeon.walk(&mut solved, rows, len, &mut quantizer, own);
        // (3)
        let error = |q: &[f32]| -> Vec<f64> {
            let d: Vec<f32> = q.iter().zip(&target).map(|(q, t)| q - t).collect();
            let mut hd = vec![0.0; len * rows];
            product(Update::Add, View::new(&h, len, len), &d, &mut hd);
            let mut errors = vec![0f64; rows];
            for (d, hd) in d.chunks_exact(rows).zip(hd.chunks_exact(rows)) {
                for ((error, d), hd) in errors.iter_mut().zip(d).zip(hd) {
                    *error += f64::from(*d) * f64::from(*hd);
                }
            }
            errors
        };
        let errors = error(&solved).into_iter().zip(error(q));
        let gains: Vec<f64> = errors.map(|(new, old)| (new - old).min(0.0)).collect();
        let better: Vec<bool> = gains.iter().map(|gain| *gain < 0.0).collect();
        if own.iter().any(|stripe| stripe.error.is_some()) || !better.contains(&true) {
            return 0.0;
        }
        for (k, (q, solved)) in q.chunks_exact_mut(rows).zip(solved.chunks_exact(rows)).enumerate()
        {
            for row in 0..rows {
                if better[row] {
                    q[row] = solved[row];
                }
            }
            for ((stripe, own), better) in stripes.iter_mut().zip(&own).zip(better.chunks(STRIPE)) {
                let n = better.len();
                let codes = &mut stripe.codes[(span.start + k) * n..][..n];
                for ((code, new), better) in codes.iter_mut().zip(&own.codes[k * n..]).zip(better) {
                    *code = if *better { *new } else { *code };
                }
            }
        }
        for ((stripe, own), better) in stripes.iter_mut().zip(&own).zip(better.chunks(STRIPE)) {
            for row in (0..better.len()).filter(|&row| better[row]) {
                stripe.scales.take(
                    &own.scales,
                    row,
                    span.start / self.grid.group,
                    span.start / self.grid.span,
                );
            }
        }
        gains.iter().sum()
    }
}
