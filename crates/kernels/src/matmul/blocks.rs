//! The blocks of packed file types, taken apart into codes and scales.

use bevel_base::DType;

use super::layout;

/// A block's parts, before they are written into a tile.
pub(super) struct Block {
    /// Unsigned codes, one a value.
    pub(super) codes: [u8; 256],
    /// The block's scale: the bits of an f16 (of a bf16 for MXFP4).
    pub(super) scale: u16,
    /// The block's minimum, or what sub-minima are multiplied with: the bits of an f16.
    pub(super) min: u16,
    /// Scales of the runs of 16 or 32 values.
    pub(super) sub_scales: [i8; 16],
    /// Minima of the runs of 16 or 32 values.
    pub(super) sub_mins: [u8; 16],
}

impl Block {
    /// All zeros.
    pub(super) fn new() -> Self {
        Self { codes: [0; 256], scale: 0, min: 0, sub_scales: [0; 16], sub_mins: [0; 16] }
    }
}

/// Takes the bytes of one block of type `dtype` apart.
pub(super) fn decode(dtype: DType, bytes: &[u8], block: &mut Block) {
    match dtype {
        DType::Q4_0 | DType::IQ4_NL => {
            block.scale = half(bytes, 0);
            nibbles(&bytes[2..18], &mut block.codes[..32]);
        }
        DType::Q4_1 => {
            (block.scale, block.min) = (half(bytes, 0), half(bytes, 2));
            nibbles(&bytes[4..20], &mut block.codes[..32]);
        }
        DType::Q5_0 => {
            block.scale = half(bytes, 0);
            nibbles(&bytes[6..22], &mut block.codes[..32]);
            fifth_bits(&bytes[2..6], &mut block.codes[..32]);
        }
        DType::Q5_1 => {
            (block.scale, block.min) = (half(bytes, 0), half(bytes, 2));
            nibbles(&bytes[8..24], &mut block.codes[..32]);
            fifth_bits(&bytes[4..8], &mut block.codes[..32]);
        }
        DType::Q8_0 => {
            block.scale = half(bytes, 0);
            for (code, &byte) in block.codes.iter_mut().zip(&bytes[2..34]) {
                *code = byte ^ 0x80;
            }
        }
        DType::MXFP4 => {
            block.scale = e8m0_half(bytes[0]);
            nibbles(&bytes[1..17], &mut block.codes[..32]);
        }
        DType::Q2_K => q2_k(bytes, block),
        DType::Q3_K => q3_k(bytes, block),
        DType::Q4_K | DType::Q5_K => q45_k(bytes, block),
        DType::Q6_K => q6_k(bytes, block),
        DType::IQ4_XS => iq4_xs(bytes, block),
        DType::TQ1_0 => tq1_0(bytes, block),
        DType::TQ2_0 => tq2_0(bytes, block),
        _ => codebook(dtype, bytes, block),
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Low nibbles are the first half of the values.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Bit i is the fifth bit of value i.
fn fifth_bits(bytes: &[u8], codes: &mut [u8]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> i & 1) as u8) << 4;
    }
}

/// Half of 2^(e - 127), as the bits of a bf16: MXFP4's levels are doubled to be integers.
fn e8m0_half(e: u8) -> u16 {
    match e {
        // Below the smallest normal number the mantissa's bits take over.
        0 => 0x0020,
        1 => 0x0040,
        _ => u16::from(e - 1) << 7,
    }
}

/// The two bits at `shift` of each of 32 bytes.
fn pairs(bytes: &[u8], shift: usize, codes: &mut [u8]) {
    for (code, &byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> shift & 3;
    }
}

/// `scales[16]` (low nibble scale, high nibble minimum), `qs[64]`, `d`, `dmin`.
fn q2_k(bytes: &[u8], block: &mut Block) {
    let (scales, rest) = bytes.split_at(16);
    for i in 0..8 {
        pairs(&rest[i / 4 * 32..][..32], i % 4 * 2, &mut block.codes[i * 32..][..32]);
    }
    for i in 0..16 {
        (block.sub_scales[i], block.sub_mins[i]) = ((scales[i] & 15) as i8, scales[i] >> 4);
    }
    (block.scale, block.min) = (half(rest, 64), half(rest, 66));
}

/// `hmask[32]`, `qs[64]`, `scales[12]`, `d`.
fn q3_k(bytes: &[u8], block: &mut Block) {
    let (high, rest) = bytes.split_at(32);
    let (low, rest) = rest.split_at(64);
    for i in 0..8 {
        let codes = &mut block.codes[i * 32..][..32];
        pairs(&low[i / 4 * 32..][..32], i % 4 * 2, codes);
        for (code, &high) in codes.iter_mut().zip(high) {
            *code |= (high >> i & 1) << 2;
        }
    }
    for i in 0..16 {
        let low = rest[i % 8] >> (i / 8 * 4) & 15;
        let high = rest[8 + i % 4] >> (i / 4 * 2) & 3;
        block.sub_scales[i] = (low | high << 4) as i8 - 32;
    }
    block.scale = half(rest, 12);
}

/// `d`, `dmin`, `scales[12]`, then `qs[128]`, in Q5_K after `qh[32]`.
fn q45_k(bytes: &[u8], block: &mut Block) {
    (block.scale, block.min) = (half(bytes, 0), half(bytes, 2));
    let (scales, rest) = bytes[4..].split_at(12);
    for i in 0..4 {
        block.sub_scales[i] = (scales[i] & 63) as i8;
        block.sub_mins[i] = scales[i + 4] & 63;
        block.sub_scales[i + 4] = (scales[i + 8] & 15 | scales[i] >> 6 << 4) as i8;
        block.sub_mins[i + 4] = scales[i + 8] >> 4 | scales[i + 4] >> 6 << 4;
    }
    let (fifth, low) = rest.split_at(rest.len() - 128);
    for i in 0..4 {
        nibbles(&low[i * 32..][..32], &mut block.codes[i * 64..][..64]);
    }
    for i in 0..8 {
        for (code, &high) in block.codes[i * 32..][..32].iter_mut().zip(fifth) {
            *code |= (high >> i & 1) << 4;
        }
    }
}

/// `ql[128]`, `qh[64]`, `i8 scales[16]`, `d`.
fn q6_k(bytes: &[u8], block: &mut Block) {
    let (low, rest) = bytes.split_at(128);
    let (high, rest) = rest.split_at(64);
    for half in 0..2 {
        for i in 0..4 {
            let codes = &mut block.codes[half * 128 + i * 32..][..32];
            let low = &low[half * 64 + i % 2 * 32..][..32];
            let high = &high[half * 32..][..32];
            for ((code, &low), &high) in codes.iter_mut().zip(low).zip(high) {
                *code = low >> (i / 2 * 4) & 15 | (high >> (i * 2) & 3) << 4;
            }
        }
    }
    for (scale, &byte) in block.sub_scales.iter_mut().zip(rest) {
        *scale = byte as i8;
    }
    block.scale = half(rest, 16);
}

/// `d`, `u16 scales_h`, `scales_l[4]`, `qs[128]`.
fn iq4_xs(bytes: &[u8], block: &mut Block) {
    block.scale = half(bytes, 0);
    let high = half(bytes, 2);
    for i in 0..8 {
        let low = bytes[4 + i / 2] >> (i % 2 * 4) & 15;
        block.sub_scales[i] = (low | ((high >> (i * 2) & 3) as u8) << 4) as i8 - 32;
        nibbles(&bytes[8 + i * 16..][..16], &mut block.codes[i * 32..][..32]);
    }
}

/// `qs[48]` of five trits a byte, `qh[4]` of four, `d`.
fn tq1_0(bytes: &[u8], block: &mut Block) {
    let trit = |byte: u8, n: usize| {
        let shifted = byte.wrapping_mul([1, 3, 9, 27, 81][n]);
        ((u16::from(shifted) * 3) >> 8) as u8
    };
    for n in 0..5 {
        for i in 0..32 {
            block.codes[n * 32 + i] = trit(bytes[i], n);
        }
        for i in 0..16 {
            block.codes[160 + n * 16 + i] = trit(bytes[32 + i], n);
        }
    }
    for n in 0..4 {
        for i in 0..4 {
            block.codes[240 + n * 4 + i] = trit(bytes[48 + i], n);
        }
    }
    block.scale = half(bytes, 52);
}

/// `qs[64]`, `d`.
fn tq2_0(bytes: &[u8], block: &mut Block) {
    for i in 0..8 {
        pairs(&bytes[i / 4 * 32..][..32], i % 4 * 2, &mut block.codes[i * 32..][..32]);
    }
    block.scale = half(bytes, 64);
}

/// The codebook types: their values are a sub-scale times a few magnitudes with a sign, and the tile
/// keeps the number of the magnitude and the sign.
fn codebook(dtype: DType, bytes: &[u8], block: &mut Block) {
    block.scale = half(bytes, 0);
    // Sub-scales are odd: 1 + 2 times what four bits of the block say.
    let odd = |nibble: u8| (1 + 2 * (nibble & 15)) as i8;
    match dtype {
        DType::IQ2_XXS => {
            for i in 0..8 {
                block.sub_scales[i] = odd(bytes[2 + i * 8 + 7] >> 4);
            }
        }
        DType::IQ3_XXS => {
            for i in 0..8 {
                block.sub_scales[i] = odd(bytes[2 + 64 + i * 4 + 3] >> 4);
            }
        }
        DType::IQ3_S => {
            for i in 0..8 {
                block.sub_scales[i] = odd(bytes[106 + i / 2] >> (i % 2 * 4));
            }
        }
        // IQ2_XS and IQ2_S end with a nibble for each run of 16.
        _ => {
            for i in 0..16 {
                block.sub_scales[i] = odd(bytes[bytes.len() - 8 + i / 2] >> (i % 2 * 4));
            }
        }
    }
    let runs = if matches!(dtype, DType::IQ2_XS | DType::IQ2_S) { 16 } else { 8 };
    let (levels, factor) = layout::levels(dtype);
    let codes = if runs == 16 || dtype == DType::IQ2_XXS { 8 } else { 16 };
    let mut code_of = [0; 128];
    for (code, &level) in (0..codes).zip(levels).rev() {
        code_of[usize::from(level as u8 ^ 64) & 127] = code;
    }

    // With a block scale of 1, values are levels times sub-scales, exactly.
    let mut unit = [0; 128];
    let unit = &mut unit[..bytes.len()];
    unit.copy_from_slice(bytes);
    unit[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
    let mut values = [0.0; 256];
    bevel_base::pack::dequantize(dtype, unit, &mut values).expect("one whole block");
    let run = 256 / runs;
    let runs = block.codes.chunks_exact_mut(run).zip(values.chunks_exact(run));
    for ((codes, values), &sub_scale) in runs.zip(&block.sub_scales) {
        let unit = factor * f32::from(sub_scale);
        for (code, value) in codes.iter_mut().zip(values) {
            *code = code_of[usize::from((value / unit) as i8 as u8 ^ 64) & 127];
        }
    }
}
