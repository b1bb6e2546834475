//! Products with activations as they are, rounded neither to int8 nor to bf16: weights are unpacked to single
//! precision. For measuring what the rounding costs, and for those who want none of it.
//!
//! The body exists once, and every instruction set gives the same bits: products are neither fused with
//! additions nor reordered.

use super::kernels::{Panel, PanelFunction, Sums};
use super::layout::{Format, GROUP, Integer, ROWS, Visitor};
use super::packed::Tile;
use super::scalar::{group_weights, pair_weights};
use crate::Isa;

/// The kernel of a format.
pub(super) fn integer(format: Integer, isa: Isa) -> PanelFunction {
    struct Select(Isa);

    impl Visitor for Select {
        type Output = PanelFunction;

        fn visit<F: Format>(self) -> PanelFunction {
            select::<Levels<F>>(self.0)
        }
    }

    format.visit(Select(isa))
}

/// The kernel of tiles of bf16 pairs.
pub(super) fn pairs(isa: Isa) -> PanelFunction {
    select::<Pairs>(isa)
}

/// Weights of a layout in single precision.
trait Weights {
    /// 32 columns of a tile; what is past its end is zero.
    fn group(tile: &Tile<'_>, group: usize) -> [[f32; ROWS]; GROUP];
}

struct Levels<F>(std::marker::PhantomData<F>);

impl<F: Format> Weights for Levels<F> {
    #[inline(always)]
    fn group(tile: &Tile<'_>, group: usize) -> [[f32; ROWS]; GROUP] {
        group_weights(F::CODING, tile, group)
    }
}

struct Pairs;

impl Weights for Pairs {
    #[inline(always)]
    fn group(tile: &Tile<'_>, group: usize) -> [[f32; ROWS]; GROUP] {
        pair_weights(tile, group)
    }
}

fn select<W: Weights>(isa: Isa) -> PanelFunction {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => products_avx512::<W>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => products_avx2::<W>,
        _ => products::<W>,
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn products_avx2<W: Weights>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<W>(tile, panel, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn products_avx512<W: Weights>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    products::<W>(tile, panel, sums);
}

/// Products of a tile with the f32 tokens of a panel: Σ weight · x, column by column.
#[inline(always)]
fn products<W: Weights>(tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
    sums[..panel.tokens()].fill([0.0; ROWS]);
    for group in 0..panel.columns().div_ceil(GROUP) {
        let weights = W::group(tile, group);
        for (first, tokens, block) in panel.blocks() {
            let x = block.chunks(GROUP * tokens * 4).nth(group).unwrap_or_default();
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
