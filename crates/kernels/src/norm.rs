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

/// The gradient of [`rms_norm`]'s `x`, added to `d_x`, given that of its output, `d_out`; and that of its
/// weight added to `d_weight`, `[d]`, where it is wanted.
///
/// With r = 1 / √(mean(x²) + ε): ẋ = r · (w ẏ − x · r² · mean(w ẏ x)), ẇ = Σ ẏ x r over the rows.
///
/// # Panics
/// Where the lengths do not fit `n` and `d`.
pub fn rms_norm_backward(
    cpu: &Cpu,
    d_x: &mut [f32],
    d_weight: Option<&mut [f32]>,
    d_out: &[f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    n: usize,
    d: usize,
) {
    let lengths = (d_x.len(), d_out.len(), x.len(), weight.len());
    assert_eq!(lengths, (n * d, n * d, n * d, d), "rms_norm_backward: lengths");
    if d_x.is_empty() {
        return;
    }
    let chunk = TASK.div_ceil(d) * d;
    if let Some(d_weight) = d_weight {
        assert_eq!(d_weight.len(), d, "rms_norm_backward: length of d_weight");
        // A sum for each task, so that the order does not depend on threads.
        let mut sums = vec![0.0f32; (n * d).div_ceil(chunk) * d];
        cpu.pool().run_chunks(&mut sums, d, |i, sums| {
            let rows = i * chunk..(n * d).min((i + 1) * chunk);
            for (x, d_out) in x[rows.clone()].chunks_exact(d).zip(d_out[rows].chunks_exact(d)) {
                let scale = inverse_rms(cpu.isa(), x, eps);
                add_weight_gradient(cpu.isa(), sums, d_out, x, scale);
            }
        });
        for sums in sums.chunks_exact(d) {
            d_weight.iter_mut().zip(sums).for_each(|(d_weight, sum)| *d_weight += sum);
        }
    }
    cpu.pool().run_chunks(d_x, chunk, |i, d_x| {
        let (start, len) = (i * chunk, d_x.len());
        let rows = x[start..][..len].chunks_exact(d).zip(d_out[start..][..len].chunks_exact(d));
        for (d_x, (x, d_out)) in d_x.chunks_exact_mut(d).zip(rows) {
            let scale = inverse_rms(cpu.isa(), x, eps);
            add_input_gradient(cpu.isa(), d_x, d_out, x, weight, scale);
        }
    });
}

for_each_isa! {
    fn add_weight_gradient(sums: &mut [f32], d_out: &[f32], x: &[f32], scale: f32) {
        for ((sum, &d_out), &x) in sums.iter_mut().zip(d_out).zip(x) {
            *sum += d_out * (x * scale);
        }
    }

    fn add_input_gradient(
        d_x: &mut [f32],
        d_out: &[f32],
        x: &[f32],
        weight: &[f32],
        scale: f32,
    ) {
        let mut lanes = [0.0f32; LANES];
        for (i, ((&d_out, &x), &weight)) in d_out.iter().zip(x).zip(weight).enumerate() {
            lanes[i % LANES] += d_out * weight * x;
        }
        let share = sum_lanes(lanes) / x.len() as f32 * scale * scale;
        for (((d_x, &d_out), &x), &weight) in d_x.iter_mut().zip(d_out).zip(x).zip(weight) {
            *d_x += scale * (weight * d_out - x * share);
        }
    }

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
