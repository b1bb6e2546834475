//! Gated activations of the feed-forward layer: `out = activation(gate) · up`, element by element.
//! All give the same bits on every instruction set.

use crate::dispatch::for_each_isa;
use crate::elementwise::TASK;
use crate::math::{exp, normal_cdf, sigmoid};
use crate::{Cpu, Isa};

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

/// Gradients of [`silu_mul`]'s `gate` and `up`, given that of its output.
///
/// # Panics
/// Where the lengths differ.
pub fn silu_mul_backward(
    cpu: &Cpu,
    d_gate: &mut [f32],
    d_up: &mut [f32],
    d_out: &[f32],
    gate: &[f32],
    up: &[f32],
) {
    in_pairs(cpu, d_gate, d_up, [d_out, gate, up], silu_mul_backward_body);
}

/// Gradients of [`gelu_tanh_mul`]'s `gate` and `up`, given that of its output.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_tanh_mul_backward(
    cpu: &Cpu,
    d_gate: &mut [f32],
    d_up: &mut [f32],
    d_out: &[f32],
    gate: &[f32],
    up: &[f32],
) {
    in_pairs(cpu, d_gate, d_up, [d_out, gate, up], gelu_tanh_mul_backward_body);
}

/// Gradients of [`gelu_erf_mul`]'s `gate` and `up`, given that of its output.
///
/// # Panics
/// Where the lengths differ.
pub fn gelu_erf_mul_backward(
    cpu: &Cpu,
    d_gate: &mut [f32],
    d_up: &mut [f32],
    d_out: &[f32],
    gate: &[f32],
    up: &[f32],
) {
    in_pairs(cpu, d_gate, d_up, [d_out, gate, up], gelu_erf_mul_backward_body);
}

type Pairs = fn(Isa, &mut [f32], &mut [f32], &[f32], &[f32], &[f32]);

/// Runs `body` on pieces of two outputs and three inputs that lie at the same place.
fn in_pairs(cpu: &Cpu, a: &mut [f32], b: &mut [f32], inputs: [&[f32]; 3], body: Pairs) {
    assert_eq!([a.len(); 4], [b.len(), inputs[0].len(), inputs[1].len(), inputs[2].len()]);
    let mut parts: Vec<_> = a.chunks_mut(TASK).zip(b.chunks_mut(TASK)).collect();
    cpu.pool().run_chunks(&mut parts, 1, |i, part| {
        let (a, b) = &mut part[0];
        let [x, y, z] = inputs.map(|input| &input[i * TASK..][..a.len()]);
        body(cpu.isa(), a, b, x, y, z);
    });
}

for_each_isa! {
    fn silu_mul_backward_body(
        d_gate: &mut [f32],
        d_up: &mut [f32],
        d_out: &[f32],
        gate: &[f32],
        up: &[f32],
    ) {
        for i in 0..d_gate.len() {
            let s = sigmoid(gate[i]);
            d_gate[i] = d_out[i] * up[i] * (s + gate[i] * s * (1.0 - s));
            d_up[i] = d_out[i] * (gate[i] * s);
        }
    }

    fn gelu_tanh_mul_backward_body(
        d_gate: &mut [f32],
        d_up: &mut [f32],
        d_out: &[f32],
        gate: &[f32],
        up: &[f32],
    ) {
        const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
        for i in 0..d_gate.len() {
            let x = gate[i];
            let s = sigmoid(TWICE_SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x));
            let slope = TWICE_SQRT_2_OVER_PI * (1.0 + 0.134_145 * x * x);
            d_gate[i] = d_out[i] * up[i] * (s + x * s * (1.0 - s) * slope);
            d_up[i] = d_out[i] * (x * s);
        }
    }

    fn gelu_erf_mul_backward_body(
        d_gate: &mut [f32],
        d_up: &mut [f32],
        d_out: &[f32],
        gate: &[f32],
        up: &[f32],
    ) {
        const INVERSE_SQRT_2_PI: f32 = 0.398_942_3;
        for i in 0..d_gate.len() {
            let (x, p) = (gate[i], normal_cdf(gate[i]));
            let density = INVERSE_SQRT_2_PI * exp(-0.5 * x * x);
            d_gate[i] = d_out[i] * up[i] * (p + x * density);
            d_up[i] = d_out[i] * (x * p);
        }
    }

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
