//! Numbers of 8 bits for optimizers' states: blocks with a scale each, and levels whose distances grow with their
//! size, so that small ones keep their precision (dynamic tree quantization, arXiv 2110.02861).

/// Values that share a scale.
pub(crate) const BLOCK: usize = 256;

/// The 256 levels of a code, in their order.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    levels: [f32; 256],
    /// Between each level and the next.
    middles: [f32; 255],
}

impl Levels {
    /// For numbers of both signs.
    pub(crate) fn signed() -> Self {
        Self::new(true)
    }

    /// For numbers that are never negative: twice as fine.
    pub(crate) fn unsigned() -> Self {
        Self::new(false)
    }

    /// Seven decades below 1, each with twice the levels of the one below: the middles of equal parts of 0.1 to 1.
    fn new(signed: bool) -> Self {
        let mut all = vec![0.0, 1.0f64];
        for decade in 0..7 {
            let parts = if signed { 1 << decade } else { 2 << decade };
            let unit = 10f64.powi(decade - 6);
            for part in 0..parts {
                let level = unit * (0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts));
                all.push(level);
                if signed {
                    all.push(-level);
                }
            }
        }
        all.sort_by(f64::total_cmp);
        let levels: Vec<f32> = all.into_iter().map(|level| level as f32).collect();
        let levels: [f32; 256] = levels.try_into().expect("as many as bytes");
        let middles = std::array::from_fn(|i| (levels[i] + levels[i + 1]) / 2.0);
        Self { levels, middles }
    }

    /// Values of a block's codes.
    pub(crate) fn read(&self, codes: &[u8], scale: f32, out: &mut [f32]) {
        for (value, &code) in out.iter_mut().zip(codes) {
            *value = scale * self.levels[usize::from(code)];
        }
    }

    /// Codes of a block's values; returns its scale.
    pub(crate) fn write(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let scale = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            let value = value * factor;
            *code = self.middles.partition_point(|&middle| middle < value) as u8;
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_within_their_level() {
        for levels in [Levels::signed(), Levels::unsigned()] {
            assert!(levels.levels.is_sorted() && levels.levels[255] == 1.0);
            assert!(levels.levels.contains(&0.0));
            let signed = levels.levels[0] < 0.0;
            let values: Vec<f32> = (0..BLOCK)
                .map(|i| {
                    let size = 10f32.powf(-6.0 * i as f32 / BLOCK as f32);
                    if signed && i % 2 == 1 { -3.0 * size } else { 3.0 * size }
                })
                .collect();
            let (mut codes, mut found) = ([0; BLOCK], [0.0; BLOCK]);
            let scale = levels.write(&values, &mut codes);
            assert_eq!(scale, 3.0);
            levels.read(&codes, scale, &mut found);
            for (found, value) in found.iter().zip(&values) {
                // The finest decade has 64 levels or twice that, each one below half as many.
                let bound = match value.abs() {
                    size if size > 0.3 => 0.08,
                    size if size > 0.03 => 0.16,
                    _ => 1.0,
                };
                assert!((found - value).abs() <= bound * value.abs() + 3e-7, "{found} {value}");
            }
            // A block of zeros is one.
            assert_eq!(levels.write(&[0.0; 4], &mut codes[..4]), 0.0);
            levels.read(&codes[..4], 0.0, &mut found[..4]);
            assert_eq!(found[..4], [0.0; 4]);
        }
    }
}
