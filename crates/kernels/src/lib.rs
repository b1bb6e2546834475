//! The arithmetic of a decoder, one whole-tensor operation a function. Scalar code is the
//! specification; faster instruction sets are chosen at run time.

mod activation;
mod attention;
mod cpu;
mod cross_entropy;
mod dispatch;
mod divergence;
mod elementwise;
mod error;
mod hadamard;
mod isa;
mod kv;
pub mod limits;
pub mod linalg;
mod math;
pub mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
mod norm;
mod rope;
mod softmax;
mod wide;

pub use activation::{
    gelu_erf_mul, gelu_erf_mul_backward, gelu_tanh_mul, gelu_tanh_mul_backward, silu_mul,
    silu_mul_backward,
};
pub use attention::{
    Attended, AttentionGradients, AttentionScratch, AttentionSpec, SequenceSpan, TREE_QUERIES,
    attention, attention_backward, attention_tree, depth_in_tree,
};
pub use cpu::Cpu;
pub use cross_entropy::cross_entropy;
pub use divergence::{RowDivergence, kl_divergence, log_sum_exp};
pub use elementwise::{add, add_bias, add_scaled, scale, softcap, softcap_backward};
pub use error::{Error, Result};
pub use isa::Isa;
pub use kv::{BLOCK_TOKENS, KvPool, KvShape, KvType, Slot};
pub use matmul::{PackedMatrix, Product, Scratch, matmul, matmul_add};
pub use norm::{rms_norm, rms_norm_backward, rms_norm_in_place};
pub use rope::{RopeSpec, RopeStyle, RopeTable, rope, rope_backward};
pub use softmax::softmax;
pub use wide::{Wide, run_wide};
