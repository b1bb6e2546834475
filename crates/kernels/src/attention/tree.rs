//! Queries that form a tree: candidates of speculative decoding, each of which sees its ancestors and none of
//! its siblings (SpecInfer, arXiv 2305.09781).
//!
//! A node at depth d stands at position base + d, where decoding its path token by token would put it, while its
//! key lies in the cache behind those of all nodes before it:
//!
//! ```text
//! cache       … prefix | 0  1  2  3  4     tree     0 ┬ 1 ─ 3
//! position               b +1 +1 +2 +2                └ 2 ─ 4
//!
//! node 4 sees … prefix | 0  2  4           at positions b, b + 1, b + 2
//! ```
//!
//! Tiles before the tree are those of any span. In a tile that reaches into it every node has a copy of its own,
//! to which the keys and values of its path are gathered. So its arithmetic is that of its path alone, bit for
//! bit, and greedy decoding with a tree gives the text that decoding without one gives; masks over tiles in the
//! cache's order would see the same tokens and add in another order. A copy takes as long as a few products.

use super::task::Chunk;
use super::{SequenceSpan, TILE, TREE_QUERIES};
use crate::BLOCK_TOKENS;
use crate::kv::Store;

/// Tokens in the blocks that a tree's nodes lie in, at most.
pub(super) const TOKENS: usize = TREE_QUERIES + BLOCK_TOKENS;

/// # Panics
/// Where a span's masks are not those of a tree of its queries.
pub(super) fn check(span: &SequenceSpan<'_>) {
    let tree = span.tree;
    if tree.is_empty() {
        return;
    }
    assert_eq!(tree.len(), span.queries, "a mask for each query: {span:?}");
    assert!(tree.len() <= TREE_QUERIES, "more than {TREE_QUERIES} nodes: {span:?}");
    for (node, &mask) in tree.iter().enumerate() {
        let before = mask ^ 1 << node;
        let parent = before.checked_ilog2().map(|parent| parent as usize);
        let of_parent = parent.map_or(0, |parent| if parent < node { tree[parent] } else { 0 });
        assert_eq!(before, of_parent, "node {node} sees itself and what its parent sees: {span:?}");
    }
}

/// The least and the greatest depth of some nodes.
pub(super) fn depths(nodes: &[u64]) -> (usize, usize) {
    let depth = |mask: &u64| mask.count_ones() as usize - 1;
    let most = nodes.iter().map(depth).max();
    (nodes.iter().map(depth).min().unwrap_or(0), most.unwrap_or(0))
}

/// True where nodes see different tokens in the tile that starts at position `tile`.
#[inline(always)]
pub(super) fn reaches(chunk: &Chunk<'_>, tile: usize) -> bool {
    !chunk.tree.is_empty() && tile + TILE > chunk.base
}

/// Unpacks what all nodes share of a tile, and the nodes' own keys and values for [`gather`].
pub(super) fn unpack<S: Store>(
    chunk: &Chunk<'_>,
    tile: usize,
    (keys, values): (&mut [f32], &mut [f32]),
    nodes: &mut [f32],
) {
    let shared = tile.max(chunk.keys.start)..chunk.base;
    if !shared.is_empty() {
        chunk.unpack::<S>(shared, tile, keys, values);
    }
    let (keys, values) = nodes.split_at_mut(TOKENS * chunk.spec.head_dim);
    let first = chunk.base / BLOCK_TOKENS * BLOCK_TOKENS;
    chunk.unpack::<S>(chunk.base..chunk.context, first, keys, values);
}

/// Brings the keys and values of a node's path to their positions in the tile.
pub(super) fn gather(
    chunk: &Chunk<'_>,
    node: usize,
    tile: usize,
    (keys, values): (&mut [f32], &mut [f32]),
    nodes: &[f32],
) {
    let d = chunk.spec.head_dim;
    let value_row = d.next_multiple_of(BLOCK_TOKENS);
    let (own_keys, own_values) = nodes.split_at(TOKENS * d);
    let first = chunk.base / BLOCK_TOKENS * BLOCK_TOKENS;
    let mut path = chunk.tree[node];
    for position in chunk.base.. {
        if path == 0 || position >= tile + TILE {
            return;
        }
        let ancestor = path.trailing_zeros() as usize;
        path &= path - 1;
        if position < tile {
            continue;
        }
        let (from, to) = (chunk.base + ancestor - first, position - tile);
        let own = &own_keys[from / BLOCK_TOKENS * d * BLOCK_TOKENS + from % BLOCK_TOKENS..];
        let keys = &mut keys[to / BLOCK_TOKENS * d * BLOCK_TOKENS + to % BLOCK_TOKENS..];
        for (key, own) in
            keys.iter_mut().step_by(BLOCK_TOKENS).zip(own.iter().step_by(BLOCK_TOKENS)).take(d)
        {
            *key = *own;
        }
        values[to * value_row..][..value_row]
            .copy_from_slice(&own_values[from * value_row..][..value_row]);
    }
}
