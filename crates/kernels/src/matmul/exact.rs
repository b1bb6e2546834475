//! Products of integer tiles with activations as they are, not rounded to int8: the weights of a group are
//! unpacked to single precision. For measuring what the rounding costs, and for those who want none of it.
//!
//! The body exists once, and every instruction set gives the same bits: products are neither fused with
//! additions nor reordered.

use super::kernels::{Panel, PanelFunction, Sums};
use super::layout::{Format, GROUP, Integer, ROWS, Visitor};
use super::packed::Tile;
use super::scalar::group_weights;
use crate::Isa;

/// The kernel of a format.
pub(super) fn select(format: Integer, isa: Isa) -> PanelFunction {
    format.visit(Select(isa))
}

struct Select(Isa);

impl Visitor for Select {
    type Output = PanelFunction;

    fn visit<F: Format>(self) -> PanelFunction {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => products_avx512::<F>,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => products_avx2::<F>,
            _ => products::<F>,
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn products_avx2<F: Format>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<F>(tile, panel, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn products_avx512<F: Format>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<F>(tile, panel, sums);
}

/// Products of an integer tile with the f32 tokens of a panel: Σ weight · x, column by column.
#[inline(always)]
fn products<F: Format>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    sums[..panel.tokens()].fill([0.0; ROWS]);
    for group in 0..tile.codes.len() / F::CODING.group_bytes() {
        let weights = group_weights(F::CODING, tile, group);
        for (first, tokens, block) in panel.blocks() {
            let x = &block[group * GROUP * tokens * 4..][..GROUP * tokens * 4];
            let sums = &mut sums[first..first + tokens];
            match tokens {
                8 => {
                    let (low, high) = sums.split_at_mut(4);
                    add::<8, 4>(&weights, x, 0, low);
                    add::<8, 4>(&weights, x, 4, high);
                }
                4 => add::<4, 4>(&weights, x, 0, sums),
                2 => add::<2, 2>(&weights, x, 0, sums),
                _ => add::<1, 1>(&weights, x, 0, sums),
            }
        }
    }
}

/// Adds a group's products with tokens `first .. first + N` of a block of `T`.
#[inline(always)]
fn add<const T: usize, const N: usize>(
    weights: &[[f32; ROWS]; GROUP],
    x: &[u8],
    first: usize,
    sums: &mut Sums,
) {
    let mut totals: [[f32; ROWS]; N] = std::array::from_fn(|t| sums[t]);
    let columns = x.as_chunks::<4>().0.as_chunks::<T>().0;
    for (weights, x) in weights.iter().zip(columns) {
        for (t, total) in totals.iter_mut().enumerate() {
            let x = f32::from_ne_bytes(x[first + t]);
            for row in 0..ROWS {
                total[row] += weights[row] * x;
            }
        }
    }
    sums[..N].copy_from_slice(&totals);
}
