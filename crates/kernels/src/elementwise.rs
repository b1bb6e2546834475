//! Operations that treat every element alike. All give the same bits on every instruction set.

use crate::dispatch::for_each_isa;
use crate::math::tanh;
use crate::{Cpu, Isa};

/// Elements that are worth a thread of their own: some 10 µs of work.
pub(crate) const TASK: usize = 16 * 1024;

/// `x += y`.
///
/// # Panics
/// Where the lengths differ.
pub fn add(cpu: &Cpu, x: &mut [f32], y: &[f32]) {
    in_tasks(cpu, x, y, add_body);
}

/// `x += factor · y`.
///
/// # Panics
/// Where the lengths differ.
pub fn add_scaled(cpu: &Cpu, x: &mut [f32], y: &[f32], factor: f32) {
    in_tasks(cpu, x, y, |isa, x, y| add_scaled_body(isa, x, y, factor));
}

/// `x *= factor`.
pub fn scale(cpu: &Cpu, x: &mut [f32], factor: f32) {
    cpu.pool().run_chunks(x, TASK, |_, part| scale_body(cpu.isa(), part, factor));
}

/// `x = cap · tanh(x / cap)`: Gemma 2's soft cap on logits.
pub fn softcap(cpu: &Cpu, x: &mut [f32], cap: f32) {
    cpu.pool().run_chunks(x, TASK, |_, part| softcap_body(cpu.isa(), part, cap));
}

/// The gradient of [`softcap`]'s input in the place of that of its output, `d_x`, given the output `y`.
///
/// # Panics
/// Where the lengths differ.
pub fn softcap_backward(cpu: &Cpu, d_x: &mut [f32], y: &[f32], cap: f32) {
    in_tasks(cpu, d_x, y, |isa, d_x, y| softcap_backward_body(isa, d_x, y, cap));
}

/// Adds `bias` (`[d]`) to each row of `x` (`[n, d]`).
///
/// # Panics
/// Where the lengths do not fit `n` and `d`.
pub fn add_bias(cpu: &Cpu, x: &mut [f32], bias: &[f32], n: usize, d: usize) {
    assert_eq!((x.len(), bias.len()), (n * d, d), "add_bias: lengths of x and bias");
    if x.is_empty() {
        return;
    }
    let rows = TASK.div_ceil(d);
    cpu.pool().run_chunks(x, rows * d, |_, part| {
        for row in part.chunks_exact_mut(d) {
            add_body(cpu.isa(), row, bias);
        }
    });
}

/// Runs `body` on pieces of `x` and `y` that lie at the same place, in parallel where it pays.
pub(crate) fn in_tasks(
    cpu: &Cpu,
    x: &mut [f32],
    y: &[f32],
    body: impl Fn(Isa, &mut [f32], &[f32]) + Sync,
) {
    assert_eq!(x.len(), y.len(), "operands of different lengths");
    cpu.pool().run_chunks(x, TASK, |i, part| {
        body(cpu.isa(), part, &y[i * TASK..][..part.len()]);
    });
}

for_each_isa! {
    fn add_body(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }

    fn add_scaled_body(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += factor * y;
        }
    }

    fn scale_body(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    fn softcap_backward_body(d_x: &mut [f32], y: &[f32], cap: f32) {
        let inverse = 1.0 / cap;
        for (d_x, y) in d_x.iter_mut().zip(y) {
            let bent = y * inverse;
            *d_x *= 1.0 - bent * bent;
        }
    }

    fn softcap_body(x: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for x in x {
            *x = cap * tanh(*x * inverse);
        }
    }
}
