//! FlashAttention over a paged key–value cache.
use crate::{Cpu, KvPool};

/// Shape and rules of a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key–value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Multiplies the scores q·k; usually 1 / √`head_dim`.
    pub scale: f32,
    /// Scores become cap · tanh(score / cap): Gemma 2.
    pub softcap: Option<f32>,
    /// A query at position p sees positions greater than p − window: itself and window − 1 before it.
    pub window: Option<usize>,
}

/// The queries of one sequence within a batch, and where its keys and values lie.
#[derive(Clone, Copy, Debug)]
pub struct SequenceSpan<'a> {
    /// Row of the sequence's first query in the batch.
    pub first_query: usize,
    /// Number of its queries: its newest tokens, in order.
    pub queries: usize,
    /// Its tokens in the cache, the queries' own included. Query i stands at position
    /// `context − queries + i`.
    pub context: usize,
    /// Its blocks: position p lies in `blocks[p / 16]`.
    pub blocks: &'a [u32],
}

/// Buffers that [`attention`] works in, kept from call to call so that nothing is allocated once
/// the largest batch has been seen.
#[derive(Debug, Default)]
pub struct AttentionScratch {}

/// Causal attention of every span: `out` and `q` are `[n, heads, head_dim]`.
pub fn attention(
    cpu: &Cpu,
    out: &mut [f32],
    q: &[f32],
    kv: &KvPool,
    layer: usize,
    spans: &[SequenceSpan<'_>],
    spec: &AttentionSpec,
    scratch: &mut AttentionScratch,
) {
    let _ = (cpu, out, q, kv, layer, spans, spec, scratch);
    unimplemented!("follows within the hour")
}
