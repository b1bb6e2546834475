//! How a call's rows and positions are cut into tasks, and what a task works on.

use std::ops::Range;

use super::{AttentionSpec, CHUNK, ROWS, SPLIT_ROWS, SequenceSpan, TILE, depth_in_tree, tree};
use crate::dispatch::for_each_isa;
use crate::hadamard::hadamard;
use crate::kv::{LayerBlocks, Store};
use crate::math::exp;
use crate::{BLOCK_TOKENS, Isa};

/// Rows of one span that run together, for every key–value head.
///
/// Row r of a span is its query r / group with query head r % group of the key–value head's group.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) span: usize,
    pub(super) rows: Range<usize>,
    /// Chunks with a position that some row sees.
    pub(super) chunks: Range<usize>,
    /// True where each chunk is a task, whose result is merged afterwards.
    pub(super) split: bool,
    pub(super) first_task: usize,
    /// Where the item's records start in the partial results.
    first_record: usize,
}

impl Item {
    /// The place of a chunk's partial result.
    pub(super) fn record(
        &self,
        part: usize,
        kv_head: usize,
        kv_heads: usize,
        value_row: usize,
    ) -> Range<usize> {
        let len = Partial::len(self.rows.len(), value_row);
        let start = self.first_record + (part * kv_heads + kv_head) * len;
        start..start + len
    }
}

/// The size of a call.
pub(super) struct Plan {
    pub(super) tasks: usize,
    /// Values of all partial results.
    pub(super) partials: usize,
    /// Multiplications, roughly.
    pub(super) work: usize,
}

/// Cuts the spans into items.
pub(super) fn plan(
    items: &mut Vec<Item>,
    spans: &[SequenceSpan<'_>],
    spec: &AttentionSpec,
    value_row: usize,
) -> Plan {
    items.clear();
    let group = spec.heads / spec.kv_heads;
    let mut plan = Plan { tasks: 0, partials: 0, work: 0 };
    for (index, span) in spans.iter().enumerate() {
        let all = span.queries * group;
        for start in (0..all).step_by(ROWS) {
            let rows = start..all.min(start + ROWS);
            let keys = spec.visible_to(span, &rows);
            let chunks = keys.start / CHUNK..keys.end.div_ceil(CHUNK);
            let split = rows.len() <= SPLIT_ROWS && chunks.len() > 1;
            plan.work += rows.len() * keys.len() * spec.head_dim * 2 * spec.kv_heads;
            let (first_task, first_record) = (plan.tasks, plan.partials);
            if split {
                let records = chunks.len() * spec.kv_heads;
                plan.tasks += records;
                plan.partials += records * Partial::len(rows.len(), value_row);
            } else {
                plan.tasks += spec.kv_heads;
            }
            items.push(Item { span: index, rows, chunks, split, first_task, first_record });
        }
    }
    plan
}

/// Step 1: the item's scaled queries, rotated as the keys are, as micro tiles of `micro` rows,
/// `[rows / micro, head_dim, micro]`; the last micro tile has the rows that remain.
pub(super) fn pack_queries(
    work: &mut Work<'_>,
    q: &[f32],
    span: &SequenceSpan<'_>,
    item: &Item,
    kv_head: usize,
    spec: &AttentionSpec,
    (isa, rotation, micro): (Isa, usize, usize),
) {
    let d = spec.head_dim;
    for (i, row) in item.rows.clone().enumerate() {
        let mut query = &q[spec.row_start(span, kv_head, row)..][..d];
        if rotation > 1 {
            let rotated = &mut work.few[..d];
            rotated.copy_from_slice(query);
            hadamard(isa, rotated, rotation);
            query = rotated;
        }
        let tile = i / micro * micro;
        let width = micro.min(item.rows.len() - tile);
        let places = work.queries[tile * d..].iter_mut().skip(i - tile).step_by(width);
        for (place, &q) in places.zip(query) {
            *place = q * spec.scale;
        }
    }
}

impl AttentionSpec {
    /// Where a span's row lies in `q` and `out`.
    fn row_start(&self, span: &SequenceSpan<'_>, kv_head: usize, row: usize) -> usize {
        let group = self.heads / self.kv_heads;
        let (query, head) = (span.first_query + row / group, kv_head * group + row % group);
        (query * self.heads + head) * self.head_dim
    }

    /// Positions that some of a span's rows see.
    fn visible_to(&self, span: &SequenceSpan<'_>, rows: &Range<usize>) -> Range<usize> {
        let (base, group) = (span.context - span.queries, self.heads / self.kv_heads);
        let (first, last) = (rows.start / group, (rows.end - 1) / group);
        let (low, high) = match span.tree.get(first..=last) {
            Some(nodes) => tree::depths(nodes),
            None => (first, last),
        };
        self.first_visible(base + low)..base + high + 1
    }
}

/// Some rows against one chunk of one head's keys and values.
pub(super) struct Chunk<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) blocks: LayerBlocks<'a>,
    /// The sequence's block table.
    pub(super) table: &'a [u32],
    pub(super) kv_head: usize,
    /// The rows, within their span.
    pub(super) rows: Range<usize>,
    /// The chunk's positions that some row sees.
    pub(super) keys: Range<usize>,
    /// Tokens of the sequence before the span's first query, which is the position of that.
    pub(super) base: usize,
    /// Tokens in the cache.
    pub(super) context: usize,
    pub(super) tree: &'a [u64],
}

impl<'a> Chunk<'a> {
    /// Step 2: chunk `index` of an item.
    pub(super) fn new(
        blocks: LayerBlocks<'a>,
        span: &SequenceSpan<'a>,
        item: &Item,
        kv_head: usize,
        spec: &'a AttentionSpec,
        index: usize,
    ) -> Self {
        let keys = spec.visible_to(span, &item.rows);
        Self {
            spec,
            blocks,
            table: span.blocks,
            kv_head,
            rows: item.rows.clone(),
            keys: keys.start.max(index * CHUNK)..keys.end.min((index + 1) * CHUNK),
            base: span.context - span.queries,
            context: span.context,
            tree: span.tree,
        }
    }

    /// The query of row `row`, counted from the item's first.
    #[inline(always)]
    pub(super) fn query(&self, row: usize) -> usize {
        (self.rows.start + row) / (self.spec.heads / self.spec.kv_heads)
    }

    /// What row `row`, counted from the item's first, sees of the tile that starts at position `tile`,
    /// counted from there.
    #[inline(always)]
    pub(super) fn visible(&self, row: usize, tile: usize) -> Range<usize> {
        let position = self.base + depth_in_tree(self.tree, self.query(row));
        let first = self.spec.first_visible(position).clamp(tile, tile + TILE);
        let end = (position + 1).clamp(first, tile + TILE);
        first - tile..end - tile
    }

    /// Unpacks the blocks of tokens `used`, as f32, to where they lie counted from token `first`, the first of a
    /// block: `[blocks, head_dim, 16]` and `[tokens, value_row]`.
    pub(super) fn unpack<S: Store>(
        &self,
        used: Range<usize>,
        first: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let d = self.spec.head_dim;
        let value_row = d.next_multiple_of(BLOCK_TOKENS);
        for block in used.start / BLOCK_TOKENS..used.end.div_ceil(BLOCK_TOKENS) {
            let at = (block - first / BLOCK_TOKENS) * BLOCK_TOKENS;
            let (k, v) = (&mut keys[at * d..], &mut values[at * value_row..]);
            let (table, head) = (self.table[block], self.kv_head);
            S::keys(self.blocks.keys(table, head), &mut k[..d * BLOCK_TOKENS]);
            S::values(self.blocks.values(table, head), &mut v[..value_row * BLOCK_TOKENS]);
        }
    }

    /// Where tiles with a visible position start.
    #[inline(always)]
    pub(super) fn tiles(&self) -> std::iter::StepBy<Range<usize>> {
        (self.keys.start / TILE * TILE..self.keys.end).step_by(TILE)
    }
}

/// A softmax in progress for some rows: what steps 2–8 call m, l and o.
pub(super) struct Partial<'a> {
    /// Highest score so far, `[rows]`.
    pub(super) m: &'a mut [f32],
    /// Sum of e^(s − m), `[rows]`.
    pub(super) l: &'a mut [f32],
    /// Sum of e^(s − m) v, `[rows, value_row]`.
    pub(super) o: &'a mut [f32],
    pub(super) value_row: usize,
}

impl<'a> Partial<'a> {
    /// Values of a record: m and l padded to whole cache lines, then o.
    pub(super) fn len(rows: usize, value_row: usize) -> usize {
        2 * rows.next_multiple_of(16) + rows * value_row
    }

    pub(super) fn new(record: &'a mut [f32], rows: usize, value_row: usize) -> Self {
        let (m, rest) = record.split_at_mut(rows.next_multiple_of(16));
        let (l, o) = rest.split_at_mut(rows.next_multiple_of(16));
        Self { m: &mut m[..rows], l: &mut l[..rows], o: &mut o[..rows * value_row], value_row }
    }

    /// Nothing seen yet.
    pub(super) fn clear(&mut self) {
        self.m.fill(f32::NEG_INFINITY);
        self.l.fill(0.0);
        self.o.fill(0.0);
    }

    /// Step 8: adds what `other` saw.
    pub(super) fn merge(&mut self, isa: Isa, other: &Partial<'_>) {
        for i in 0..self.m.len() {
            let m = self.m[i].max(other.m[i]);
            // Scores that are no numbers have no maximum, but a sum: that must not be lost.
            if m == f32::NEG_INFINITY && other.l[i] == 0.0 {
                continue;
            }
            let (a, b) = (exp(self.m[i] - m), exp(other.m[i] - m));
            self.m[i] = m;
            self.l[i] = a * self.l[i] + b * other.l[i];
            let row = i * self.value_row..(i + 1) * self.value_row;
            merge_row(isa, &mut self.o[row.clone()], &other.o[row], a, b);
        }
    }

    /// Step 9: writes O / L to the rows' places in the output, rotated back where the values are
    /// rotated; zeros for a row that saw nothing.
    pub(super) fn write(
        &self,
        out: &Shared,
        span: &SequenceSpan<'_>,
        item: &Item,
        kv_head: usize,
        spec: &AttentionSpec,
        (isa, rotation): (Isa, usize),
    ) {
        for (i, row) in item.rows.clone().enumerate() {
            let start = spec.row_start(span, kv_head, row);
            // SAFETY: spans do not overlap, so a (query, head) pair belongs to one item and head.
            let out = unsafe { out.get(start..start + spec.head_dim) };
            let inverse = if self.l[i] == 0.0 { 0.0 } else { 1.0 / self.l[i] };
            for (out, &o) in out.iter_mut().zip(&self.o[i * self.value_row..]) {
                *out = o * inverse;
            }
            if rotation > 1 {
                hadamard(isa, out, rotation);
            }
        }
    }
}

for_each_isa! {
    fn merge_row(o: &mut [f32], other: &[f32], a: f32, b: f32) {
        for (o, &other) in o.iter_mut().zip(other) {
            *o = a * *o + b * other;
        }
    }
}

/// One thread's buffers.
pub(super) struct Room<'a> {
    pub(super) work: Work<'a>,
    /// Records for [`ROWS`] rows: a chunk, and the whole.
    pub(super) partial: &'a mut [f32],
    pub(super) whole: &'a mut [f32],
}

/// What steps 1–7 need besides the result.
pub(super) struct Work<'a> {
    /// Packed queries of [`ROWS`] rows.
    pub(super) queries: &'a mut [f32],
    /// Scores of a micro tile's rows, `[8, TILE]`.
    pub(super) scores: &'a mut [f32],
    /// A tile's keys and values as f32: `[4, head_dim, 16]` and `[TILE, value_row]`.
    pub(super) tile: &'a mut [f32],
    /// A tree's own tokens, see [`tree`].
    pub(super) nodes: &'a mut [f32],
    /// Queries of a few rows, `[head_dim, 8]`.
    pub(super) few: &'a mut [f32],
}

/// Most rows of a micro tile.
const MICRO_ROWS: usize = 8;

impl<'a> Room<'a> {
    /// Values of a room, in whole cache lines.
    pub(super) fn len(head_dim: usize, value_row: usize) -> usize {
        ROWS * head_dim
            + MICRO_ROWS * TILE
            + (TILE + tree::TOKENS) * (head_dim + value_row)
            + MICRO_ROWS * value_row
            + 2 * Partial::len(ROWS, value_row)
    }

    pub(super) fn new(values: &'a mut [f32], head_dim: usize, value_row: usize) -> Self {
        let (queries, rest) = values.split_at_mut(ROWS * head_dim);
        let (scores, rest) = rest.split_at_mut(MICRO_ROWS * TILE);
        let (tile, rest) = rest.split_at_mut(TILE * (head_dim + value_row));
        let (nodes, rest) = rest.split_at_mut(tree::TOKENS * (head_dim + value_row));
        let (few, rest) = rest.split_at_mut(MICRO_ROWS * value_row);
        let (partial, whole) = rest.split_at_mut(Partial::len(ROWS, value_row));
        Self { work: Work { queries, scores, tile, nodes, few }, partial, whole }
    }
}

// All parts of a room start on cache lines.
const _: () = assert!(ROWS.is_multiple_of(16) && TILE.is_multiple_of(16));

/// A buffer of which tasks write separate parts.
pub(super) struct Shared {
    start: *mut f32,
    len: usize,
}

impl Shared {
    pub(super) fn new(values: &mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len() }
    }

    /// A part of the buffer.
    ///
    /// # Safety
    /// The buffer is still borrowed by the caller of `new`, and no other task uses this part.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn get(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "a part outside the buffer");
        // SAFETY: inside the buffer, and not used elsewhere by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

// SAFETY: parts that tasks get do not overlap (contract of `get`).
unsafe impl Sync for Shared {}
