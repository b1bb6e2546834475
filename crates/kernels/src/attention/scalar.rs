//! Steps 3–7 of attention, one row and one position at a time: the specification.

use super::TILE;
use super::task::{Chunk, Partial, Work};
use crate::BLOCK_TOKENS;
use crate::kv::Element;
use crate::math::{exp, tanh};

/// Attends to one chunk. `work.queries` holds scaled queries, `[rows, head_dim]`.
pub(super) fn attend<E: Element>(
    chunk: &Chunk<'_, E>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    let (d, value_row) = (chunk.spec.head_dim, partial.value_row);
    let s = &mut work.scores[..TILE];
    for tile in chunk.tiles() {
        // (3)
        for row in 0..chunk.rows.len() {
            let visible = chunk.visible(row, tile); // (5): no other position is looked at
            if visible.is_empty() {
                continue;
            }
            let q = &work.queries[row * d..][..d];
            let mut m = partial.m[row];
            for j in visible.clone() {
                let (block, offset) = place(chunk.table, tile + j);
                let k = chunk.blocks.keys(block, chunk.kv_head); // [head_dim, 16]
                let mut dot = 0.0;
                for i in 0..d {
                    dot += q[i] * k[i * BLOCK_TOKENS + offset].to_f32();
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
                let (block, offset) = place(chunk.table, tile + j);
                let v = &chunk.blocks.values(block, chunk.kv_head)[offset * value_row..][..d];
                *l += p;
                for (o, v) in o.iter_mut().zip(v) {
                    *o += p * v.to_f32(); // (7)
                }
            }
            partial.m[row] = m;
        }
    }
}

/// The block and the offset within it of a position.
fn place(table: &[u32], position: usize) -> (u32, usize) {
    (table[position / BLOCK_TOKENS], position % BLOCK_TOKENS)
}
