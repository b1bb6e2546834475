//! Steps 3–7 of attention, one row and one position at a time: the specification.

use super::task::{Chunk, Partial, Work};
use super::{TILE, tree};
use crate::BLOCK_TOKENS;
use crate::kv::Store;
use crate::math::{exp, tanh};

/// Attends to one chunk. `work.queries` holds scaled queries, `[rows, head_dim]`.
pub(super) fn attend<S: Store>(chunk: &Chunk<'_>, work: &mut Work<'_>, partial: &mut Partial<'_>) {
    let (d, value_row) = (chunk.spec.head_dim, partial.value_row);
    let s = &mut work.scores[..TILE];
    for tile in chunk.tiles() {
        // (3)
        let branches = tree::reaches(chunk, tile);
        let (keys, values) = work.tile.split_at_mut(TILE * d);
        if branches {
            tree::unpack::<S>(chunk, tile, (keys, values), work.nodes);
        } else {
            let used = tile.max(chunk.keys.start)..chunk.keys.end.min(tile + TILE);
            chunk.unpack::<S>(used, tile, keys, values);
        }
        for row in 0..chunk.rows.len() {
            let visible = chunk.visible(row, tile); // (5): no other position is looked at
            if visible.is_empty() {
                continue;
            }
            if branches && (row == 0 || chunk.query(row) != chunk.query(row - 1)) {
                tree::gather(chunk, chunk.query(row), tile, (keys, values), work.nodes);
            }
            let q = &work.queries[row * d..][..d];
            let mut m = partial.m[row];
            for j in visible.clone() {
                let k = &keys[j / BLOCK_TOKENS * d * BLOCK_TOKENS + j % BLOCK_TOKENS..];
                let mut dot = 0.0;
                for i in 0..d {
                    dot += q[i] * k[i * BLOCK_TOKENS];
                }
                s[j] = match chunk.spec.softcap {
                    Some(cap) => cap * tanh(dot / cap),
                    None => dot,
                }; // (4)
                m = m.max(s[j]);
            }
            let shift = if m == f32::NEG_INFINITY { 0.0 } else { m };
            let alpha = exp(partial.m[row] - shift); // (6)
            let (l, o) = (&mut partial.l[row], &mut partial.o[row * value_row..][..d]);
            *l *= alpha;
            for o in &mut *o {
                *o *= alpha;
            }
            for j in visible {
                let p = exp(s[j] - shift); // (6)
                *l += p;
                for (o, v) in o.iter_mut().zip(&values[j * value_row..]) {
                    *o += p * v; // (7)
                }
            }
            partial.m[row] = m;
        }
    }
}
