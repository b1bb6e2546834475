//! Attention over a paged key–value cache.
//!
//! FlashAttention (arXiv 2205.14135), its second version's loop order (arXiv 2307.08691), its split of
//! long contexts for decoding (Flash-Decoding), and PagedAttention's block tables (arXiv 2309.06180).
//!
//! For the query q of a head at position i, over the keys kⱼ and values vⱼ that it sees:
//!
//! ```text
//! sⱼ = scale · q·kⱼ          (or cap · tanh(scale · q·kⱼ / cap))
//! o  = Σⱼ e^(sⱼ − m) vⱼ / Σⱼ e^(sⱼ − m)      m = maxⱼ sⱼ
//! ```
//!
//! No row of scores is ever whole in memory. Rows, that is (query, head) pairs that share a key–value
//! head, are taken up to 96 together, so that a key serves all heads of a group and many queries:
//!
//! 1. Scale the rows' queries, and rotate them where the cache is rotated.
//! 2. Cut the visible positions into chunks of 256 at multiples of 256. For each chunk start with
//!    m = −∞, l = 0, o = 0.
//! 3. Cut the chunk into tiles of 64 positions, four blocks of the cache. For each tile:
//! 4. s = q Kᵀ for the tile, soft-capped where the model asks for it.
//! 5. s = −∞ at positions the row does not see: later ones, those before its window.
//! 6. m′ = max(m, max s); p = e^(s − m′); α = e^(m − m′).
//! 7. l = α l + Σ p; o = α o + p V; m = m′.
//! 8. Merge the chunk into the whole: M′ = max(M, m), and (L, O) = e^(M − M′) (L, O) + e^(m − M′) (l, o).
//! 9. Output O / L, rotated back.
//!
//! Steps 3–7 are written twice: [`scalar`] is the specification, [`vector`] the same for every
//! instruction set with vectors. Packed keys and values are unpacked as they are read, which is exact
//! ([`load`]): the arithmetic is that of the same numbers in an f32 cache, bit for bit.
//!
//! Queries may form a tree ([`tree`]), whose branches stand at the same positions.
//!
//! A row's arithmetic depends on its own position and on nothing else: tiles and chunks lie at fixed
//! positions, and a tile a row does not see leaves its m, l and o as they were, bit for bit. So a
//! token's output is the same whether its prompt came in one piece or in many, alone, in a batch or on a
//! branch, on one thread or several, and whether chunks ran one after the other or apart.

mod backward;
mod lanes;
mod load;
mod scalar;
mod task;
mod tree;
mod vector;

pub use backward::{Attended, AttentionGradients, attention_backward};

use std::sync::atomic::{AtomicUsize, Ordering};

use bevel_base::AlignedVec;

use crate::kv::{LayerBlocks, with_store};
use crate::{BLOCK_TOKENS, Cpu, Isa, KvPool};
use load::Load;
use task::{Chunk, Item, Partial, Room, Shared};

/// Positions in a tile, the stretch between two corrections of o.
const TILE: usize = 4 * BLOCK_TOKENS;
/// Positions in a chunk.
const CHUNK: usize = 4 * TILE;
/// Most rows taken together.
const ROWS: usize = 96;
/// Up to this many rows, chunks run as tasks of their own: a decoding sequence has few rows and
/// would leave threads idle.
const SPLIT_ROWS: usize = 16;
/// Multiplications, or values to merge, below which a second thread costs more than it brings.
const SERIAL_WORK: usize = 1 << 18;

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
    /// A query at position p sees positions greater than p − window: itself and the window − 1 before
    /// it, as in Hugging Face's `sliding_window`.
    pub window: Option<usize>,
}

impl AttentionSpec {
    /// The first position that a query at `position` sees.
    fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// The queries of one sequence within a batch, and where its keys and values lie.
#[derive(Clone, Copy, Debug)]
pub struct SequenceSpan<'a> {
    /// Row of the sequence's first query in the batch.
    pub first_query: usize,
    /// Number of its queries: its newest tokens, in order.
    pub queries: usize,
    /// Its tokens in the cache, the queries' own included. Query i stands at position
    /// `context − queries + i`, or at `context − queries` + its depth in a tree.
    pub context: usize,
    /// Its blocks: token p lies in `blocks[p / 16]`. Blocks that lie wholly before every query's
    /// window are not looked at.
    pub blocks: &'a [u32],
    /// The tree that the queries form, as [`attention_tree`] makes it: for each query the set of queries that it
    /// sees, its ancestors and itself, as bits. Empty where each query follows the one before.
    pub tree: &'a [u64],
}

/// Most queries of a tree.
pub const TREE_QUERIES: usize = u64::BITS as usize;

/// The masks of a tree ([`SequenceSpan::tree`]) of which each node's parent is given, `None` for nodes that
/// follow the tokens before the tree. A node at depth d takes position `context − queries` + d.
///
/// # Panics
/// Where a parent is not before its child, or there are more than [`TREE_QUERIES`] nodes.
pub fn attention_tree(parents: &[Option<usize>]) -> Vec<u64> {
    assert!(parents.len() <= TREE_QUERIES, "{} nodes: a tree has {TREE_QUERIES}", parents.len());
    let mut masks = Vec::with_capacity(parents.len());
    for (node, parent) in parents.iter().enumerate() {
        let ancestors = match *parent {
            Some(parent) => *masks.get(parent).expect("a parent comes before its children"),
            None => 0,
        };
        masks.push(ancestors | 1 << node);
    }
    masks
}

/// The depth of node `query` of a tree, or of a chain where `tree` is empty: its position behind the tokens
/// before the tree.
#[inline(always)]
pub fn depth_in_tree(tree: &[u64], query: usize) -> usize {
    tree.get(query).map_or(query, |mask| mask.count_ones() as usize - 1)
}

/// Buffers that [`attention`] works in, kept from call to call so that nothing is allocated once
/// the largest batch has been seen.
#[derive(Debug)]
pub struct AttentionScratch {
    items: Vec<Item>,
    /// A [`Room`] for each thread.
    rooms: AlignedVec<f32>,
    /// The chunks of split items.
    partials: AlignedVec<f32>,
}

impl AttentionScratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self { items: Vec::new(), rooms: AlignedVec::zeroed(0), partials: AlignedVec::zeroed(0) }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.rooms.len() + self.partials.len()) * size_of::<f32>()
            + self.items.capacity() * size_of::<Item>()
    }
}

impl Default for AttentionScratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Causal attention of every span's queries over its cached keys and values.
///
/// `q` and `out` are `[n, heads, head_dim]`, spans in the order of their queries; keys and values of the queries' own tokens are already in
/// `kv`. Rows of `out` that no span covers are left alone.
///
/// Agrees with attention computed in f64 over the cached values, as [`KvPool::read`] gives them, within
/// 1e-5 of the largest value on every instruction set; on one instruction set the result depends neither
/// on the number of threads nor on how tokens are batched. A key or value that is infinite or NaN
/// reaches the queries that see it, and may reach others of the same call.
///
/// # Panics
/// Where lengths and shapes do not fit together, spans overlap the end of `q`, or a block lies outside
/// the pool.
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
    check(out, q, kv, layer, spans, spec);
    with_store!(kv.shape().kv_type, S => {
        run::<S>(cpu, out, q, kv.layer(layer), kv.shape().rotation(), spans, spec, scratch)
    });
}

fn check(
    out: &[f32],
    q: &[f32],
    kv: &KvPool,
    layer: usize,
    spans: &[SequenceSpan<'_>],
    spec: &AttentionSpec,
) {
    let shape = kv.shape();
    assert_eq!(
        (spec.kv_heads, spec.head_dim),
        (shape.kv_heads, shape.head_dim),
        "(kv_heads, head_dim) of the layer and of the cache"
    );
    assert!(
        spec.kv_heads > 0 && spec.heads.is_multiple_of(spec.kv_heads),
        "{} query heads cannot share {} key-value heads",
        spec.heads,
        spec.kv_heads
    );
    assert!(layer < shape.layers, "layer {layer} of {}", shape.layers);
    assert_eq!(out.len(), q.len(), "lengths of out and q");
    let row = spec.heads * spec.head_dim;
    let mut free = 0;
    for span in spans {
        assert!(span.queries <= span.context, "more queries than tokens: {span:?}");
        assert!(span.first_query >= free, "queries shared with the span before: {span:?}");
        free = span.first_query + span.queries;
        assert!(free * row <= q.len(), "queries past the end: {span:?}");
        assert!(span.blocks.len() * BLOCK_TOKENS >= span.context, "too few blocks: {span:?}");
        let first = spec.first_visible(span.context - span.queries) / BLOCK_TOKENS;
        let used = &span.blocks[first..span.context.div_ceil(BLOCK_TOKENS)];
        let inside = used.iter().all(|&block| (block as usize) < kv.blocks());
        assert!(inside, "a block outside the pool of {}: {span:?}", kv.blocks());
        tree::check(span);
    }
}

fn run<S: Load>(
    cpu: &Cpu,
    out: &mut [f32],
    q: &[f32],
    blocks: LayerBlocks<'_>,
    rotation: usize,
    spans: &[SequenceSpan<'_>],
    spec: &AttentionSpec,
    scratch: &mut AttentionScratch,
) {
    let (isa, kv_heads) = (cpu.isa(), spec.kv_heads);
    let value_row = spec.head_dim.next_multiple_of(BLOCK_TOKENS);
    let plan = task::plan(&mut scratch.items, spans, spec, value_row);
    grow(&mut scratch.rooms, cpu.pool().threads() * Room::len(spec.head_dim, value_row));
    grow(&mut scratch.partials, plan.partials);
    let items = &scratch.items[..];
    let (out, partials) = (Shared::new(out), Shared::new(&mut scratch.partials));
    let rooms = &mut scratch.rooms;

    in_rooms(cpu, rooms, spec, plan.tasks, plan.work >= SERIAL_WORK, |room, i| {
        // Late queries see the most keys: the longest tasks go first.
        let i = plan.tasks - 1 - i;
        let item = &items[items.partition_point(|item| item.first_task <= i) - 1];
        let (part, kv_head) = ((i - item.first_task) / kv_heads, (i - item.first_task) % kv_heads);
        let (span, rows) = (&spans[item.span], item.rows.len());
        let pack = (isa, rotation, micro_rows(isa));
        task::pack_queries(&mut room.work, q, span, item, kv_head, spec, pack); // (1)
        let chunk = |index| Chunk::new(blocks, span, item, kv_head, spec, index); // (2)
        if item.split {
            // SAFETY: records do not overlap, and each belongs to one task.
            let record = unsafe { partials.get(item.record(part, kv_head, kv_heads, value_row)) };
            let mut partial = Partial::new(record, rows, value_row);
            attend::<S>(isa, &chunk(item.chunks.start + part), &mut room.work, &mut partial);
            return;
        }
        let mut whole = Partial::new(room.whole, rows, value_row);
        let mut partial = Partial::new(room.partial, rows, value_row);
        whole.clear();
        for index in item.chunks.clone() {
            attend::<S>(isa, &chunk(index), &mut room.work, &mut partial);
            whole.merge(isa, &partial); // (8)
        }
        whole.write(&out, span, item, kv_head, spec, (isa, rotation)); // (9)
    });

    let merges = if plan.partials == 0 { 0 } else { items.len() * kv_heads };
    in_rooms(cpu, rooms, spec, merges, plan.partials >= SERIAL_WORK, |room, i| {
        let (item, kv_head) = (&items[i / kv_heads], i % kv_heads);
        if !item.split {
            return;
        }
        let rows = item.rows.len();
        let mut whole = Partial::new(room.whole, rows, value_row);
        whole.clear();
        for part in 0..item.chunks.len() {
            // SAFETY: all writers are done, and only this task reads the records of its item and head.
            let record = unsafe { partials.get(item.record(part, kv_head, kv_heads, value_row)) };
            whole.merge(isa, &Partial::new(record, rows, value_row)); // (8)
        }
        whole.write(&out, &spans[item.span], item, kv_head, spec, (isa, rotation)); // (9)
    });
}

/// Runs `body` for each task, on one thread or on all, each with a room of its own.
fn in_rooms(
    cpu: &Cpu,
    rooms: &mut [f32],
    spec: &AttentionSpec,
    tasks: usize,
    parallel: bool,
    body: impl Fn(&mut Room<'_>, usize) + Sync,
) {
    let value_row = spec.head_dim.next_multiple_of(BLOCK_TOKENS);
    let len = Room::len(spec.head_dim, value_row);
    let workers = if parallel { cpu.pool().threads().min(tasks) } else { 1 };
    let next = AtomicUsize::new(0);
    cpu.pool().run_chunks(&mut rooms[..workers * len], len, |_, room| {
        let mut room = Room::new(room, spec.head_dim, value_row);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            body(&mut room, i);
        }
    });
}

/// Steps 3–7 for one chunk.
fn attend<S: Load>(
    isa: Isa,
    chunk: &Chunk<'_>,
    work: &mut task::Work<'_>,
    partial: &mut Partial<'_>,
) {
    partial.clear();
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` carries an instruction set only where the processor has it.
        Isa::Avx2 | Isa::AvxVnni => unsafe { vector::attend_avx2::<S>(chunk, work, partial) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
            vector::attend_avx512::<S>(chunk, work, partial)
        },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => vector::attend_neon::<S>(chunk, work, partial),
        _ => scalar::attend::<S>(chunk, work, partial),
    }
}

/// Rows that the tile kernel of `isa` holds in registers.
const fn micro_rows(isa: Isa) -> usize {
    match isa {
        Isa::Scalar => 1,
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => 4,
        Isa::Avx2 | Isa::AvxVnni => 6,
        Isa::Avx512 | Isa::Avx512Bf16 => 8,
    }
}

fn grow(buffer: &mut AlignedVec<f32>, len: usize) {
    if buffer.len() < len {
        *buffer = AlignedVec::zeroed(len);
    }
}
