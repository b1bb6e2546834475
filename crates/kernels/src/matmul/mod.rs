//! Matrix products with packed weights.
//!
//! A file's blocks are repacked at load into a few tile layouts ([`PackedMatrix`], diagrams in
//! `layout.rs`); a new file format is a repacker, not a kernel. Products with dense weights use f32
//! activations, or bf16 ones where that is asked for ([`Packing`], [`PackedMatrix::pack_bf16`]). Products with integer weights use activations rounded to int8 in groups of 32
//! columns, once for all matrices that share an input; or, exactly, activations as they are
//! ([`PackedMatrix::with_exact_products`]).
//!
//! Each output value is computed by one task in an order of operations that depends neither on the
//! number of threads nor on the other tokens of the batch.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bytes;
mod exact;
mod grouped;
mod kernels;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod scalar;

pub use activations::Scratch;
pub use grouped::sort_columns;
pub use packed::{Factors, PackedMatrix, Packing};

use activations::TOKENS;
use kernels::{PANEL_TOKENS, Panel};
use layout::{Inputs, ROWS};

use crate::Cpu;

/// One of the products of a [`matmul`].
#[derive(Debug)]
pub struct Product<'a> {
    /// `[rows, cols]`.
    pub weight: &'a PackedMatrix,
    /// `[n, rows]`: what the product is written to.
    pub out: &'a mut [f32],
}

/// Where tasks write a product's outputs.
struct Output(*mut f32);

// SAFETY: tasks write disjoint values, while `matmul` holds the buffer borrowed.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Bytes of weights that a task multiplies with all tokens before it goes on: about what stays in a
/// core's second-level cache beside the activations.
const TASK_BYTES: usize = 256 << 10;
/// Bytes of activations that a task walks through for each tile.
const PANEL_BYTES: usize = 256 << 10;

/// Bytes of weights, times tokens, that are multiplied sooner than other threads can be told to help.
const ALONE_BYTES: usize = 32 << 10;

/// `out = x · weightᵀ` for matrices that share the input `x` (`[n, cols]`): the queries, keys and
/// values of a layer, the gate and up projections. One fork-join.
///
/// # Panics
/// Where a length does not fit: `x.len() != n * cols`, a matrix has other columns, or
/// `out.len() != n * rows`.
pub fn matmul(cpu: &Cpu, x: &[f32], n: usize, products: &mut [Product<'_>], scratch: &mut Scratch) {
    multiply_all(cpu, x, n, products, None, scratch);
}

/// `out += factor · x · weightᵀ`, otherwise as [`matmul`].
///
/// # Panics
/// As [`matmul`].
pub fn matmul_add(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    products: &mut [Product<'_>],
    factor: f32,
    scratch: &mut Scratch,
) {
    multiply_all(cpu, x, n, products, Some(factor), scratch);
}

/// The products, in the place of what there was, or, times a factor, added to it.
fn multiply_all(
    cpu: &Cpu,
    x: &[f32],
    n: usize,
    products: &mut [Product<'_>],
    added: Option<f32>,
    scratch: &mut Scratch,
) {
    let Some(cols) = products.first().map(|product| product.weight.cols()) else { return };
    assert_eq!(x.len(), n * cols, "length of the input of {n} tokens");
    for Product { weight, out } in &*products {
        assert_eq!(weight.cols(), cols, "columns of {weight:?}");
        assert_eq!(out.len(), n * weight.rows(), "length of the output of {weight:?}");
    }
    if n == 0 || cols == 0 {
        if added.is_none() {
            products.iter_mut().for_each(|product| product.out.fill(0.0));
        }
        return;
    }

    let any = |inputs: Inputs| products.iter().any(|product| product.weight.inputs() == inputs);
    let mut int8 = 0;
    if any(Inputs::Int8) {
        int8 = activations::quantize(cpu, x, n, cols, &mut scratch.int8);
    }
    let mut bf16 = 0;
    if any(Inputs::Bf16) {
        bf16 = activations::round_to_bf16(cpu, x, n, cols, &mut scratch.bf16);
    }
    // A single token's values already lie as kernels read them.
    let mut f32 = 0;
    if n > 1 && any(Inputs::F32) {
        f32 = activations::interleave(cpu, x, n, cols, &mut scratch.f32);
    }
    scratch.outputs.clear();
    scratch.outputs.extend(products.iter_mut().map(|product| Output(product.out.as_mut_ptr())));

    let (int8, bf16) = (scratch.int8.get(int8), scratch.bf16.get(bf16));
    let f32 = if n > 1 { scratch.f32.get(f32) } else { bytemuck::cast_slice(x) };
    let (outputs, products) = (&scratch.outputs, &*products);

    let tiles: usize = products.iter().map(|product| product.weight.tiles()).sum();
    let bytes: usize = products.iter().map(|p| p.weight.tiles() * p.weight.tile_bytes()).sum();
    let threads = cpu.pool().threads();
    let task_tiles = if bytes * n < ALONE_BYTES || (threads == 1 && n == 1) {
        tiles.max(1)
    } else {
        // Small tasks even out threads of unequal speed.
        (tiles * TASK_BYTES / bytes).min(tiles / (threads * 8)).max(1)
    };

    cpu.pool().run(tiles.div_ceil(task_tiles), |task| {
        let (mut tile, end) = (task * task_tiles, tiles.min((task + 1) * task_tiles));
        let mut first = 0; // tile of the current product
        for (product, output) in products.iter().zip(outputs) {
            let last = first + product.weight.tiles();
            if tile < end.min(last) {
                let range = tile - first..end.min(last) - first;
                let activations = match product.weight.inputs() {
                    Inputs::Int8 => int8,
                    Inputs::Bf16 => bf16,
                    Inputs::F32 => f32,
                };
                // SAFETY: the range lies inside the product, whose output holds `n` rows; no other
                // task has these tiles.
                unsafe { multiply(cpu, product.weight, range, activations, n, added, output) };
                tile = end.min(last);
            }
            first = last;
        }
    });
}

/// Multiplies some tiles with all tokens.
///
/// # Safety
/// `output` points to `[n, rows]` values that nobody else accesses in the columns of `tiles`.
unsafe fn multiply(
    cpu: &Cpu,
    weight: &PackedMatrix,
    tiles: std::ops::Range<usize>,
    activations: &[u8],
    n: usize,
    added: Option<f32>,
    output: &Output,
) {
    let kernel = weight.kernel(cpu);
    let (cols, rows) = (weight.cols(), weight.rows());
    let token_bytes = weight.inputs().bytes(cols);
    let panel = (PANEL_BYTES / token_bytes / TOKENS * TOKENS).clamp(TOKENS, PANEL_TOKENS);
    let mut sums = [[0.0; ROWS]; PANEL_TOKENS];
    for start in (0..n).step_by(panel) {
        let tokens = panel.min(n - start);
        let activations = &activations[start * token_bytes..][..tokens * token_bytes];
        for index in tiles.clone() {
            kernel.run(&weight.tile(index), Panel::new(activations, tokens), &mut sums);
            let (row, width) = (index * ROWS, ROWS.min(rows - index * ROWS));
            for (i, sums) in sums[..tokens].iter().enumerate() {
                // SAFETY: row `row .. row + width` of token `start + i` lies inside the output, and no
                // other task writes it.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(output.0.add((start + i) * rows + row), width)
                };
                match (added, out.first_chunk_mut()) {
                    (None, Some(out)) => *out = *sums,
                    (None, None) => out.copy_from_slice(&sums[..width]),
                    (Some(factor), _) => {
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += factor * *sum);
                    }
                }
            }
        }
    }
}
