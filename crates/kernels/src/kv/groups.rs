//! How the keys and the values of one head lie in a block: small integers with scales.
//!
//! 32 values of one token share a half-precision scale, as in GGUF's Q8_0 and Q4_0; 16 tokens of such
//! groups lie together, so that a kernel reads vectors of codes and vectors of scales. A tile is
//! `head_dim` / 32 of them, rounded up: the excess is stored as zeros.
//!
//! A code has at most 8 bits and a scale 11, so their product is exact in f32: attention over packed
//! values is attention over those numbers in f32, bit for bit.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::BLOCK_TOKENS;
use super::store::Store;
use crate::Isa;
use crate::dispatch::for_each_isa;
use crate::math::{LANES, sum_lanes};

/// Values that share a scale.
pub(crate) const GROUP: usize = 32;

/// 16 tokens of 32 values `scale · code`, the code of 8 bits: 8.5 bits a value.
///
/// ```text
/// byte   0..32   scales  f16, one a token
///       32..544  codes   i8; keys [32 values, 16 tokens], values [16 tokens, 32 values]
/// ```
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Q8Group {
    pub(crate) scales: [f16; BLOCK_TOKENS],
    pub(crate) codes: [i8; GROUP * BLOCK_TOKENS],
}

/// 16 tokens of 32 values `scale · (code − 8)`, the code of 4 bits: 4.5 bits a value.
///
/// ```text
/// byte   0..32   scales  f16, one a token
///       32..288  codes   keys [16, 16 tokens]: row j has value 2j in the low half of a byte, 2j + 1
///                        in the high; values [16 tokens, 16]: byte j has value j and value 16 + j
/// ```
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Q4Group {
    pub(crate) scales: [f16; BLOCK_TOKENS],
    pub(crate) codes: [u8; GROUP / 2 * BLOCK_TOKENS],
}

const _: () = assert!(size_of::<Q8Group>() == 544);
const _: () = assert!(size_of::<Q4Group>() == 288);

/// Tiles of [`Q8Group`].
#[derive(Clone, Copy)]
pub(crate) struct Q8;

/// Tiles of [`Q4Group`].
#[derive(Clone, Copy)]
pub(crate) struct Q4;

impl Store for Q8 {
    fn key_bytes(head_dim: usize) -> Option<usize> {
        head_dim.div_ceil(GROUP).checked_mul(size_of::<Q8Group>())
    }

    fn value_bytes(head_dim: usize) -> Option<usize> {
        Self::key_bytes(head_dim)
    }

    fn put(isa: Isa, keys: &mut [u8], values: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
        put_q8(isa, bytemuck::cast_slice_mut(keys), token, k, true);
        put_q8(isa, bytemuck::cast_slice_mut(values), token, v, false);
    }

    fn keys(tile: &[u8], out: &mut [f32]) {
        let groups = bytemuck::cast_slice::<u8, Q8Group>(tile);
        for (group, out) in groups.iter().zip(out.chunks_mut(GROUP * BLOCK_TOKENS)) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = f32::from(group.codes[i]) * group.scales[i % BLOCK_TOKENS].to_f32();
            }
        }
    }

    fn values(tile: &[u8], out: &mut [f32]) {
        let groups = bytemuck::cast_slice::<u8, Q8Group>(tile);
        let row = out.len() / BLOCK_TOKENS;
        for (token, out) in out.chunks_exact_mut(row).enumerate() {
            for (group, out) in groups.iter().zip(out.chunks_mut(GROUP)) {
                for (out, &code) in out.iter_mut().zip(&group.codes[token * GROUP..]) {
                    *out = f32::from(code) * group.scales[token].to_f32();
                }
            }
        }
    }
}

impl Store for Q4 {
    fn key_bytes(head_dim: usize) -> Option<usize> {
        head_dim.div_ceil(GROUP).checked_mul(size_of::<Q4Group>())
    }

    fn value_bytes(head_dim: usize) -> Option<usize> {
        Self::key_bytes(head_dim)
    }

    fn put(isa: Isa, keys: &mut [u8], values: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
        put_q4(isa, bytemuck::cast_slice_mut(keys), token, k, true);
        put_q4(isa, bytemuck::cast_slice_mut(values), token, v, false);
    }

    fn keys(tile: &[u8], out: &mut [f32]) {
        let groups = bytemuck::cast_slice::<u8, Q4Group>(tile);
        for (group, out) in groups.iter().zip(out.chunks_mut(GROUP * BLOCK_TOKENS)) {
            for (i, out) in out.chunks_exact_mut(BLOCK_TOKENS).enumerate() {
                for (token, out) in out.iter_mut().enumerate() {
                    let code = group.codes[i / 2 * BLOCK_TOKENS + token] >> (i % 2 * 4) & 15;
                    *out = (f32::from(code) - 8.0) * group.scales[token].to_f32();
                }
            }
        }
    }

    fn values(tile: &[u8], out: &mut [f32]) {
        let groups = bytemuck::cast_slice::<u8, Q4Group>(tile);
        let row = out.len() / BLOCK_TOKENS;
        for (token, out) in out.chunks_exact_mut(row).enumerate() {
            for (group, out) in groups.iter().zip(out.chunks_mut(GROUP)) {
                for (i, out) in out.iter_mut().enumerate() {
                    let code = group.codes[token * GROUP / 2 + i % 16] >> (i / 16 * 4) & 15;
                    *out = (f32::from(code) - 8.0) * group.scales[token].to_f32();
                }
            }
        }
    }
}

for_each_isa! {
    /// Stores a token's values; `across` for keys, whose tokens lie side by side.
    fn put_q8(tile: &mut [Q8Group], token: usize, x: &[f32], across: bool) {
        for (group, x) in tile.iter_mut().zip(x.chunks(GROUP)) {
            let (scale, codes) = round_q8(&padded(x));
            group.scales[token] = scale;
            if across {
                for (row, code) in group.codes.chunks_exact_mut(BLOCK_TOKENS).zip(codes) {
                    row[token] = code;
                }
            } else {
                group.codes[token * GROUP..][..GROUP].copy_from_slice(&codes);
            }
        }
    }

    fn put_q4(tile: &mut [Q4Group], token: usize, x: &[f32], across: bool) {
        for (group, x) in tile.iter_mut().zip(x.chunks(GROUP)) {
            let (scale, codes) = round_q4(&padded(x));
            group.scales[token] = scale;
            if across {
                for (row, code) in
                    group.codes.chunks_exact_mut(BLOCK_TOKENS).zip(codes.as_chunks::<2>().0)
                {
                    row[token] = code[0] | code[1] << 4;
                }
            } else {
                for i in 0..GROUP / 2 {
                    group.codes[token * GROUP / 2 + i] = codes[i] | codes[GROUP / 2 + i] << 4;
                }
            }
        }
    }
}

#[inline(always)]
fn padded(x: &[f32]) -> [f32; GROUP] {
    let mut all = [0.0; GROUP];
    all[..x.len()].copy_from_slice(x);
    all
}

/// Groups whose values are all smaller than this are zeros: half the smallest scale.
const NOTHING: f32 = 2.980_232_2e-8;

/// The largest magnitude; a NaN where a value is one, and infinite where that is the largest.
#[inline(always)]
fn largest(x: &[f32; GROUP]) -> f32 {
    // The bits of magnitudes are in the order of the magnitudes, and NaN's lie above all.
    let mut bits = 0;
    for x in x {
        bits = bits.max(x.to_bits() & 0x7fff_ffff);
    }
    f32::from_bits(bits)
}

/// The nearest integer, ties to even, for |x| ≤ 2²²: arithmetic that compiles to vectors.
#[inline(always)]
fn round(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³
    (x + ROUND) - ROUND
}

/// The scale maps the largest magnitude to 127, as GGML's Q8_0 does.
///
/// Values that no half-precision scale reaches, infinities and NaNs make the whole group NaN: what was
/// no number before must not become one.
#[inline(always)]
fn round_q8(x: &[f32; GROUP]) -> (f16, [i8; GROUP]) {
    let largest = largest(x);
    if largest < NOTHING {
        return (f16::ZERO, [0; GROUP]);
    }
    let mut scale = f16::from_f32(largest / 127.0);
    if !scale.is_finite() {
        return (f16::NAN, [0; GROUP]);
    }
    // Only among subnormal halves is the nearest one so much smaller that it would clip.
    if scale.to_f32() * 127.5 < largest {
        scale = f16::from_bits(scale.to_bits() + 1);
    }
    let inverse = 1.0 / scale.to_f32();
    (scale, x.map(|x| round(x * inverse).clamp(-127.0, 127.0) as i8))
}

/// Levels between zero and the value of largest magnitude that scales are tried with. Q4_0 of GGML
/// takes 8 alone.
const STEPS: [f32; 3] = [8.0, 8.5, 7.5];

/// For each of [`STEPS`]: a scale, its codes, the least-squares scale of these, its codes; and of the
/// three results the one with the least squared error. On normally distributed values this leaves 10 %
/// less of it than GGML's Q4_0 does, and 2 % more than trying all scales would.
#[inline(always)]
fn round_q4(x: &[f32; GROUP]) -> (f16, [u8; GROUP]) {
    if largest(x) < NOTHING {
        return (f16::ZERO, [8; GROUP]);
    }
    let mut extreme = 0.0f32;
    for &x in x {
        extreme = if x.abs() > extreme.abs() { x } else { extreme };
    }
    // What is left where nothing below is finite.
    let (mut best, mut scale, mut codes) = (f32::INFINITY, f16::NAN, [0.0; GROUP]);
    for steps in STEPS {
        let (mut xq, mut qq) = ([0.0; LANES], [0.0; LANES]);
        let inverse = -steps / extreme;
        for i in 0..GROUP {
            let q = level(x[i] * inverse);
            xq[i % LANES] += x[i] * q;
            qq[i % LANES] += q * q;
        }
        let fitted = f16::from_f32(sum_lanes(xq) / sum_lanes(qq));
        let d = fitted.to_f32();
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        let (mut q, mut error) = ([0.0; GROUP], [0.0; LANES]);
        for i in 0..GROUP {
            q[i] = level(x[i] * inverse);
            let e = x[i] - d * q[i];
            error[i % LANES] += e * e;
        }
        let error = sum_lanes(error);
        if error < best && fitted.is_finite() {
            (best, scale, codes) = (error, fitted, q);
        }
    }
    (scale, codes.map(|q| (q + 8.0) as u8))
}

#[inline(always)]
fn level(x: f32) -> f32 {
    round(x.clamp(-8.0, 7.0))
}
