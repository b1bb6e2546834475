//! Root mean square layer normalization (arXiv 1910.07467): y = w · x / √(mean(x²) + ε).
//! Gives the same bits on every instruction set.

use crate::Cpu;
use crate::dispatch::for_each_isa;
use crate::elementwise::TASK;
use crate::math::{LANES, sum_lanes};

/// `out[i] = weight · x[i] / √(mean(x[i]²) + eps)` for each of the `n` rows of `x` (`[n, d]`).
///
/// # Panics
/// Where the lengths do not fit `n` and `d`.
pub fn rms_norm(
    cpu: &Cpu,
    out: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    n: usize,
    d: usize,
) {
    assert_eq!((out.len(), x.len(), weight.len()), (n * d, n * d, d), "rms_norm: lengths");
    if out.is_empty() {
        return;
    }
    let chunk = TASK.div_ceil(d) * d;
    cpu.pool().run_chunks(out, chunk, |i, out| {
        let x = &x[i * chunk..][..out.len()];
        for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            let scale = inverse_rms(cpu.isa(), x, eps);
            scale_into(cpu.isa(), out, x, weight, scale);
        }
    });
}

/// [`rms_norm`] with the result in the place of `x`: with `n` = tokens · heads and `d` = `head_dim`
/// it is the norm that Qwen 3, Gemma 3 and OLMo 2 apply to queries and keys.
///
/// # Panics
/// Where the lengths do not fit `n` and `d`.
pub fn rms_norm_in_place(cpu: &Cpu, x: &mut [f32], weight: &[f32], eps: f32, n: usize, d: usize) {
    assert_eq!((x.len(), weight.len()), (n * d, d), "rms_norm_in_place: lengths");
    if x.is_empty() {
        return;
    }
    let chunk = TASK.div_ceil(d) * d;
    cpu.pool().run_chunks(x, chunk, |_, part| {
        for row in part.chunks_exact_mut(d) {
            let scale = inverse_rms(cpu.isa(), row, eps);
            scale_in_place(cpu.isa(), row, weight, scale);
        }
    });
}

for_each_isa! {
    /// 1 / √(mean(x²) + eps).
    fn inverse_rms(x: &[f32], eps: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for part in whole {
            for j in 0..LANES {
                lanes[j] += part[j] * part[j];
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += x * x;
        }
        1.0 / (sum_lanes(lanes) / x.len() as f32 + eps).sqrt()
    }

    fn scale_into(out: &mut [f32], x: &[f32], weight: &[f32], scale: f32) {
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }

    fn scale_in_place(x: &mut [f32], weight: &[f32], scale: f32) {
        for (x, &weight) in x.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }
}
