//! Quantization-aware training: products see what weights become in few bits, and the gradients of that are taken for
//! those of the weights themselves (the straight-through estimator, arXiv 1308.3432).

use std::fmt::Debug;

use bevel_base::{DType, pack};

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

/// −s, 0 and s, with s the mean of |w| over the matrix (BitNet b1.58, arXiv 2402.17764), which TQ1_0 and TQ2_0 hold as
/// they are.
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
    fn what_is_no_number_stays_none() {
        let mut row = [1.0, f32::NAN, 0.0, 2.0].repeat(8);
        AsStored(DType::Q4_0).round(1.0, &mut row);
        assert!(row.iter().all(|value| value.is_nan()));
    }
}
