//! Gated activations of the feed-forward layer: `out = activation(gate) · up`, element by element.
//! All give the same bits on every instruction set.

use crate::Cpu;
use crate::dispatch::for_each_isa;
use crate::elementwise::TASK;
use crate::math::{normal_cdf, sigmoid};

/// `out = silu(gate) · up` with silu(x) = x / (1 + e⁻ˣ): Llama, Mistral, Qwen.
///
/// # Panics
/// Where the lengths differ.
pub fn silu_mul(cpu: &Cpu, out: &mut [f32], gate: &[f32], up: &[f32]) {
    assert_eq!((out.len(), out.len()), (gate.len(), up.len()), "silu_mul: lengths");
    cpu.pool().run_chunks(out, TASK, |i, part| {
        let (start, len) = (i * TASK, part.len());
        silu_mul_body(cpu.isa(), part, &gate[start..][..len], &up[start..][..len]);
    });
}

/// `out = gelu(gate) · up` with the tanh form of gelu: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
/// Gemma's `gelu_pytorch_tanh`.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_tanh_mul(cpu: &Cpu, out: &mut [f32], gate: &[f32], up: &[f32]) {
    assert_eq!((out.len(), out.len()), (gate.len(), up.len()), "gelu_tanh_mul: lengths");
    cpu.pool().run_chunks(out, TASK, |i, part| {
        let (start, len) = (i * TASK, part.len());
        gelu_tanh_mul_body(cpu.isa(), part, &gate[start..][..len], &up[start..][..len]);
    });
}

/// `out = gelu(gate) · up` with the exact gelu(x) = x · Φ(x).
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_erf_mul(cpu: &Cpu, out: &mut [f32], gate: &[f32], up: &[f32]) {
    assert_eq!((out.len(), out.len()), (gate.len(), up.len()), "gelu_erf_mul: lengths");
    cpu.pool().run_chunks(out, TASK, |i, part| {
        let (start, len) = (i * TASK, part.len());
        gelu_erf_mul_body(cpu.isa(), part, &gate[start..][..len], &up[start..][..len]);
    });
}

for_each_isa! {
    fn silu_mul_body(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(gate) * up;
        }
    }

    fn gelu_tanh_mul_body(out: &mut [f32], gate: &[f32], up: &[f32]) {
        // (1 + tanh u) / 2 = 1 / (1 + e^(-2u)): no cancellation where tanh u is near -1.
        const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
        for ((out, &x), &up) in out.iter_mut().zip(gate).zip(up) {
            let u = TWICE_SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
            *out = x * sigmoid(u) * up;
        }
    }

    fn gelu_erf_mul_body(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, &x), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = x * normal_cdf(x) * up;
        }
    }
}
