//! Gradients of causal attention over sequences whose queries, keys and values lie side by side: FlashAttention's
//! backward pass (arXiv 2205.14135, algorithm 4), in the second version's loop order (arXiv 2307.08691).
//!
//! With s = scale · q·k, c = cap · tanh(s / cap) or s, p = e^(c − L), L = ln Σ e^c, o = Σ p v and the loss's
//! gradient ȯ:
//!
//! ```text
//! v̇ⱼ = Σᵢ pᵢⱼ ȯᵢ      ṗᵢⱼ = ȯᵢ·vⱼ      δᵢ = ȯᵢ·oᵢ = Σⱼ pᵢⱼ ṗᵢⱼ
//! ċᵢⱼ = pᵢⱼ (ṗᵢⱼ − δᵢ)      ṡᵢⱼ = ċᵢⱼ (1 − (cᵢⱼ / cap)²)
//! q̇ᵢ = scale · Σⱼ ṡᵢⱼ kⱼ      k̇ⱼ = scale · Σᵢ ṡᵢⱼ qᵢ
//! ```
//!
//! Scores are computed again, for a tile of queries and all keys that these see: memory grows with the number of tokens
//! and not with its square. A task has one head of one sequence and adds up in a fixed order; the gradients that query
//! heads give to a key–value head they share are added up after. So results depend neither on threads nor on the
//! instruction set.

use std::ops::Range;

use bevel_base::AlignedVec;

use super::AttentionSpec;
use crate::dispatch::for_each_isa;
use crate::linalg::{View, multiply_alone};
use crate::math::{LANES, exp, tanh};
use crate::{Cpu, Isa};

/// Queries and keys of a tile.
const TILE: usize = 64;

/// What attention was computed from, and what came of it: `n` tokens of sequences that follow one another.
#[derive(Clone, Copy, Debug)]
pub struct Attended<'a> {
    /// Rows of each sequence, one sequence after the other. A token sees those of its own up to itself.
    pub sequences: &'a [Range<usize>],
    /// `[n, heads, head_dim]`
    pub q: &'a [f32],
    /// `[n, kv_heads, head_dim]`
    pub k: &'a [f32],
    /// `[n, kv_heads, head_dim]`
    pub v: &'a [f32],
    /// `[n, heads, head_dim]`
    pub out: &'a [f32],
}

/// Where [`attention_backward`] puts the gradients, in the shapes of [`Attended`].
#[derive(Debug)]
pub struct AttentionGradients<'a> {
    /// Of the queries.
    pub q: &'a mut [f32],
    /// Of the keys.
    pub k: &'a mut [f32],
    /// Of the values.
    pub v: &'a mut [f32],
}

/// Gradients of queries, keys and values, given that of the output, `d_out`, `[n, heads, head_dim]`.
///
/// # Panics
/// Where lengths do not fit, or the sequences are not all rows in their order.
pub fn attention_backward(
    cpu: &Cpu,
    gradients: AttentionGradients<'_>,
    d_out: &[f32],
    attended: &Attended<'_>,
    spec: &AttentionSpec,
) {
    let AttentionSpec { heads, kv_heads, head_dim: d, .. } = *spec;
    let n = attended.sequences.last().map_or(0, |last| last.end);
    let mut next = 0;
    for rows in attended.sequences {
        assert_eq!(rows.start, next, "sequences follow one another");
        next = rows.end.max(rows.start);
    }
    let lengths = [attended.q.len(), attended.out.len(), d_out.len(), gradients.q.len()];
    assert_eq!(lengths, [n * heads * d; 4], "attention_backward: queries");
    let lengths = [attended.k.len(), attended.v.len(), gradients.k.len(), gradients.v.len()];
    assert_eq!(lengths, [n * kv_heads * d; 4], "attention_backward: keys and values");
    if n == 0 {
        return;
    }
    // A head's rows side by side.
    let q = heads_first(cpu, attended.q, heads, d);
    let k = heads_first(cpu, attended.k, kv_heads, d);
    let v = heads_first(cpu, attended.v, kv_heads, d);
    let out = heads_first(cpu, attended.out, heads, d);
    let d_out = heads_first(cpu, d_out, heads, d);
    let mut found = vec![0.0; 3 * n * heads * d];
    let (d_q, rest) = found.split_at_mut(n * heads * d);
    let (d_k, d_v) = rest.split_at_mut(n * heads * d);
    let mut tasks = Vec::new();
    let (mut rest_q, mut rest_k, mut rest_v) = (&mut *d_q, &mut *d_k, &mut *d_v);
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        for rows in attended.sequences {
            let of = |head: usize| (head * n + rows.start) * d..(head * n + rows.end) * d;
            let (own, shared) = (of(head), of(kv_head));
            let head = Head {
                q: &q[own.clone()],
                k: &k[shared.clone()],
                v: &v[shared],
                out: &out[own.clone()],
                d_out: &d_out[own],
            };
            let (d_q, d_k, d_v);
            (d_q, rest_q) = rest_q.split_at_mut(rows.len() * d);
            (d_k, rest_k) = rest_k.split_at_mut(rows.len() * d);
            (d_v, rest_v) = rest_v.split_at_mut(rows.len() * d);
            tasks.push((head, [d_q, d_k, d_v]));
        }
    }
    cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
        let (head, gradients) = &mut task[0];
        head.backward(cpu.isa(), gradients, spec);
    });
    drop(tasks);
    tokens_first(cpu, gradients.q, d_q, heads, d);
    for (gradient, found) in [(gradients.k, d_k), (gradients.v, d_v)] {
        // Of the query heads that share a head, into the first.
        let group = heads / kv_heads;
        cpu.pool().run_chunks(found, group * n * d, |_, heads| {
            let (first, others) = heads.split_at_mut(n * d);
            for other in others.chunks_exact(n * d) {
                first.iter_mut().zip(other).for_each(|(sum, d)| *sum += d);
            }
        });
        cpu.pool().run_chunks(gradient, kv_heads * d, |token, out| {
            for (head, out) in out.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&found[(head * group * n + token) * d..][..d]);
            }
        });
    }
}

/// `[n, heads, d]` as `[heads, n, d]`.
fn heads_first(cpu: &Cpu, x: &[f32], heads: usize, d: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    let n = x.len() / (heads * d);
    cpu.pool().run_chunks(&mut out, n * d, |head, out| {
        for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(heads * d)) {
            out.copy_from_slice(&x[head * d..][..d]);
        }
    });
    out
}

/// `[heads, n, d]` as `[n, heads, d]`.
fn tokens_first(cpu: &Cpu, out: &mut [f32], x: &[f32], heads: usize, d: usize) {
    let n = x.len() / (heads * d);
    cpu.pool().run_chunks(out, heads * d, |token, out| {
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            out.copy_from_slice(&x[(head * n + token) * d..][..d]);
        }
    });
}

/// One query head of one sequence: `[tokens, d]` each.
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    d_out: &'a [f32],
}

impl Head<'_> {
    /// q̇, and the head's part of k̇ and v̇; all are zero before.
    fn backward(&self, isa: Isa, gradients: &mut [&mut [f32]; 3], spec: &AttentionSpec) {
        let AttentionSpec { head_dim: d, scale, softcap, window, .. } = *spec;
        let [d_q, d_k, d_v] = gradients;
        let n = self.q.len() / d;
        let (all_k, all_v) = (View::new(self.k, n, d), View::new(self.v, n, d));
        let (all_q, all_d_out) = (View::new(self.q, n, d), View::new(self.d_out, n, d));
        let mut scores = vec![0.0; TILE * n.next_multiple_of(LANES)];
        let (mut d_p, mut p) = (vec![0.0; TILE * TILE], vec![0.0; TILE * TILE]);
        let mut panels = AlignedVec::default();
        let mut product = |c: &mut [f32], stride: usize, a: View<'_>, b: View<'_>| {
            multiply_alone(isa, a, b, c, stride, &mut panels);
        };
        for start in (0..n).step_by(TILE) {
            let queries = start..n.min(start + TILE);
            let count = queries.len();
            let (q, d_out) =
                (all_q.part(queries.clone(), 0..d), all_d_out.part(queries.clone(), 0..d));
            // The keys that some of them see, from the beginning of a tile.
            let first = window.map_or(0, |window| (start + 1).saturating_sub(window));
            let first = first / TILE * TILE;
            let width = (queries.end - first).next_multiple_of(LANES);
            let scores = &mut scores[..count * width];
            scores.fill(0.0);
            product(scores, width, q, all_k.part(first..queries.end, 0..d).transposed());
            cap(isa, scores, scale, softcap);
            let mut logs = [[0.0f32; 2]; TILE];
            for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
                // −∞ where a query does not see a key.
                let query = start + row;
                let before = window.map_or(0, |window| (query + 1).saturating_sub(window));
                scores[..before.saturating_sub(first)].fill(f32::NEG_INFINITY);
                scores[query + 1 - first..].fill(f32::NEG_INFINITY);
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let out = &self.out[query * d..][..d];
                let delta = dot(isa, &self.d_out[query * d..][..d], out);
                logs[row] = [most + sum_exp(isa, scores, most).ln(), delta];
            }
            for key in (first..queries.end).step_by(TILE) {
                let keys = key..queries.end.min(key + TILE);
                let seen = keys.len();
                let (k, v) = (all_k.part(keys.clone(), 0..d), all_v.part(keys, 0..d));
                d_p.fill(0.0);
                product(&mut d_p, TILE, d_out, v.transposed());
                for (row, &[log, delta]) in logs[..count].iter().enumerate() {
                    let scores = &mut scores[row * width + key - first..][..seen];
                    let (p, d_p) = (&mut p[row * TILE..][..seen], &d_p[row * TILE..][..seen]);
                    score_gradients(isa, scores, p, d_p, log, delta, scale, softcap);
                }
                let d_s =
                    View::new(scores, count, width).part(0..count, key - first..key - first + seen);
                let p = View::new(&p, TILE, TILE).part(0..count, 0..seen);
                product(&mut d_q[start * d..], d, d_s, k);
                product(&mut d_k[key * d..], d, d_s.transposed(), q);
                product(&mut d_v[key * d..], d, p.transposed(), d_out);
            }
        }
    }
}

for_each_isa! {
    /// c of scores that are not scaled yet.
    fn cap(scores: &mut [f32], scale: f32, softcap: Option<f32>) {
        match softcap {
            None => scores.iter_mut().for_each(|score| *score *= scale),
            Some(cap) => {
                let inverse = scale / cap;
                scores.iter_mut().for_each(|score| *score = cap * tanh(*score * inverse));
            }
        }
    }

    fn sum_exp(scores: &[f32], most: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        for part in scores.as_chunks::<LANES>().0 {
            for j in 0..LANES {
                lanes[j] += exp(part[j] - most);
            }
        }
        crate::math::sum_lanes(lanes)
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            lanes[i % LANES] += a * b;
        }
        crate::math::sum_lanes(lanes)
    }

    /// p, and scale · ṡ in the place of c.
    fn score_gradients(
        scores: &mut [f32],
        p: &mut [f32],
        d_p: &[f32],
        lse: f32,
        delta: f32,
        scale: f32,
        softcap: Option<f32>,
    ) {
        let inverse = softcap.map_or(0.0, |cap| 1.0 / cap);
        for ((score, p), d_p) in scores.iter_mut().zip(p).zip(d_p) {
            let c = *score;
            *p = exp(c - lse);
            let bent = c * inverse;
            // A key that is not seen has c = −∞, p = 0, and no slope.
            let slope = if *p == 0.0 { 0.0 } else { 1.0 - bent * bent };
            *score = *p * (d_p - delta) * (slope * scale);
        }
    }
}
