//! The choice of a kernel for a layout and an instruction set.

use super::activations::block_tokens;
use super::layout::{Dense, Format, Layout, ROWS, Visitor};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::packed::Tile;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, bytes};
use super::{exact, scalar};
use crate::{Cpu, Isa};

/// The products of a tile with some tokens: `[token][row]`.
pub(super) type Sums = [[f32; ROWS]];

/// Multiplies a tile with a block of 8, 4, 2 or 1 tokens (laid out as in `activations.rs`). Tile and
/// block are those of the same number of columns.
///
/// # Safety
/// The processor has the instruction set the function is for.
type BlockFunction = unsafe fn(&Tile<'_>, &[u8], usize, &mut Sums);

/// Multiplies a tile with all tokens of a panel, as a [`BlockFunction`] does with each block.
///
/// # Safety
/// That of a [`BlockFunction`].
pub(super) type PanelFunction = unsafe fn(&Tile<'_>, Panel<'_>, &mut Sums);

/// A function chosen for an instruction set the processor has.
#[derive(Clone, Copy)]
enum Function {
    Block(BlockFunction),
    Panel(PanelFunction),
}

/// How a layout is multiplied on a processor.
#[derive(Clone, Copy)]
pub(super) struct Kernel(Function);

/// Consecutive tokens, the first of which begins a block.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// The blocks of the tokens.
    activations: &'a [u8],
    tokens: usize,
}

/// The most tokens of a panel.
pub(super) const PANEL_TOKENS: usize = 128;

impl<'a> Panel<'a> {
    pub(super) fn new(activations: &'a [u8], tokens: usize) -> Self {
        Self { activations, tokens }
    }

    pub(super) fn tokens(self) -> usize {
        self.tokens
    }

    /// Values of a token, where they are in single precision.
    pub(super) fn columns(self) -> usize {
        self.activations.len() / self.tokens / 4
    }

    /// Each block with its first token's number in the panel and its number of tokens.
    pub(super) fn blocks(self) -> impl Iterator<Item = (usize, usize, &'a [u8])> {
        let token_bytes = self.activations.len() / self.tokens;
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = next;
            let tokens = if first < self.tokens { block_tokens(first, self.tokens) } else { 0 };
            next += tokens;
            let block = &self.activations[first * token_bytes..][..tokens * token_bytes];
            (tokens > 0).then_some((first, tokens, block))
        })
    }
}

impl Kernel {
    /// The kernel of a layout on this processor: one for activations as they are, where `exact`.
    pub(super) fn select(layout: Layout, exact: bool, cpu: &Cpu) -> Self {
        let isa = cpu.isa();
        Self(match layout {
            Layout::Integer(integer) if exact => Function::Panel(exact::integer(integer, isa)),
            Layout::Pairs if exact => Function::Panel(exact::pairs(isa)),
            Layout::Dense(dense) => dense_function(dense, isa),
            Layout::Pairs => Function::Block(match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 => avx512::pairs,
                _ => scalar::pairs,
            }),
            Layout::Integer(integer) => integer.visit(Select(isa)),
        })
    }

    /// Multiplies a tile with the tokens of a panel.
    pub(super) fn run(self, tile: &Tile<'_>, panel: Panel<'_>, sums: &mut Sums) {
        match self.0 {
            // SAFETY: `Cpu` holds an instruction set only where the processor has it.
            Function::Panel(function) => unsafe { function(tile, panel, sums) },
            Function::Block(function) => {
                for (first, tokens, block) in panel.blocks() {
                    // SAFETY: as above.
                    unsafe { function(tile, block, tokens, &mut sums[first..first + tokens]) };
                }
            }
        }
    }
}

struct Select(Isa);

impl Visitor for Select {
    type Output = Function;

    fn visit<F: Format>(self) -> Function {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => Function::Block(avx512::integer::<F>),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Function::Panel(avx2::integer::<F, bytes::Twos>),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni if crate::isa::has_vex_vnni() => {
                Function::Panel(avx2::integer::<F, bytes::Vex>)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Function::Panel(avx2::integer::<F, bytes::Evex>),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Function::Block(neon::integer::<F>),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => Function::Block(neon::integer_dot::<F>),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => Function::Block(neon::integer_i8mm::<F>),
            _ => Function::Block(scalar::integer::<F>),
        }
    }
}

fn dense_function(dense: Dense, isa: Isa) -> Function {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => Function::Block(match dense {
            Dense::F32 => avx512::dense_f32,
            Dense::F16 => avx512::dense_f16,
            Dense::Bf16 => avx512::dense_bf16,
            Dense::F8 => avx512::dense_f8,
        }),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => Function::Panel(match dense {
            Dense::F32 => avx2::dense_f32,
            Dense::F16 => avx2::dense_f16,
            Dense::Bf16 => avx2::dense_bf16,
            Dense::F8 => avx2::dense_f8,
        }),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => Function::Block(match dense {
            Dense::F32 => neon::dense_f32,
            Dense::F16 => neon::dense_f16,
            Dense::Bf16 => neon::dense_bf16,
            Dense::F8 => neon::dense_f8,
        }),
        _ => Function::Block(match dense {
            Dense::F32 => scalar::dense_f32,
            Dense::F16 => scalar::dense_f16,
            Dense::Bf16 => scalar::dense_bf16,
            Dense::F8 => scalar::dense_f8,
        }),
    }
}
