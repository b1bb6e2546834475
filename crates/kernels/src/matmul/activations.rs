//! Activations as kernels read them: blocks of up to eight tokens, interleaved.
//!
//! A kernel multiplies a tile with `T` tokens at once, `T` being 8, 4, 2 or 1. What it needs of them
//! for the same columns lies together:
//! ```text
//! f32    [column][T]                                     4 * T bytes a column
//! bf16   [pair of columns][T][2]                         4 * T bytes a pair, the last padded with zero
//! int8   [group of 32 columns] of                       48 * T bytes a group
//!            [quad 0..8][T][4 columns]   i8 codes; `Isa::NeonI8mm`: [pair of quads][T][8 columns]
//!            [T]                         f32 scale = largest magnitude / 127
//!            [T]                         i32 -(sum of the 32 codes)
//!            [T][T]                      i32 -(sum of the first, of the last 16 codes)
//!        on `Isa::Avx2` sums are two of 16 bits: of the first and of the last two codes of each quad
//! ```
//! A token's value is `code * scale`. The block of tokens `t ..` starts where `t` tokens before it
//! end, whatever the sizes of the blocks are.

use bevel_base::AlignedVec;
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::bytes::{Twos, Vex};
use super::layout::{GROUP, Inputs, QUADS};
use crate::{Cpu, Isa};

/// The most tokens of a block.
pub(super) const TOKENS: usize = 8;
/// Bytes of one token's int8 group.
pub(super) const GROUP_BYTES: usize = GROUP + 4 * 4;

/// Buffers of [`super::matmul`], reused from call to call. Nothing is allocated once they have grown
/// to the largest input seen.
#[derive(Default)]
pub struct Scratch {
    pub(super) int8: Buffer,
    pub(super) f32: Buffer,
    pub(super) bf16: Buffer,
    pub(super) outputs: Vec<super::Output>,
}

impl Scratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let buffers = [&self.int8, &self.f32, &self.bf16];
        let bytes: usize =
            buffers.iter().map(|buffer| buffer.0.as_ref().map_or(0, |b| b.len())).sum();
        f.debug_struct("Scratch").field("bytes", &bytes).finish()
    }
}

/// An aligned buffer that only grows.
#[derive(Default)]
pub(super) struct Buffer(Option<AlignedVec<u8>>);

impl Buffer {
    /// The first `len` bytes.
    pub(super) fn get(&self, len: usize) -> &[u8] {
        self.0.as_ref().map_or(&[], |bytes| &bytes[..len])
    }

    fn grow(&mut self, len: usize) -> &mut [u8] {
        if self.0.as_ref().is_none_or(|bytes| bytes.len() < len) {
            self.0 = Some(AlignedVec::zeroed(len));
        }
        self.0.as_mut().map_or(&mut [], |bytes| &mut bytes[..len])
    }
}

/// The block that starts at `token` where `n` tokens are cut greedily: its number of tokens.
pub(super) fn block_tokens(token: usize, n: usize) -> usize {
    match n - token {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Fills `buffer` with `x` (`[n, cols]`) interleaved, and returns the bytes used.
pub(super) fn interleave(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    cols: usize,
    buffer: &mut Buffer,
) -> usize {
    let len = n * cols * 4;
    let out = buffer.grow(len);
    each_block(cpu, x, n, cols, cols * 4, out, |x, tokens, out| {
        let out: &mut [f32] = bytemuck::cast_slice_mut(out);
        for (token, row) in x.chunks_exact(cols).enumerate() {
            for (column, &value) in row.iter().enumerate() {
                out[column * tokens + token] = value;
            }
        }
    });
    len
}

/// Fills `buffer` with `x` (`[n, cols]`) rounded to bf16, and returns the bytes used.
pub(super) fn round_to_bf16(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    cols: usize,
    buffer: &mut Buffer,
) -> usize {
    let token_bytes = Inputs::Bf16.bytes(cols);
    let out = buffer.grow(n * token_bytes);
    let isa = cpu.isa();
    each_block(cpu, x, n, cols, token_bytes, out, |x, tokens, out| match isa {
        // SAFETY: `Cpu` holds an instruction set only where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => unsafe { super::avx512::pair_block(x, tokens, out) },
        _ => {
            for (token, row) in x.chunks_exact(cols).enumerate() {
                put_pairs(row, token, tokens, out.as_chunks_mut().0);
            }
        }
    });
    n * token_bytes
}

/// Rounds a row to bf16 and writes it as token `token` of a block of pairs.
pub(super) fn put_pairs(row: &[f32], token: usize, tokens: usize, words: &mut [[u8; 4]]) {
    for (pair, words) in row.chunks(2).zip(words.chunks_exact_mut(tokens)) {
        let bits = |i: usize| pair.get(i).map_or(0, |&v| bf16::from_f32(v).to_bits());
        words[token] = pair_word(bits(0), bits(1));
    }
}

/// A pair as it lies in memory.
pub(super) fn pair_word(first: u16, second: u16) -> [u8; 4] {
    (u32::from(first) | u32::from(second) << 16).to_ne_bytes()
}

/// Fills `buffer` with `x` (`[n, cols]`, `cols` a multiple of 32) quantized to int8, and returns the
/// bytes used.
pub(super) fn quantize(cpu: &Cpu, x: &[f32], n: usize, cols: usize, buffer: &mut Buffer) -> usize {
    let token_bytes = Inputs::Int8.bytes(cols);
    let out = buffer.grow(n * token_bytes);
    let isa = cpu.isa();
    each_block(cpu, x, n, cols, token_bytes, out, |x, tokens, out| match isa {
        // SAFETY: `Cpu` holds an instruction set only where the processor has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { super::avx512::quantize_block(x, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { super::avx2::quantize_block::<Twos>(x, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => unsafe { super::avx2::quantize_block::<Vex>(x, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot => unsafe { super::neon::quantize_block(x, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => unsafe { super::neon::quantize_pairs(x, tokens, out) },
        _ => put_rounded::<1>(x, tokens, out, round),
    });
    n * token_bytes
}

/// Calls `fill(tokens' values, tokens, their bytes of out)` for each block, on all threads where
/// there is more than one block of work.
fn each_block(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    cols: usize,
    token_bytes: usize,
    out: &mut [u8],
    fill: impl Fn(&[f32], usize, &mut [u8]) + Sync,
) {
    let full = |index: usize, out: &mut [u8]| {
        let (mut token, end) = (index * TOKENS, n.min((index + 1) * TOKENS));
        let mut out = out;
        while token < end {
            let tokens = block_tokens(token, n);
            let (block, rest) = std::mem::take(&mut out).split_at_mut(tokens * token_bytes);
            fill(&x[token * cols..][..tokens * cols], tokens, block);
            (token, out) = (token + tokens, rest);
        }
    };
    let chunk = TOKENS * token_bytes;
    if n <= TOKENS {
        full(0, out);
    } else {
        cpu.pool().run_chunks(out, chunk, full);
    }
}

/// A group of 32 values rounded to int8.
pub(super) struct Rounded {
    /// In -127 ..= 127.
    pub(super) codes: [i8; GROUP],
    /// A value is its code times this.
    pub(super) scale: f32,
    /// -(sum of the codes): of all, of the first and of the last 16.
    pub(super) negative_sums: [i32; 3],
}

/// Writes the `tokens` rows of `x` into one block, each group as `round` rounds it. `TOGETHER` of a
/// token's quads follow each other before those of the next token do.
#[inline(always)]
pub(super) fn put_rounded<const TOGETHER: usize>(
    x: &[f32],
    tokens: usize,
    out: &mut [u8],
    round: impl Fn(&[f32; GROUP]) -> Rounded,
) {
    for (token, row) in x.chunks_exact(x.len() / tokens).enumerate() {
        let (groups, _) = row.as_chunks::<GROUP>();
        for (group, out) in groups.iter().zip(out.chunks_exact_mut(tokens * GROUP_BYTES)) {
            let Rounded { codes, scale, negative_sums } = round(group);
            let quads: [[u8; 4]; QUADS] = bytemuck::cast(codes);
            let (words, _) = out.as_chunks_mut::<4>();
            let (quad_words, words) = words.split_at_mut(QUADS * tokens);
            let quad_words = quad_words.as_chunks_mut::<TOGETHER>().0;
            let quads = quads.as_chunks::<TOGETHER>().0;
            for (words, quads) in quad_words.chunks_exact_mut(tokens).zip(quads) {
                words[token] = *quads;
            }
            words[token] = scale.to_ne_bytes();
            for (i, sum) in negative_sums.into_iter().enumerate() {
                words[(1 + i) * tokens + token] = sum.to_ne_bytes();
            }
        }
    }
}

/// The factor that values are multiplied with before they are rounded, and the scale that undoes it,
/// where `magnitude` is the bits of the group's largest magnitude. As integers magnitudes compare as
/// they do as numbers, and those of what is infinite or no number are the largest.
///
/// A group whose values are all below 1e-35 becomes zero; one with a value that is infinite or no
/// number gets a scale that is no number.
#[inline(always)]
pub(super) fn factor_and_scale(magnitude: u32) -> (f32, f32) {
    let largest = f32::from_bits(magnitude);
    if !largest.is_finite() {
        (0.0, f32::NAN)
    } else if largest < 1e-35 {
        (0.0, 0.0)
    } else {
        (127.0 / largest, largest / 127.0)
    }
}

fn round(x: &[f32; GROUP]) -> Rounded {
    let magnitude = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max();
    let (factor, scale) = factor_and_scale(magnitude.unwrap_or(0));
    let codes = x.map(|v| (v * factor).round_ties_even() as i8);
    let sum = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
    let (first, last) = codes.split_at(GROUP / 2);
    let (first, last) = (-sum(first), -sum(last));
    Rounded { codes, scale, negative_sums: [first + last, first, last] }
}
