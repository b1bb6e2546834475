//! The choice of a kernel for a layout and an instruction set.

use super::activations::TOKENS;
use super::layout::{Dense, Float, Format, Layout, ROWS, Visitor};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::packed::Tile;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, bytes};
use crate::{Cpu, Isa};

/// The products of a tile with a block of tokens: `[token][row]`.
pub(super) type Sums = [[f32; ROWS]; TOKENS];

/// Multiplies a tile with a block of 8, 4, 2 or 1 tokens (laid out as in `activations.rs`) into the
/// first rows of the sums. Tile and block are those of the same number of columns.
///
/// # Safety
/// The processor has the instruction set the function is for.
type Function = unsafe fn(&Tile<'_>, &[u8], usize, &mut Sums);

/// A [`Function`] chosen for an instruction set the processor has.
#[derive(Clone, Copy)]
pub(super) struct Kernel(Function);

impl Kernel {
    /// The kernel of a layout on this processor.
    pub(super) fn select(layout: Layout, cpu: &Cpu) -> Self {
        Self(match layout {
            Layout::Dense(dense) => dense_function(dense, cpu.isa()),
            Layout::Pairs => match cpu.isa() {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 => avx512::pairs,
                _ => scalar::pairs,
            },
            Layout::Integer(integer) => integer.visit(Select(cpu.isa())),
            Layout::Float(float) => float_function(float, cpu.isa()),
        })
    }

    /// Calls the function.
    pub(super) fn run(self, tile: &Tile<'_>, block: &[u8], tokens: usize, sums: &mut Sums) {
        // SAFETY: `Cpu` holds an instruction set only where the processor has it.
        unsafe { (self.0)(tile, block, tokens, sums) }
    }
}

struct Select(Isa);

impl Visitor for Select {
    type Output = Function;

    fn visit<F: Format>(self) -> Function {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => avx512::integer::<F>,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::integer::<F, bytes::Twos>,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni if crate::isa::has_vex_vnni() => avx2::integer::<F, bytes::Vex>,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx2::integer::<F, bytes::Evex>,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::integer::<F>,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => neon::integer_dot::<F>,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => neon::integer_i8mm::<F>,
            _ => scalar::integer::<F>,
        }
    }
}

fn dense_function(dense: Dense, isa: Isa) -> Function {
    match (isa, dense) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Dense::F32) => avx512::dense_f32,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Dense::F16) => avx512::dense_f16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Dense::Bf16) => avx512::dense_bf16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Dense::F32) => avx2::dense_f32,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Dense::F16) => avx2::dense_f16,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Dense::Bf16) => avx2::dense_bf16,
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Dense::F32) => neon::dense_f32,
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Dense::F16) => neon::dense_f16,
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Dense::Bf16) => neon::dense_bf16,
        (_, Dense::F32) => scalar::dense_f32,
        (_, Dense::F16) => scalar::dense_f16,
        (_, Dense::Bf16) => scalar::dense_bf16,
    }
}

fn float_function(float: Float, isa: Isa) -> Function {
    match (isa, float) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Float::Levels) => avx512::levels,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, Float::Float8) => avx512::float8,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Float::Levels) => avx2::levels,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Float::Float8) => avx2::float8,
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Float::Levels) => neon::levels,
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Float::Float8) => neon::float8,
        (_, Float::Levels) => scalar::levels,
        (_, Float::Float8) => scalar::float8,
    }
}
