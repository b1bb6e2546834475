//! The kernels in portable code: the specification of the fast ones, reading the same tiles.

use bevel_base::pack::e4m3;
use half::{bf16, f16};

use super::activations::GROUP_BYTES;
use super::kernels::Sums;
use super::layout::{Coding, Dense, Format, GROUP, Layout, ROWS, Scales, Visitor};
use super::packed::Tile;

/// Products of an integer tile with a block of tokens. For each group:
/// sum += activation scale · (Σ_h scale_h · Σ (level - zero) · code - Σ_h min_h · -Σ code),
/// h running over the group's halves where these have their own scales.
pub(super) fn integer<F: Format>(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    sums[..tokens].fill([0.0; ROWS]);
    let spans = if F::CODING.scales.halves() { 2 } else { 1 };
    for (group, block) in block.chunks_exact(tokens * GROUP_BYTES).enumerate() {
        let levels = group_levels(F::CODING, tile, group);
        let scales = scales(F::CODING, tile, group);
        let (codes, rest) = block.split_at(GROUP * tokens);
        let word = |index: usize| -> [u8; 4] {
            let (words, _) = rest.as_chunks();
            words[index]
        };
        for token in 0..tokens {
            let activation_scale = f32::from_ne_bytes(word(token));
            let mut group_sums = [0.0; ROWS];
            for span in 0..spans {
                let columns = GROUP / spans;
                let mut dots = [0i32; ROWS];
                for column in span * columns..(span + 1) * columns {
                    let code = codes[(column / 4 * tokens + token) * 4 + column % 4] as i8;
                    for row in 0..ROWS {
                        dots[row] += i32::from(levels[column][row]) * i32::from(code);
                    }
                }
                let which = if spans == 1 { 1 } else { 2 + span };
                let negative_sum = i32::from_ne_bytes(word(which * tokens + token)) as f32;
                for row in 0..ROWS {
                    group_sums[row] += scales[span].0[row] * dots[row] as f32;
                    if F::CODING.scales.has_min() {
                        group_sums[row] -= scales[span].1[row] * negative_sum;
                    }
                }
            }
            for row in 0..ROWS {
                sums[token][row] += activation_scale * group_sums[row];
            }
        }
    }
}

/// Products of an f32 tile with a block of tokens.
pub(super) fn dense_f32(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense(tile, block, tokens, sums, f32::from_le_bytes);
}

/// Products of an f16 tile with a block of tokens.
pub(super) fn dense_f16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense(tile, block, tokens, sums, |bytes| f16::from_le_bytes(bytes).to_f32());
}

/// Products of a bf16 tile with a block of tokens.
pub(super) fn dense_bf16(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense(tile, block, tokens, sums, |bytes| bf16::from_le_bytes(bytes).to_f32());
}

/// Products of a tile of F8_E4M3 numbers with a block of tokens.
pub(super) fn dense_f8(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    dense(tile, block, tokens, sums, |[byte]| e4m3(byte));
}

/// Products of a tile of bf16 pairs with a block of tokens.
pub(super) fn pairs(tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
    sums[..tokens].fill([0.0; ROWS]);
    let weights = tile.codes.as_chunks::<4>().0.as_chunks::<ROWS>().0;
    for (weights, block) in weights.iter().zip(block.chunks_exact(tokens * 4)) {
        for (sums, &x) in sums.iter_mut().zip(block.as_chunks().0) {
            let x = pair(x);
            for (sum, &weights) in sums.iter_mut().zip(weights) {
                let weights = pair(weights);
                *sum += weights[0] * x[0];
                *sum += weights[1] * x[1];
            }
        }
    }
}

/// The numbers of a pair.
fn pair(bytes: [u8; 4]) -> [f32; 2] {
    let bits = u32::from_ne_bytes(bytes);
    [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
}

/// The weights of 32 columns of a tile of pairs; what is past its end is zero.
#[inline(always)]
pub(super) fn pair_weights(tile: &Tile<'_>, group: usize) -> [[f32; ROWS]; GROUP] {
    let mut weights = [[0.0; ROWS]; GROUP];
    let pairs = tile.codes.as_chunks::<4>().0.as_chunks::<ROWS>().0;
    let pairs = pairs.iter().skip(group * GROUP / 2);
    for (weights, pairs) in weights.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
        for (row, &bytes) in pairs.iter().enumerate() {
            [weights[0][row], weights[1][row]] = pair(bytes);
        }
    }
    weights
}

#[inline(always)]
fn dense<const N: usize>(
    tile: &Tile<'_>,
    block: &[u8],
    tokens: usize,
    sums: &mut Sums,
    convert: impl Fn([u8; N]) -> f32,
) {
    sums[..tokens].fill([0.0; ROWS]);
    let columns = tile.codes.as_chunks::<N>().0.as_chunks::<ROWS>().0;
    for (column, (weights, block)) in columns.iter().zip(block.chunks_exact(tokens * 4)).enumerate()
    {
        let mut weights = weights.map(&convert);
        if let Some(scales) = number_scales(tile, column) {
            weights = std::array::from_fn(|row| weights[row] * scales[row]);
        }
        for (sums, &x) in sums.iter_mut().zip(block.as_chunks().0) {
            let x = f32::from_ne_bytes(x);
            for row in 0..ROWS {
                sums[row] += weights[row] * x;
            }
        }
    }
}

/// What the numbers of a column of a dense tile are multiplied with to be the weights.
fn number_scales(tile: &Tile<'_>, column: usize) -> Option<[f32; ROWS]> {
    let (scales, _) = tile.scales.as_chunks::<4>().0.as_chunks::<ROWS>();
    (!scales.is_empty()).then(|| scales[column / tile.columns].map(f32::from_le_bytes))
}

/// The levels of a group minus their zero: `[column][row]`.
fn group_levels(coding: Coding, tile: &Tile<'_>, group: usize) -> [[i16; ROWS]; GROUP] {
    let level = |code: u8| if coding.lookup { tile.levels[usize::from(code)] } else { code };
    group_codes(coding, tile, group)
        .map(|codes| codes.map(|code| i16::from(level(code)) - i16::from(coding.zero)))
}

/// The codes of a group: `[column][row]`.
#[inline(always)]
fn group_codes(coding: Coding, tile: &Tile<'_>, group: usize) -> [[u8; ROWS]; GROUP] {
    let planes = &tile.codes[group * coding.group_bytes()..][..coding.group_bytes()];
    let (registers, _) = planes.as_chunks::<64>();
    let mut codes = [[0; ROWS]; GROUP];
    for column in 0..GROUP {
        let quad = column / 4;
        for row in 0..ROWS {
            let lane = row * 4 + column % 4;
            let nibble = || registers[quad % 4][lane] >> (quad / 4 * 4) & 15;
            let pair = |plane: usize| registers[plane + quad / 4][lane] >> (quad % 4 * 2) & 3;
            let bit = |plane: usize| registers[plane][lane] >> quad & 1;
            codes[column][row] = match coding.bits {
                8 => registers[quad][lane],
                6 => nibble() | pair(4) << 4,
                5 => nibble() | bit(4) << 4,
                4 => nibble(),
                3 => pair(0) | bit(2) << 2,
                _ => pair(0),
            };
        }
    }
    codes
}

/// Scales and minima (which are added) of the group's halves, the first being the whole group's
/// where halves share them.
#[inline(always)]
fn scales(coding: Coding, tile: &Tile<'_>, group: usize) -> [([f32; ROWS], [f32; ROWS]); 2] {
    let (start, position) = coding.scales.locate(group, tile.span_log());
    let record = &tile.scales[start..];
    let singles = |index: usize| -> [f32; ROWS] {
        let (singles, _) = record[index * 64..].as_chunks();
        std::array::from_fn(|row| f32::from_le_bytes(singles[row]))
    };
    let halves = |index: usize| -> [f32; ROWS] {
        let (halves, _) = record[index * 32..].as_chunks();
        std::array::from_fn(|row| f16::from_le_bytes(halves[row]).to_f32() * tile.factor)
    };
    let bytes = |start: usize| -> [f32; ROWS] {
        std::array::from_fn(|row| f32::from(record[start + row] as i8))
    };
    let times = |a: [f32; ROWS], b: [f32; ROWS]| -> [f32; ROWS] {
        std::array::from_fn(|row| a[row] * b[row])
    };
    let minus = |a: [f32; ROWS]| a.map(|v| -v);
    let none = [0.0; ROWS];
    match coding.scales {
        Scales::Group | Scales::Super => [(halves(0), none); 2],
        Scales::GroupBf16 => {
            let (values, _) = record.as_chunks();
            [(std::array::from_fn(|row| bf16::from_le_bytes(values[row]).to_f32()), none); 2]
        }
        Scales::GroupMin => [(halves(0), halves(1)); 2],
        Scales::Sub32 => [(times(halves(0), bytes(32 + position * 16)), none); 2],
        Scales::Sub32Min => {
            let place = 64 + position * 32;
            let min = minus(times(halves(1), bytes(place + 16)));
            [(times(halves(0), bytes(place)), min); 2]
        }
        Scales::Sub16 => {
            [0, 1].map(|half| (times(halves(0), bytes(32 + (position * 2 + half) * 16)), none))
        }
        Scales::Sub16Min => [0, 1].map(|half| {
            let place = 64 + (position * 2 + half) * 16;
            let nibbles = |shift: u32| -> [f32; ROWS] {
                std::array::from_fn(|row| f32::from(record[place + row] >> shift & 15))
            };
            (times(halves(0), nibbles(0)), minus(times(halves(1), nibbles(4))))
        }),
        Scales::Span => [(singles(0), none); 2],
        Scales::SpanMin => [(singles(0), singles(1)); 2],
        Scales::Halves => [0, 1].map(|half| (singles(half), none)),
        Scales::HalvesMin => [0, 1].map(|half| (singles(2 * half), singles(2 * half + 1))),
    }
}

/// The weights of a group: `[column][row]`.
#[inline(always)]
pub(super) fn group_weights(coding: Coding, tile: &Tile<'_>, group: usize) -> [[f32; ROWS]; GROUP] {
    let codes = group_codes(coding, tile, group);
    let scales = scales(coding, tile, group);
    std::array::from_fn(|column| {
        let (scale, min) = &scales[column / (GROUP / 2)];
        std::array::from_fn(|row| {
            scale[row] * exact_level(coding, tile, codes[column][row]) + min[row]
        })
    })
}

/// The level of a code minus the zero, as it is before products round it to an integer.
#[inline(always)]
fn exact_level(coding: Coding, tile: &Tile<'_>, code: u8) -> f32 {
    match coding.lookup {
        true => tile.table[usize::from(code)],
        false => f32::from(code) - f32::from(coding.zero),
    }
}

/// Reads row `lane` of a tile.
pub(super) fn read_row(layout: Layout, tile: &Tile<'_>, lane: usize, out: &mut [f32]) {
    struct Read<'a>(&'a Tile<'a>, usize, &'a mut [f32]);

    impl Visitor for Read<'_> {
        type Output = ();

        fn visit<F: Format>(self) {
            let Read(tile, lane, out) = self;
            for (group, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                let weights = group_weights(F::CODING, tile, group);
                for (out, weights) in out.iter_mut().zip(weights) {
                    *out = weights[lane];
                }
            }
        }
    }

    fn read<const N: usize>(
        tile: &Tile<'_>,
        lane: usize,
        out: &mut [f32],
        convert: impl Fn([u8; N]) -> f32,
    ) {
        let columns = tile.codes.as_chunks::<N>().0.as_chunks::<ROWS>().0;
        for (out, column) in out.iter_mut().zip(columns) {
            *out = convert(column[lane]);
        }
    }

    match layout {
        Layout::Integer(integer) => integer.visit(Read(tile, lane, out)),
        Layout::Dense(Dense::F32) => read(tile, lane, out, f32::from_le_bytes),
        Layout::Dense(Dense::F16) => read(tile, lane, out, |v| f16::from_le_bytes(v).to_f32()),
        Layout::Dense(Dense::Bf16) => read(tile, lane, out, |v| bf16::from_le_bytes(v).to_f32()),
        Layout::Dense(Dense::F8) => {
            read(tile, lane, out, |[byte]| e4m3(byte));
            for (column, out) in out.iter_mut().enumerate() {
                *out *= number_scales(tile, column).map_or(1.0, |scales| scales[lane]);
            }
        }
        Layout::Pairs => {
            let pairs = tile.codes.as_chunks::<4>().0.as_chunks::<ROWS>().0;
            for (out, &weights) in out.chunks_mut(2).zip(pairs) {
                out.copy_from_slice(&pair(weights[lane])[..out.len()]);
            }
        }
    }
}
