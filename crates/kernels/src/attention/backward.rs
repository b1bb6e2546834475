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
//! Scores are computed again, a tile of 64 × 64 at a time, and never whole. A first pass goes over tiles of
//! queries: it finds L and δ and gives q̇. A second goes over tiles of keys and gives k̇ and v̇: each is a sum in a
//! fixed order in one task, so results depend neither on threads nor on the instruction set.

use std::ops::Range;

use super::AttentionSpec;
use crate::dispatch::for_each_isa;
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
    let by_head = ByHead {
        n,
        q: heads_first(cpu, attended.q, heads, d),
        k: heads_first(cpu, attended.k, kv_heads, d),
        v: heads_first(cpu, attended.v, kv_heads, d),
        out: heads_first(cpu, attended.out, heads, d),
        d_out: heads_first(cpu, d_out, heads, d),
    };
    let (mut d_q, mut lse) = (vec![0.0; n * heads * d], vec![[0.0f32; 2]; n * heads]);
    let mut tasks = Vec::new();
    let (mut rest, mut rest_lse) = (&mut d_q[..], &mut lse[..]);
    for (head, tile, rows) in tiles(heads, attended.sequences) {
        let (d_q, lse);
        (d_q, rest) = rest.split_at_mut(tile.len() * d);
        (lse, rest_lse) = rest_lse.split_at_mut(tile.len());
        tasks.push((head, tile, rows, d_q, lse));
    }
    cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
        let (head, tile, rows, d_q, lse) = &mut task[0];
        let queries = Tile { head: *head, tile: tile.clone(), sequence: rows.clone() };
        queries_backward(cpu.isa(), d_q, lse, &by_head, &queries, spec);
    });
    drop(tasks);
    let (mut d_k, mut d_v) = (vec![0.0; n * kv_heads * d], vec![0.0; n * kv_heads * d]);
    let mut tasks = Vec::new();
    let (mut rest_k, mut rest_v) = (&mut d_k[..], &mut d_v[..]);
    for (head, tile, rows) in tiles(kv_heads, attended.sequences) {
        let (d_k, d_v);
        (d_k, rest_k) = rest_k.split_at_mut(tile.len() * d);
        (d_v, rest_v) = rest_v.split_at_mut(tile.len() * d);
        tasks.push((head, tile, rows, d_k, d_v));
    }
    cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
        let (head, tile, rows, d_k, d_v) = &mut task[0];
        let keys = Tile { head: *head, tile: tile.clone(), sequence: rows.clone() };
        keys_backward(cpu.isa(), d_k, d_v, &lse, &by_head, &keys, spec);
    });
    drop(tasks);
    tokens_first(cpu, gradients.q, &d_q, heads, d);
    tokens_first(cpu, gradients.k, &d_k, kv_heads, d);
    tokens_first(cpu, gradients.v, &d_v, kv_heads, d);
}

/// Everything `[heads, n, head_dim]`, or of key–value heads.
struct ByHead {
    n: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    d_out: Vec<f32>,
}

/// Some rows of a sequence, of one head.
struct Tile {
    head: usize,
    tile: Range<usize>,
    sequence: Range<usize>,
}

/// Heads, tiles of rows and the sequence that these belong to, in the order of `[heads, n]`.
fn tiles(
    heads: usize,
    sequences: &[Range<usize>],
) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
    (0..heads).flat_map(move |head| {
        sequences.iter().flat_map(move |rows| {
            let starts = rows.clone().step_by(TILE);
            starts.map(move |start| (head, start..rows.end.min(start + TILE), rows.clone()))
        })
    })
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

/// Rows of a head, `[rows, d]`.
fn rows_of(x: &[f32], n: usize, head: usize, rows: Range<usize>, d: usize) -> &[f32] {
    &x[(head * n + rows.start) * d..][..rows.len() * d]
}

/// The columns of a head's rows, `[d, TILE]`; those beyond the last row are 0.
fn columns_of(x: &[f32], d: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(d * TILE, 0.0);
    for (row, x) in x.chunks_exact(d).enumerate() {
        for (column, &x) in x.iter().enumerate() {
            out[column * TILE + row] = x;
        }
    }
}

/// Whether a query sees a key.
#[inline(always)]
fn sees(query: usize, key: usize, sequence: usize, window: Option<usize>) -> bool {
    // Positions count from the sequence's beginning.
    let (query, key) = (query - sequence, key - sequence);
    key <= query && window.is_none_or(|window| key + window > query)
}

/// Tiles of keys that some of these queries see, the first one first.
fn keys_seen(queries: &Tile, window: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    let Tile { tile, sequence, .. } = queries;
    let first = window.map_or(sequence.start, |window| {
        sequence.start.max((tile.start + 1).saturating_sub(window))
    });
    let (first, end) = (sequence.start + (first - sequence.start) / TILE * TILE, tile.end);
    (first..end).step_by(TILE).map(move |start| start..end.min(start + TILE))
}

/// q̇ of a tile of queries, `[queries, d]`, and their L and δ.
fn queries_backward(
    isa: Isa,
    d_q: &mut [f32],
    lse: &mut [[f32; 2]],
    all: &ByHead,
    queries: &Tile,
    spec: &AttentionSpec,
) {
    let AttentionSpec { heads, kv_heads, head_dim: d, scale, softcap, window } = *spec;
    let Tile { head, ref tile, ref sequence } = *queries;
    let kv_head = head / (heads / kv_heads);
    let (n, count) = (all.n, tile.len());
    let q = rows_of(&all.q, n, head, tile.clone(), d);
    let d_out = rows_of(&all.d_out, n, head, tile.clone(), d);
    let out = rows_of(&all.out, n, head, tile.clone(), d);
    let (mut columns, mut scores, mut d_p) =
        (Vec::new(), vec![0.0; count * TILE], vec![0.0; count * TILE]);
    // c, with −∞ where a query does not see a key.
    let mut score = |scores: &mut [f32], keys: &Range<usize>| {
        columns_of(rows_of(&all.k, n, kv_head, keys.clone(), d), d, &mut columns);
        scores.fill(0.0);
        product(isa, scores, q, &columns, count, d, TILE);
        cap(isa, scores, scale, softcap);
        for (row, scores) in scores.chunks_exact_mut(TILE).enumerate() {
            for (column, score) in scores.iter_mut().enumerate() {
                let key = keys.start + column;
                if key >= keys.end || !sees(tile.start + row, key, sequence.start, window) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    };
    let mut most = [f32::NEG_INFINITY; TILE];
    let mut sums = [0.0f32; TILE];
    for keys in keys_seen(queries, window) {
        score(&mut scores, &keys);
        for (row, scores) in scores.chunks_exact(TILE).enumerate() {
            let higher = scores.iter().copied().fold(most[row], f32::max);
            if higher > f32::NEG_INFINITY {
                sums[row] = sums[row] * exp(most[row] - higher) + sum_exp(isa, scores, higher);
                most[row] = higher;
            }
        }
    }
    for (row, [lse, delta]) in lse.iter_mut().enumerate() {
        *lse = most[row] + sums[row].ln();
        *delta = dot(isa, &d_out[row * d..][..d], &out[row * d..][..d]);
    }
    let mut value_columns = Vec::new();
    d_q.fill(0.0);
    for keys in keys_seen(queries, window) {
        score(&mut scores, &keys);
        columns_of(rows_of(&all.v, n, kv_head, keys.clone(), d), d, &mut value_columns);
        d_p.fill(0.0);
        product(isa, &mut d_p, d_out, &value_columns, count, d, TILE);
        for (row, &[lse, delta]) in lse.iter().enumerate() {
            let (scores, d_p) = (&mut scores[row * TILE..][..TILE], &d_p[row * TILE..][..TILE]);
            score_gradients(isa, scores, d_p, lse, delta, scale, softcap);
        }
        // Columns beyond the last key are 0.
        let k = rows_of(&all.k, n, kv_head, keys.clone(), d);
        for (row, d_q) in d_q.chunks_exact_mut(d).enumerate() {
            product(isa, d_q, &scores[row * TILE..][..keys.len()], k, 1, keys.len(), d);
        }
    }
}

/// k̇ and v̇ of a tile of keys, `[keys, d]` each.
fn keys_backward(
    isa: Isa,
    d_k: &mut [f32],
    d_v: &mut [f32],
    lse: &[[f32; 2]],
    all: &ByHead,
    keys: &Tile,
    spec: &AttentionSpec,
) {
    let AttentionSpec { heads, kv_heads, head_dim: d, scale, softcap, window } = *spec;
    let Tile { head: kv_head, ref tile, ref sequence } = *keys;
    let (n, count, group) = (all.n, tile.len(), heads / kv_heads);
    let k = rows_of(&all.k, n, kv_head, tile.clone(), d);
    let v = rows_of(&all.v, n, kv_head, tile.clone(), d);
    let (mut columns, mut scores, mut d_p) =
        (Vec::new(), vec![0.0; count * TILE], vec![0.0; count * TILE]);
    let mut p = vec![0.0; count * TILE];
    d_k.fill(0.0);
    d_v.fill(0.0);
    for head in kv_head * group..(kv_head + 1) * group {
        for start in (tile.start..sequence.end).step_by(TILE) {
            let queries = start..sequence.end.min(start + TILE);
            let last_seen = window.map_or(sequence.end, |window| tile.end - 1 + window);
            if queries.start >= last_seen {
                break;
            }
            let q = rows_of(&all.q, n, head, queries.clone(), d);
            let d_out = rows_of(&all.d_out, n, head, queries.clone(), d);
            columns_of(q, d, &mut columns);
            scores.fill(0.0);
            product(isa, &mut scores, k, &columns, count, d, TILE);
            cap(isa, &mut scores, scale, softcap);
            columns_of(d_out, d, &mut columns);
            d_p.fill(0.0);
            product(isa, &mut d_p, v, &columns, count, d, TILE);
            let lse = &lse[head * n + queries.start..][..queries.len()];
            for row in 0..count {
                let key = tile.start + row;
                let (scores, d_p) = (&mut scores[row * TILE..], &d_p[row * TILE..]);
                let p = &mut p[row * TILE..];
                for (column, &[lse, delta]) in lse.iter().enumerate() {
                    let seen = sees_later(queries.start + column, key, sequence.start, window);
                    let (c, d_p) = (scores[column], d_p[column]);
                    p[column] = if seen { exp(c - lse) } else { 0.0 };
                    let slope = softcap.map_or(scale, |cap| scale * (1.0 - (c / cap) * (c / cap)));
                    scores[column] = p[column] * (d_p - delta) * slope;
                }
            }
            for row in 0..count {
                let (p, d_s) = (&p[row * TILE..][..lse.len()], &scores[row * TILE..][..lse.len()]);
                product(isa, &mut d_v[row * d..][..d], p, d_out, 1, lse.len(), d);
                product(isa, &mut d_k[row * d..][..d], d_s, q, 1, lse.len(), d);
            }
        }
    }
}

/// As [`sees`], for queries of which some come before the key.
#[inline(always)]
fn sees_later(query: usize, key: usize, sequence: usize, window: Option<usize>) -> bool {
    query >= key && sees(query, key, sequence, window)
}

for_each_isa! {
    /// `c += a · b`, with `a` `[m, k]`, `b` `[k, n]` and `c` `[m, n]`: sums in the order of `k`.
    fn product(c: &mut [f32], a: &[f32], b: &[f32], m: usize, k: usize, n: usize) {
        const ROWS: usize = 4;
        const COLS: usize = 2 * LANES;
        for first in (0..m).step_by(ROWS) {
            let rows = ROWS.min(m - first);
            let mut column = 0;
            while column + COLS <= n {
                let mut sums = [[0.0f32; COLS]; ROWS];
                for row in 0..rows {
                    sums[row].copy_from_slice(&c[(first + row) * n + column..][..COLS]);
                }
                if rows == ROWS {
                    for i in 0..k {
                        let b: &[f32; COLS] = b[i * n + column..][..COLS].try_into().unwrap();
                        for row in 0..ROWS {
                            let a = a[(first + row) * k + i];
                            for j in 0..COLS {
                                sums[row][j] = a.mul_add(b[j], sums[row][j]);
                            }
                        }
                    }
                } else {
                    for row in 0..rows {
                        for i in 0..k {
                            let b: &[f32; COLS] = b[i * n + column..][..COLS].try_into().unwrap();
                            let a = a[(first + row) * k + i];
                            for j in 0..COLS {
                                sums[row][j] = a.mul_add(b[j], sums[row][j]);
                            }
                        }
                    }
                }
                for row in 0..rows {
                    c[(first + row) * n + column..][..COLS].copy_from_slice(&sums[row]);
                }
                column += COLS;
            }
            for row in first..first + rows {
                for j in column..n {
                    for i in 0..k {
                        c[row * n + j] = a[row * k + i].mul_add(b[i * n + j], c[row * n + j]);
                    }
                }
            }
        }
    }

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

    /// scale · ṡ in the place of c.
    fn score_gradients(
        scores: &mut [f32],
        d_p: &[f32],
        lse: f32,
        delta: f32,
        scale: f32,
        softcap: Option<f32>,
    ) {
        let inverse = softcap.map_or(0.0, |cap| 1.0 / cap);
        for (score, d_p) in scores.iter_mut().zip(d_p) {
            let c = *score;
            let p = exp(c - lse);
            let bent = c * inverse;
            // A key that is not seen has c = −∞, p = 0, and no slope.
            let slope = if p == 0.0 { 0.0 } else { 1.0 - bent * bent };
            *score = p * (d_p - delta) * (slope * scale);
        }
    }
}
