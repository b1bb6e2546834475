//! Steps 3–7 of attention in vector registers.
//!
//! A micro tile is up to 8 rows (6 for AVX2, 4 for NEON). Both products are register-blocked: `scores` holds
//! [rows, 16–64 positions] while it walks over `head_dim`, `accumulate` holds [rows, a few vectors of
//! o] while it walks over the tile's positions. Each sum is one chain of fused multiply-adds in the
//! order of `head_dim` or of positions, whatever the number of rows: batching changes no bit.

use super::lanes::Lanes;
#[cfg(target_arch = "aarch64")]
use super::lanes::Neon;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::load::Load;
use super::task::{Chunk, Partial, Work};
use super::{TILE, tree};
use crate::BLOCK_TOKENS;
use crate::kv::Plain;
use crate::math::{LANES, exp_fused, max, max_lanes, sum_lanes, tanh};

/// Blocks in a tile.
const BLOCKS: usize = TILE / BLOCK_TOKENS;

/// Attends to one chunk. `work.queries` holds scaled queries in micro tiles of six rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend_avx2<S: Load>(
    chunk: &Chunk<'_>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    // SAFETY: compiled for AVX2.
    unsafe { attend::<Avx2, S>(chunk, work, partial) }
}

/// Attends to one chunk. `work.queries` holds scaled queries in micro tiles of eight rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn attend_avx512<S: Load>(
    chunk: &Chunk<'_>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    // SAFETY: compiled for AVX-512.
    unsafe { attend::<Avx512, S>(chunk, work, partial) }
}

/// [`rows`] over tiles in f32, compiled once for all layouts that are converted to it.
trait PlainRows: Lanes {
    /// # Safety
    /// That of [`rows`].
    unsafe fn plain_rows(
        chunk: &Chunk<'_>,
        tile: usize,
        keys: [*const u8; BLOCKS],
        values: [*const u8; BLOCKS],
        queries: Queries<'_>,
        scores: &mut [f32],
        partial: &mut Partial<'_>,
    );
}

/// Queries of some rows.
#[derive(Clone, Copy)]
struct Queries<'a> {
    /// The first row.
    row: usize,
    rows: usize,
    /// Scaled, in micro tiles: `[rows / L::ROWS, head_dim, L::ROWS]`, the last one with what remains.
    values: &'a [f32],
}

macro_rules! plain_rows {
    ($($lanes:ty: $features:literal),*) => {$(
        impl PlainRows for $lanes {
            #[target_feature(enable = $features)]
            unsafe fn plain_rows(
                chunk: &Chunk<'_>,
                tile: usize,
                keys: [*const u8; BLOCKS],
                values: [*const u8; BLOCKS],
                queries: Queries<'_>,
                scores: &mut [f32],
                partial: &mut Partial<'_>,
            ) {
                // SAFETY: this function's contract.
                unsafe {
                    rows::<$lanes, Plain<f32>>(chunk, tile, keys, values, queries, scores, partial)
                }
            }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
plain_rows! {
    Avx2: "avx2,fma,f16c",
    Avx512: "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
}
#[cfg(target_arch = "aarch64")]
plain_rows! { Neon: "neon" }

/// Attends to one chunk. `work.queries` holds scaled queries in micro tiles of four rows.
#[cfg(target_arch = "aarch64")]
pub(super) fn attend_neon<S: Load>(
    chunk: &Chunk<'_>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    // SAFETY: every AArch64 processor has NEON.
    unsafe { attend::<Neon, S>(chunk, work, partial) }
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn attend<L: PlainRows, S: Load>(
    chunk: &Chunk<'_>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    let (d, value_row) = (chunk.spec.head_dim, partial.value_row);
    for tile in chunk.tiles() {
        if tree::reaches(chunk, tile) {
            // SAFETY: this function's contract.
            unsafe { branches::<L, S>(chunk, tile, work, partial) };
            continue;
        }
        // (3) Block pointers; places outside the chunk's positions repeat a block inside.
        let (first, last) = (chunk.keys.start / BLOCK_TOKENS, (chunk.keys.end - 1) / BLOCK_TOKENS);
        let mut keys = [std::ptr::null(); BLOCKS];
        let mut values = [std::ptr::null(); BLOCKS];
        for i in 0..BLOCKS {
            let block = chunk.table[(tile / BLOCK_TOKENS + i).clamp(first, last)];
            keys[i] = chunk.blocks.keys(block, chunk.kv_head).as_ptr();
            values[i] = chunk.blocks.values(block, chunk.kv_head).as_ptr();
        }
        let queries = Queries { row: 0, rows: chunk.rows.len(), values: work.queries };
        if S::PLAIN {
            // SAFETY: this function's contract; pointers are to whole tiles.
            unsafe { L::plain_rows(chunk, tile, keys, values, queries, work.scores, partial) };
        } else if chunk.rows.len() > S::DIRECT * L::ROWS {
            let (wide_keys, wide_values) = work.tile.split_at_mut(TILE * d);
            let (mut wide_keys, mut wide_values) = (
                wide_keys.chunks_exact_mut(d * BLOCK_TOKENS),
                wide_values.chunks_exact_mut(value_row * BLOCK_TOKENS),
            );
            for i in 0..BLOCKS {
                let (k, v) = (wide_keys.next(), wide_values.next());
                let (k, v) = (k.expect("four blocks"), v.expect("four blocks"));
                // SAFETY: this function's contract; pointers are to whole tiles of these sizes.
                unsafe { convert::<L, S>(k, v, keys[i], values[i], value_row) };
                (keys[i], values[i]) = (k.as_ptr().cast(), v.as_ptr().cast());
            }
            // SAFETY: as above.
            unsafe { L::plain_rows(chunk, tile, keys, values, queries, work.scores, partial) };
        } else {
            // SAFETY: as above.
            unsafe { rows::<L, S>(chunk, tile, keys, values, queries, work.scores, partial) };
        }
    }
}

/// All rows against a tile that reaches into a tree: the rows of a node against its path.
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn branches<L: PlainRows, S: Load>(
    chunk: &Chunk<'_>,
    tile: usize,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    let (d, value_row, total) = (chunk.spec.head_dim, partial.value_row, chunk.rows.len());
    let (keys, values) = work.tile.split_at_mut(TILE * d);
    tree::unpack::<S>(chunk, tile, (keys, values), work.nodes);
    let mut row = 0;
    while row < total {
        let node = chunk.query(row);
        tree::gather(chunk, node, tile, (keys, values), work.nodes);
        let end = (row..total).find(|&row| chunk.query(row) != node).unwrap_or(total);
        while row < end {
            let rows = (end - row).min(L::ROWS);
            for r in 0..rows {
                let first = (row + r) / L::ROWS * L::ROWS;
                let width = L::ROWS.min(total - first);
                let packed = work.queries[first * d..].iter().skip(row + r - first).step_by(width);
                for (q, packed) in work.few.iter_mut().skip(r).step_by(rows).zip(packed).take(d) {
                    *q = *packed;
                }
            }
            let queries = Queries { row, rows, values: work.few };
            let mut blocks = [[std::ptr::null(); BLOCKS]; 2];
            for i in 0..BLOCKS {
                blocks[0][i] = keys[i * d * BLOCK_TOKENS..].as_ptr().cast();
                blocks[1][i] = values[i * value_row * BLOCK_TOKENS..].as_ptr().cast();
            }
            let [keys, values] = blocks;
            // SAFETY: this function's contract; pointers are to whole tiles.
            unsafe { L::plain_rows(chunk, tile, keys, values, queries, work.scores, partial) };
            row += rows;
        }
    }
}

/// Converts a block's keys and values to f32: `[head_dim, 16]` and `[16, value_row]`.
///
/// # Safety
/// That of [`Lanes`]; `keys` and `values` point to whole tiles.
#[inline(always)]
unsafe fn convert<L: Lanes, S: Load>(
    to_keys: &mut [f32],
    to_values: &mut [f32],
    keys: *const u8,
    values: *const u8,
    value_row: usize,
) {
    // SAFETY: this function's contract.
    unsafe {
        let d = to_keys.len() / BLOCK_TOKENS;
        let to_keys = to_keys.as_mut_ptr();
        for start in (0..d).step_by(S::GROUP) {
            for token in (0..BLOCK_TOKENS).step_by(L::COUNT) {
                let scales = S::key_scales::<L>(keys, start / S::GROUP, token);
                for i in start..d.min(start.saturating_add(S::GROUP)) {
                    let k = S::key::<L>(keys, i, token, scales);
                    L::store(to_keys.add(i * BLOCK_TOKENS + token), k);
                }
            }
        }
        let to_values = to_values.as_mut_ptr();
        let mut scales = [0.0; BLOCK_TOKENS];
        for column in (0..value_row).step_by(L::COUNT) {
            S::value_scales::<L>(values, column, &mut scales);
            for (token, &scale) in scales.iter().enumerate() {
                let v = S::value::<L>(values, token, column, value_row, scale);
                L::store(to_values.add(token * value_row + column), v);
            }
        }
    }
}

/// Some rows against one tile, a micro tile at a time.
///
/// # Safety
/// That of [`Lanes`]; `keys` and `values` point to whole tiles.
#[inline(always)]
unsafe fn rows<L: Lanes, S: Load>(
    chunk: &Chunk<'_>,
    tile: usize,
    keys: [*const u8; BLOCKS],
    values: [*const u8; BLOCKS],
    queries: Queries<'_>,
    scores: &mut [f32],
    partial: &mut Partial<'_>,
) {
    let d = chunk.spec.head_dim;
    for first in (0..queries.rows).step_by(L::ROWS) {
        let (row, q) = (queries.row + first, &queries.values[first * d..]);
        macro_rules! micro_tile {
            ($rows:literal) => {
                // SAFETY: this function's contract.
                unsafe {
                    micro_tile::<L, S, $rows>(chunk, tile, row, &keys, &values, q, scores, partial)
                }
            };
        }
        match (queries.rows - first).min(L::ROWS) {
            1 => micro_tile!(1),
            2 => micro_tile!(2),
            3 => micro_tile!(3),
            4 => micro_tile!(4),
            5 => micro_tile!(5),
            6 => micro_tile!(6),
            7 => micro_tile!(7),
            _ => micro_tile!(8),
        }
    }
}

/// Steps 4–7 for `R` rows, the first of which is `row`.
///
/// # Safety
/// That of [`rows`].
#[inline(always)]
unsafe fn micro_tile<L: Lanes, S: Load, const R: usize>(
    chunk: &Chunk<'_>,
    tile: usize,
    row: usize,
    keys: &[*const u8; BLOCKS],
    values: &[*const u8; BLOCKS],
    queries: &[f32],
    scores: &mut [f32],
    partial: &mut Partial<'_>,
) {
    if R > L::ROWS {
        return; // never: `rows` takes no more; this spares the compiler the code
    }
    let (d, value_row) = (chunk.spec.head_dim, partial.value_row);
    let mut visible = [const { 0..0 }; R];
    let (mut first, mut end) = (TILE, 0);
    for r in 0..R {
        visible[r] = chunk.visible(row + r, tile);
        if !visible[r].is_empty() {
            (first, end) = (first.min(visible[r].start), end.max(visible[r].end));
        }
    }
    if first >= end {
        return;
    }
    let queries = &queries[..R * d]; // [head_dim, R]
    let s = &mut scores.as_chunks_mut::<TILE>().0[..R];
    // SAFETY: `s` is [R, TILE]; the rest is this function's contract.
    unsafe { tile_scores::<L, S, R>(s, queries, keys, d, first, end) }; // (4)
    for r in 0..R {
        let visible = &visible[r];
        if let Some(cap) = chunk.spec.softcap {
            let inverse = 1.0 / cap;
            for s in &mut s[r] {
                *s = cap * tanh(*s * inverse);
            }
        }
        if visible.len() < TILE {
            for j in 0..TILE {
                let seen = visible.start <= j && j < visible.end; // (5)
                s[r][j] = if seen { s[r][j] } else { f32::NEG_INFINITY };
            }
        }
    }
    let (m, l) = (&mut partial.m[row..][..R], &mut partial.l[row..][..R]);
    // SAFETY: this function's contract.
    let alpha = unsafe { online_softmax::<L, R>(s, m, l) }; // (6) and the sum of (7)
    let o = &mut partial.o[row * value_row..][..R * value_row];
    // SAFETY: `s` is [R, TILE] and `o` is [R, value_row]; the rest is this function's contract.
    unsafe { tile_values::<L, S, R>(o, &alpha, s, values, value_row, first, end) }; // (7)
}

/// Turns rows of scores into p, brings their m and l up to date, and returns each row's α.
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn online_softmax<L: Lanes, const R: usize>(
    s: &mut [[f32; TILE]],
    m: &mut [f32],
    l: &mut [f32],
) -> [f32; R] {
    let mut alpha = [0.0; R];
    for r in 0..R {
        // SAFETY: this function's contract.
        let highest = max(unsafe { highest::<L>(&s[r]) }, m[r]);
        let shift = if highest == f32::NEG_INFINITY { 0.0 } else { highest };
        let mut lanes = [0.0; LANES];
        for i in 0..TILE / LANES {
            for j in 0..LANES {
                let p = exp_fused(s[r][i * LANES + j] - shift);
                s[r][i * LANES + j] = p;
                lanes[j] += p;
            }
        }
        alpha[r] = exp_fused(m[r] - shift);
        l[r] = alpha[r] * l[r] + sum_lanes(lanes);
        m[r] = highest;
    }
    alpha
}

/// The highest score of a row.
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn highest<L: Lanes>(s: &[f32; TILE]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    // SAFETY: vectors lie inside the row, and a vector is no more than `LANES` numbers.
    unsafe {
        let mut most = L::load(s.as_ptr());
        for position in (L::COUNT..TILE).step_by(L::COUNT) {
            most = L::max(most, L::load(s.as_ptr().add(position)));
        }
        L::store(lanes.as_mut_ptr(), most);
    }
    max_lanes(lanes)
}

/// s = q Kᵀ at least at positions `first..end`.
///
/// # Safety
/// That of [`rows`].
#[inline(always)]
unsafe fn tile_scores<L: Lanes, S: Load, const R: usize>(
    s: &mut [[f32; TILE]],
    queries: &[f32],
    keys: &[*const u8; BLOCKS],
    d: usize,
    first: usize,
    end: usize,
) {
    macro_rules! pass {
        ($vectors:literal) => {{
            let step = $vectors * L::COUNT;
            for position in (first / step * step..end).step_by(step) {
                let mut k = [(keys[0], 0); $vectors];
                for w in 0..$vectors {
                    let at = position + w * L::COUNT;
                    k[w] = (keys[at / BLOCK_TOKENS], at % BLOCK_TOKENS);
                }
                let s = s.as_mut_ptr().cast::<f32>();
                // SAFETY: `position + step` is at most TILE; this function's contract.
                unsafe { scores::<L, S, R, $vectors>(s.add(position), queries, k, d) };
            }
        }};
    }
    if 4 * R <= L::SUMS { pass!(4) } else { pass!(2) }
}

/// Scores of `R` rows at `W` vectors of positions, each a tile and a token.
///
/// # Safety
/// That of [`Lanes`]; `s` points into `[R, TILE]`, `k` to whole tiles, and `queries` is `[head_dim, R]`.
#[inline(always)]
unsafe fn scores<L: Lanes, S: Load, const R: usize, const W: usize>(
    s: *mut f32,
    queries: &[f32],
    k: [(*const u8, usize); W],
    d: usize,
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut sum = [[L::splat(0.0); W]; R];
        let q = queries.as_ptr();
        macro_rules! add {
            ($i:expr, $k:expr) => {
                for r in 0..R {
                    let q = L::splat(*q.add($i * R + r));
                    for w in 0..W {
                        sum[r][w] = L::mul_add(q, $k[w], sum[r][w]);
                    }
                }
            };
        }
        let mut start = 0;
        while start < d {
            let end = d.min(start.saturating_add(S::GROUP));
            let mut scales = [L::splat(0.0); W];
            for (w, (tile, token)) in k.into_iter().enumerate() {
                scales[w] = S::key_scales::<L>(tile, start / S::GROUP, token);
            }
            let mut i = start;
            while i + 2 <= end {
                let mut two = [[scales[0]; W]; 2];
                for (w, (tile, token)) in k.into_iter().enumerate() {
                    [two[0][w], two[1][w]] = S::two_keys::<L>(tile, i, token, scales[w]);
                }
                add!(i, two[0]);
                add!((i + 1), two[1]);
                i += 2;
            }
            if i < end {
                let mut one = scales;
                for (w, (tile, token)) in k.into_iter().enumerate() {
                    one[w] = S::key::<L>(tile, i, token, scales[w]);
                }
                add!(i, one);
            }
            start = end;
        }
        for r in 0..R {
            for w in 0..W {
                L::store(s.add(r * TILE + w * L::COUNT), sum[r][w]);
            }
        }
    }
}

/// o = α o + p V over positions `first..end`.
///
/// # Safety
/// That of [`rows`].
#[inline(always)]
unsafe fn tile_values<L: Lanes, S: Load, const R: usize>(
    o: &mut [f32],
    alpha: &[f32; R],
    p: &[[f32; TILE]],
    values: &[*const u8; BLOCKS],
    value_row: usize,
    first: usize,
    end: usize,
) {
    let vectors = value_row / L::COUNT;
    let mut done = 0;
    macro_rules! pass {
        ($vectors:literal) => {
            while vectors - done >= $vectors {
                let column = done * L::COUNT;
                let o = o[column..].as_mut_ptr();
                // SAFETY: `column` and the pass' vectors lie inside the row; this function's contract.
                unsafe {
                    accumulate::<L, S, R, $vectors>(o, alpha, p, values, value_row, column, first, end);
                }
                done += $vectors;
            }
        };
    }
    if 4 * R <= L::SUMS {
        pass!(4);
    }
    pass!(2);
    pass!(1);
}

/// `W` vectors of o for `R` rows.
///
/// # Safety
/// That of [`Lanes`]; `o` points into `[R, value_row]` at `column`, `values` to whole tiles.
#[inline(always)]
unsafe fn accumulate<L: Lanes, S: Load, const R: usize, const W: usize>(
    o: *mut f32,
    alpha: &[f32; R],
    p: &[[f32; TILE]],
    values: &[*const u8; BLOCKS],
    value_row: usize,
    column: usize,
    first: usize,
    end: usize,
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut sum = [[L::splat(0.0); W]; R];
        for r in 0..R {
            for w in 0..W {
                let o = L::load(o.add(r * value_row + w * L::COUNT));
                sum[r][w] = L::mul(o, L::splat(alpha[r]));
            }
        }
        let p = p.as_ptr().cast::<f32>();
        let mut scales = [[0.0; BLOCK_TOKENS]; W];
        for block in first / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            let start = block * BLOCK_TOKENS;
            let tile = values[block];
            for w in 0..W {
                S::value_scales::<L>(tile, column + w * L::COUNT, &mut scales[w]);
            }
            for t in first.max(start)..end.min(start + BLOCK_TOKENS) {
                let token = t - start;
                let mut v_t = [L::splat(0.0); W];
                for w in 0..W {
                    let (column, scale) = (column + w * L::COUNT, scales[w][token]);
                    v_t[w] = S::value::<L>(tile, token, column, value_row, scale);
                }
                for r in 0..R {
                    let p = L::splat(*p.add(r * TILE + t));
                    for w in 0..W {
                        sum[r][w] = L::mul_add(p, v_t[w], sum[r][w]);
                    }
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                L::store(o.add(r * value_row + w * L::COUNT), sum[r][w]);
            }
        }
    }
}
