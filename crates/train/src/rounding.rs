//! Quantization-aware training: products see what weights become in few bits, and the gradients of that are taken for
//! those of the weights themselves (the straight-through estimator, arXiv 1308.3432).

use std::fmt::Debug;

use bevel_base::{DType, pack};
use bevel_kernels::Cpu;

/// What a matrix becomes where it is stored. A row depends on itself, and on one number of the whole matrix.
pub trait Rounding: Debug + Send + Sync {
    /// That number.
    fn scale(&self, values: &[f32]) -> f32 {
        let _ = values;
        1.0
    }

    /// Replaces a row by the numbers that its codes stand for.
    fn round(&self, scale: f32, row: &mut [f32]);

    /// Whether the type holds these numbers as they are, but would round others in another way: a matrix is then rounded
    /// before it is written.
    fn is_before_writing(&self) -> bool {
        false
    }

    /// Whether inputs of a layer are rounded too: to 8 bits, with a scale for each token.
    fn rounds_inputs(&self) -> bool {
        false
    }
}

/// Rounds rows to multiples of their largest magnitude / 127.
pub(crate) fn round_inputs(cpu: &Cpu, x: &mut [f32], cols: usize) {
    cpu.pool().run_chunks(x, cols, |_, row| {
        let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        if largest > 0.0 {
            let (per_step, step) = (127.0 / largest, largest / 127.0);
            row.iter_mut().for_each(|x| *x = (*x * per_step).round_ties_even() * step);
        }
    });
}

/// As a type of GGUF files has it.
#[derive(Clone, Copy, Debug)]
pub struct AsStored(pub DType);

impl Rounding for AsStored {
    fn round(&self, _: f32, row: &mut [f32]) {
        let Self(dtype) = *self;
        let mut bytes = vec![0; dtype.row_bytes(row.len()).unwrap_or(0)];
        let rounded = pack::quantize(dtype, row, None, &mut bytes)
            .and_then(|()| pack::dequantize(dtype, &bytes, row));
        // Numbers that are none become a loss that is none, which ends training with the step named.
        if rounded.is_err() {
            row.fill(f32::NAN);
        }
    }
}

/// −s, 0 and s, with s the mean of |w| over the matrix, which TQ1_0 and TQ2_0 hold as they are; inputs have 8 bits (BitNet
/// b1.58, arXiv 2402.17764).
#[derive(Clone, Copy, Debug)]
pub struct Ternary;

impl Rounding for Ternary {
    fn scale(&self, values: &[f32]) -> f32 {
        // In parts, so that the sum keeps its digits.
        let parts =
            values.chunks(4096).map(|part| f64::from(part.iter().map(|w| w.abs()).sum::<f32>()));
        let mean = parts.sum::<f64>() / values.len().max(1) as f64;
        // Files hold it as a half.
        half::f16::from_f64(mean).to_f32().max(f32::from(half::f16::MIN_POSITIVE))
    }

    fn round(&self, scale: f32, row: &mut [f32]) {
        let per_scale = 1.0 / scale;
        for value in row {
            *value = scale * (*value * per_scale).round_ties_even().clamp(-1.0, 1.0);
        }
    }

    fn is_before_writing(&self) -> bool {
        true
    }

    fn rounds_inputs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ternary_weights_are_what_files_hold() {
        let mut random = 1u32;
        let values: Vec<f32> = (0..2048)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 8) as f32 / (1u32 << 24) as f32 * 0.2 - 0.1
            })
            .collect();
        let scale = Ternary.scale(&values);
        assert!((scale - 0.05).abs() < 0.002, "{scale}");
        let mut ternary = values.clone();
        ternary.chunks_exact_mut(512).for_each(|row| Ternary.round(scale, row));
        for (value, ternary) in values.iter().zip(&ternary) {
            let nearest = [-scale, 0.0, scale]
                .into_iter()
                .min_by(|a, b| (a - value).abs().total_cmp(&(b - value).abs()));
            assert_eq!(*ternary, nearest.unwrap(), "{value}");
        }
        for dtype in [DType::TQ1_0, DType::TQ2_0] {
            let mut stored = ternary.clone();
            stored.chunks_exact_mut(512).for_each(|row| AsStored(dtype).round(1.0, row));
            assert_eq!(stored, ternary, "{dtype}");
        }
    }

    #[test]
    fn inputs_have_eight_bits() {
        let cpu = Cpu::new(2).unwrap();
        let x: Vec<f32> = (0..96).map(|i| (i * i % 37) as f32 - 18.0).chain([0.0; 32]).collect();
        let mut rounded = x.clone();
        round_inputs(&cpu, &mut rounded, 32);
        for (x, rounded) in x.chunks(32).zip(rounded.chunks(32)) {
            let step = x.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
            for (x, rounded) in x.iter().zip(rounded) {
                assert!((x - rounded).abs() <= 0.5001 * step, "{x} {rounded}");
                let levels = rounded / step.max(1e-9);
                assert!((levels - levels.round()).abs() < 1e-3 && levels.abs() < 127.01);
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut row = [1.0, f32::NAN, 0.0, 2.0].repeat(8);
        AsStored(DType::Q4_0).round(1.0, &mut row);
        assert!(row.iter().all(|value| value.is_nan()));
    }
}
