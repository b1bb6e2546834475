//! The choice of a kernel for a layout and an instruction set.

use super::activations::TOKENS;
use super::layout::{Dense, Format, Layout, ROWS, Visitor};
use super::packed::Tile;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::Isa;

/// The products of a tile with a block of tokens: `[token][row]`.
pub(super) type Sums = [[f32; ROWS]; TOKENS];

/// Multiplies a tile with a block of 8, 4, 2 or 1 tokens.
///
/// # Safety
/// The processor has the instruction set the function is for, the tile and the block (laid out as
/// in `activations.rs`) are those of the same number of columns.
type Function = unsafe fn(&Tile<'_>, &[u8], usize, &mut Sums);

/// A [`Function`] chosen for an instruction set the processor has.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    function: Function,
    layout: Layout,
}

impl Kernel {
    /// The kernel of a layout.
    pub(super) fn select(layout: Layout, isa: Isa) -> Self {
        let function = match layout {
            Layout::Dense(dense) => dense_function(dense, isa),
            Layout::Integer(integer) => integer.visit(Select(isa)),
        };
        Self { function, layout }
    }

    /// Multiplies `tile` with the `tokens` tokens of `block` into the first rows of `sums`.
    pub(super) fn run(&self, tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
        let (codes, scales) = self.layout.tile_bytes(tile.cols);
        let token_bytes = match self.layout {
            Layout::Dense(_) => tile.cols * 4,
            Layout::Integer(_) => tile.cols / super::GROUP * super::GROUP_BYTES,
        };
        assert!(
            tile.codes.len() == codes
                && tile.scales.len() == scales
                && matches!(tokens, 1 | 2 | 4 | 8)
                && block.len() == tokens * token_bytes
        );
        // SAFETY: `Cpu` holds an instruction set only where the processor has it; lengths were
        // checked just now.
        unsafe { (self.function)(tile, block, tokens, sums) }
    }
}

struct Select(Isa);

impl Visitor for Select {
    type Output = Function;

    fn visit<F: Format>(self) -> Function {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::integer::<F>,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::integer::<F>,
            _ => scalar::integer::<F>,
        }
    }
}

fn dense_function(dense: Dense, isa: Isa) -> Function {
    match (isa, dense) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Dense::F32) => avx512::dense_f32,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Dense::F16) => avx512::dense_f16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Dense::Bf16) => avx512::dense_bf16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Dense::F32) => avx2::dense_f32,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Dense::F16) => avx2::dense_f16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Dense::Bf16) => avx2::dense_bf16,
        (_, Dense::F32) => scalar::dense_f32,
        (_, Dense::F16) => scalar::dense_f16,
        (_, Dense::Bf16) => scalar::dense_bf16,
    }
}
