//! Steps 3–7 of attention in vector registers.
//!
//! A micro tile is up to 8 rows (4 for AVX2). Both products are register-blocked: `scores` holds
//! [rows, 16–64 positions] while it walks over `head_dim`, `accumulate` holds [rows, a few vectors of
//! o] while it walks over the tile's positions. Each sum is one chain of fused multiply-adds in the
//! order of `head_dim` or of positions, whatever the number of rows: batching changes no bit.

use half::{bf16, f16};

use super::TILE;
use super::lanes::Lanes;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::task::{Chunk, Partial, Work};
use crate::BLOCK_TOKENS;
use crate::kv::Element;
use crate::math::{LANES, exp, max, max_lanes, sum_lanes, tanh};

/// Blocks in a tile.
const BLOCKS: usize = TILE / BLOCK_TOKENS;

/// An element that a vector can be loaded from.
pub(super) trait Load: Element {
    /// # Safety
    /// That of [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::load(from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::load_f16(from) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::Vector {
        // SAFETY: this function's contract.
        unsafe { L::load_bf16(from) }
    }
}

/// Attends to one chunk. `work.queries` holds scaled queries in micro tiles of four rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend_avx2<E: Load>(
    chunk: &Chunk<'_, E>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    // SAFETY: compiled for AVX2.
    unsafe { attend::<Avx2, E>(chunk, work, partial) }
}

/// Attends to one chunk. `work.queries` holds scaled queries in micro tiles of eight rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn attend_avx512<E: Load>(
    chunk: &Chunk<'_, E>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    // SAFETY: compiled for AVX-512.
    unsafe { attend::<Avx512, E>(chunk, work, partial) }
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn attend<L: Lanes, E: Load>(
    chunk: &Chunk<'_, E>,
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    let (d, value_row) = (chunk.spec.head_dim, partial.value_row);
    for tile in chunk.tiles() {
        // (3) Block pointers; places outside the chunk's positions repeat a block inside.
        let (first, last) = (chunk.keys.start / BLOCK_TOKENS, (chunk.keys.end - 1) / BLOCK_TOKENS);
        let mut keys = [std::ptr::null::<E>(); BLOCKS];
        let mut values = [std::ptr::null::<E>(); BLOCKS];
        for i in 0..BLOCKS {
            let block = chunk.table[(tile / BLOCK_TOKENS + i).clamp(first, last)];
            keys[i] = chunk.blocks.keys(block, chunk.kv_head).as_ptr();
            values[i] = chunk.blocks.values(block, chunk.kv_head).as_ptr();
        }
        if size_of::<E>() != size_of::<f32>() && chunk.rows.len() > 2 * L::ROWS {
            // Many rows: convert once, not once a micro tile.
            let (wide_keys, wide_values) = work.tile.split_at_mut(TILE * d);
            let mut keys_at = [std::ptr::null::<f32>(); BLOCKS];
            let mut values_at = [std::ptr::null::<f32>(); BLOCKS];
            for i in 0..BLOCKS {
                let k = &mut wide_keys[i * d * BLOCK_TOKENS..][..d * BLOCK_TOKENS];
                let v =
                    &mut wide_values[i * value_row * BLOCK_TOKENS..][..value_row * BLOCK_TOKENS];
                // SAFETY: a block's tile has as many elements as these slices.
                unsafe { widen::<L, E>(k, keys[i]) };
                // SAFETY: as above.
                unsafe { widen::<L, E>(v, values[i]) };
                (keys_at[i], values_at[i]) = (k.as_ptr(), v.as_ptr());
            }
            // SAFETY: this function's contract; pointers are to whole tiles.
            unsafe { rows::<L, E, f32>(chunk, tile, keys_at, values_at, work, partial) };
        } else {
            // SAFETY: as above.
            unsafe { rows::<L, E, E>(chunk, tile, keys, values, work, partial) };
        }
    }
}

/// Converts `from` to f32; whole multiples of 16 elements.
///
/// # Safety
/// That of [`Lanes`]; `from` has as many elements as `to`.
#[inline(always)]
unsafe fn widen<L: Lanes, E: Load>(to: &mut [f32], from: *const E) {
    for i in (0..to.len()).step_by(L::COUNT) {
        // SAFETY: this function's contract.
        unsafe { L::store(to.as_mut_ptr().add(i), E::load::<L>(from.add(i))) };
    }
}

/// All rows against one tile, a micro tile at a time.
///
/// # Safety
/// That of [`Lanes`]; `keys` point to `[head_dim, 16]`, `values` to `[16, value_row]`.
#[inline(always)]
unsafe fn rows<L: Lanes, E, T: Load>(
    chunk: &Chunk<'_, E>,
    tile: usize,
    keys: [*const T; BLOCKS],
    values: [*const T; BLOCKS],
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    let total = chunk.rows.len();
    for row in (0..total).step_by(L::ROWS) {
        macro_rules! micro_tile {
            ($rows:literal) => {
                // SAFETY: this function's contract.
                unsafe {
                    micro_tile::<L, E, T, $rows>(chunk, tile, row, &keys, &values, work, partial)
                }
            };
        }
        match (total - row).min(L::ROWS) {
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
unsafe fn micro_tile<L: Lanes, E, T: Load, const R: usize>(
    chunk: &Chunk<'_, E>,
    tile: usize,
    row: usize,
    keys: &[*const T; BLOCKS],
    values: &[*const T; BLOCKS],
    work: &mut Work<'_>,
    partial: &mut Partial<'_>,
) {
    if R > L::ROWS {
        return; // never: `rows` takes no more; this spares the compiler the code
    }
    let (d, value_row) = (chunk.spec.head_dim, partial.value_row);
    // Visible positions grow with the row, so the first and the last one bound all.
    let first = chunk.visible(row, tile).start;
    let end = chunk.visible(row + R - 1, tile).end;
    if first >= end {
        return;
    }
    let queries = &work.queries[row * d..][..R * d]; // [head_dim, R]
    let s = &mut work.scores.as_chunks_mut::<TILE>().0[..R];
    // SAFETY: `s` is [R, TILE]; the rest is this function's contract.
    unsafe { tile_scores::<L, T, R>(s, queries, keys, d, first, end) }; // (4)
    let mut alpha = [0.0; R];
    for r in 0..R {
        let visible = chunk.visible(row + r, tile);
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
        // (6) and the sum of (7)
        alpha[r] = online_softmax(&mut s[r], &mut partial.m[row + r], &mut partial.l[row + r]);
    }
    let o = &mut partial.o[row * value_row..][..R * value_row];
    // SAFETY: `s` is [R, TILE] and `o` is [R, value_row]; the rest is this function's contract.
    unsafe { tile_values::<L, T, R>(o, &alpha, s, values, value_row, first, end) }; // (7)
}

/// Turns a row's scores into p, brings its m and l up to date, and returns α.
#[inline(always)]
fn online_softmax(s: &mut [f32; TILE], m: &mut f32, l: &mut f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for i in 0..TILE / LANES {
        for j in 0..LANES {
            lanes[j] = max(lanes[j], s[i * LANES + j]);
        }
    }
    let highest = max(max_lanes(lanes), *m);
    let shift = if highest == f32::NEG_INFINITY { 0.0 } else { highest };
    let mut lanes = [0.0; LANES];
    for i in 0..TILE / LANES {
        for j in 0..LANES {
            let p = exp(s[i * LANES + j] - shift);
            s[i * LANES + j] = p;
            lanes[j] += p;
        }
    }
    let alpha = exp(*m - shift);
    *l = alpha * *l + sum_lanes(lanes);
    *m = highest;
    alpha
}

/// s = q Kᵀ at least at positions `first..end`.
///
/// # Safety
/// That of [`rows`].
#[inline(always)]
unsafe fn tile_scores<L: Lanes, T: Load, const R: usize>(
    s: &mut [[f32; TILE]],
    queries: &[f32],
    keys: &[*const T; BLOCKS],
    d: usize,
    first: usize,
    end: usize,
) {
    macro_rules! pass {
        ($vectors:literal) => {{
            let step = $vectors * L::COUNT;
            for position in (first / step * step..end).step_by(step) {
                let mut k = [keys[0]; $vectors];
                for w in 0..$vectors {
                    let at = position + w * L::COUNT;
                    // SAFETY: inside the block's first row of 16.
                    k[w] = unsafe { keys[at / BLOCK_TOKENS].add(at % BLOCK_TOKENS) };
                }
                let s = s.as_mut_ptr().cast::<f32>();
                // SAFETY: `position + step` is at most TILE; this function's contract.
                unsafe { scores::<L, T, R, $vectors>(s.add(position), queries, k, d) };
            }
        }};
    }
    if 4 * R <= L::SUMS { pass!(4) } else { pass!(2) }
}

/// Scores of `R` rows at `W` vectors of positions.
///
/// # Safety
/// That of [`Lanes`]; `s` points into `[R, TILE]`, `k` into `[head_dim, 16]`, and `queries` is
/// `[head_dim, R]`.
#[inline(always)]
unsafe fn scores<L: Lanes, T: Load, const R: usize, const W: usize>(
    s: *mut f32,
    queries: &[f32],
    k: [*const T; W],
    d: usize,
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut sum = [[L::splat(0.0); W]; R];
        let q = queries.as_ptr();
        for i in 0..d {
            let mut k_i = [L::splat(0.0); W];
            for w in 0..W {
                k_i[w] = T::load::<L>(k[w].add(i * BLOCK_TOKENS));
            }
            for r in 0..R {
                let q = L::splat(*q.add(i * R + r));
                for w in 0..W {
                    sum[r][w] = L::mul_add(q, k_i[w], sum[r][w]);
                }
            }
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
unsafe fn tile_values<L: Lanes, T: Load, const R: usize>(
    o: &mut [f32],
    alpha: &[f32; R],
    p: &[[f32; TILE]],
    values: &[*const T; BLOCKS],
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
                    accumulate::<L, T, R, $vectors>(o, alpha, p, values, value_row, column, first, end);
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
/// That of [`Lanes`]; `o` points into `[R, value_row]` at `column`, `values` to `[16, value_row]`.
#[inline(always)]
unsafe fn accumulate<L: Lanes, T: Load, const R: usize, const W: usize>(
    o: *mut f32,
    alpha: &[f32; R],
    p: &[[f32; TILE]],
    values: &[*const T; BLOCKS],
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
        for block in first / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            let start = block * BLOCK_TOKENS;
            let v = values[block].add(column);
            for t in first.max(start)..end.min(start + BLOCK_TOKENS) {
                let mut v_t = [L::splat(0.0); W];
                for w in 0..W {
                    v_t[w] = T::load::<L>(v.add((t - start) * value_row + w * L::COUNT));
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
