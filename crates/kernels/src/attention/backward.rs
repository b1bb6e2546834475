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
//! heads give to a key–value head they share are added up after. So results do not depend on threads, nor in single
//! precision on the instruction set.

use std::ops::Range;

use bevel_base::AlignedVec;

use super::AttentionSpec;
use crate::dispatch::for_each_isa;
use crate::linalg::{Precision, View, multiply_alone};
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

/// Gradients of queries, keys and values, given that of the output, `d_out`, `[n, heads, head_dim]`. Products are of the given
/// precision; scores, which an exponential follows, are in single precision always. `room` is used again by the next call.
///
/// # Panics
/// Where lengths do not fit, or the sequences are not all rows in their order.
pub fn attention_backward(
    cpu: &Cpu,
    gradients: AttentionGradients<'_>,
    d_out: &[f32],
    attended: &Attended<'_>,
    spec: &AttentionSpec,
    precision: Precision,
    room: &mut Vec<f32>,
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
    let (all_q, all_out) = (View::new(attended.q, n, heads * d), View::new(d_out, n, heads * d));
    let width = kv_heads * d;
    let (all_k, all_v) = (View::new(attended.k, n, width), View::new(attended.v, n, width));
    // Tasks write over all of it.
    room.resize(3 * n * heads * d, 0.0);
    let found = &mut room[..];
    let (d_q, rest) = found.split_at_mut(n * heads * d);
    let (d_k, d_v) = rest.split_at_mut(n * heads * d);
    let mut tasks = Vec::new();
    let (mut rest_q, mut rest_k, mut rest_v) = (&mut *d_q, &mut *d_k, &mut *d_v);
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        for rows in attended.sequences {
            let of = |head: usize| head * d..(head + 1) * d;
            let head = Head {
                q: all_q.part(rows.clone(), of(head)),
                k: all_k.part(rows.clone(), of(kv_head)),
                v: all_v.part(rows.clone(), of(kv_head)),
                d_out: all_out.part(rows.clone(), of(head)),
                outs: [attended.out, d_out].map(|x| &x[rows.start * heads * d + head * d..]),
                stride: heads * d,
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
        head.backward(cpu.isa(), gradients, spec, precision);
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
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    d_out: View<'a>,
    /// The output and its gradient, from the head's first value on: rows that begin `stride` values apart.
    outs: [&'a [f32]; 2],
    stride: usize,
}

impl Head<'_> {
    /// q̇, and the head's part of k̇ and v̇.
    fn backward(
        &self,
        isa: Isa,
        gradients: &mut [&mut [f32]; 3],
        spec: &AttentionSpec,
        precision: Precision,
    ) {
        let AttentionSpec { head_dim: d, scale, softcap, window, .. } = *spec;
        gradients.iter_mut().for_each(|gradient| gradient.fill(0.0));
        let [d_q, d_k, d_v] = gradients;
        let n = self.q.rows();
        let (all_q, all_k, all_v, all_d_out) = (self.q, self.k, self.v, self.d_out);
        let mut scores = vec![0.0; TILE * n.next_multiple_of(LANES)];
        let (mut d_p, mut p) = (vec![0.0; TILE * TILE], vec![0.0; TILE * TILE]);
        let mut panels = AlignedVec::default();
        let mut product = |precision, c: &mut [f32], stride: usize, a: View<'_>, b: View<'_>| {
            multiply_alone(isa, precision, a, b, c, stride, &mut panels);
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
            let keys = all_k.part(first..queries.end, 0..d).transposed();
            product(Precision::Single, scores, width, q, keys);
            cap(isa, scores, scale, softcap);
            let mut logs = [[0.0f32; 2]; TILE];
            for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
                // −∞ where a query does not see a key.
                let query = start + row;
                let before = window.map_or(0, |window| (query + 1).saturating_sub(window));
                scores[..before.saturating_sub(first)].fill(f32::NEG_INFINITY);
                scores[query + 1 - first..].fill(f32::NEG_INFINITY);
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let [out, d_out] = self.outs.map(|x| &x[query * self.stride..][..d]);
                let delta = dot(isa, d_out, out);
                logs[row] = [most + sum_exp(isa, scores, most).ln(), delta];
            }
            for key in (first..queries.end).step_by(TILE) {
                let keys = key..queries.end.min(key + TILE);
                let seen = keys.len();
                let (k, v) = (all_k.part(keys.clone(), 0..d), all_v.part(keys, 0..d));
                d_p.fill(0.0);
                product(precision, &mut d_p, TILE, d_out, v.transposed());
                for (row, &[log, delta]) in logs[..count].iter().enumerate() {
                    let scores = &mut scores[row * width + key - first..][..seen];
                    let (p, d_p) = (&mut p[row * TILE..][..seen], &d_p[row * TILE..][..seen]);
                    score_gradients(isa, scores, p, d_p, log, delta, scale, softcap);
                }
                let d_s =
                    View::new(scores, count, width).part(0..count, key - first..key - first + seen);
                let p = View::new(&p, TILE, TILE).part(0..count, 0..seen);
                product(precision, &mut d_q[start * d..], d, d_s, k);
                product(precision, &mut d_k[key * d..], d, d_s.transposed(), q);
                product(precision, &mut d_v[key * d..], d, p.transposed(), d_out);
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
