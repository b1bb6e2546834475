//! The arithmetic of a decoder, one whole-tensor operation a function. Scalar code is the
//! specification; faster instruction sets are chosen at run time.

mod cpu;
mod isa;

pub use cpu::Cpu;
pub use isa::Isa;
