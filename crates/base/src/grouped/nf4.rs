//! NF4, FP4 and double quantization.
//!
//! QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314. The 8-bit map of the scales is
//! that of 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861. Where the papers leave a
//! choice, what bitsandbytes does is done here, so that the bytes are the same.
//!
//! With `x` the weights, cut into blocks of 64 whatever the rows, and `q` the levels:
//!
//! ```text
//! (1)  c = max|x|                              of each block
//! (2)  code = argmin_j |x / c - q_j|           ŵ = c q[code]
//! ```
//! Double quantization of the `c`, cut into blocks of 256, with `m` the 256 levels of the map:
//! ```text
//! (3)  o = mean(c)
//! (4)  d = max|c - o|                          of each block
//! (5)  t = round(32767.5 ((c - o) / d + 1))    one of 2^16 points of [-1, 1]
//! (6)  code = argmin_j |t / 32767.5 - 1 - m_j|
//! (7)  ĉ = d m[code] + o
//! ```

use super::{Coding, GroupedMatrix, check_values};
use crate::{Error, Result};

/// The 16 levels that split a normal distribution into parts of equal probability, zero being one
/// of them, scaled to end at ±1.
pub const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A float of 1 sign bit, 2 exponent bits and 1 mantissa bit of bitsandbytes' own kind, scaled to
/// end at ±1.
pub const FP4_LEVELS: [f32; 16] = {
    let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut levels = [0.0f32; 16];
    let mut code = 0;
    while code < 8 {
        levels[code] = twelfths[code] / 12.0;
        // There is no negative zero.
        levels[code + 8] = if code == 0 { 0.0 } else { -levels[code] };
        code += 1;
    }
    levels
};

/// Weights that share a scale, in bitsandbytes' default.
pub const BLOCK: usize = 64;

/// Which 16 levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// [`NF4_LEVELS`]
    Nf4,
    /// [`FP4_LEVELS`]
    Fp4,
}

impl Levels {
    /// The level of each code.
    pub fn table(self) -> &'static [f32; 16] {
        match self {
            Levels::Nf4 => &NF4_LEVELS,
            Levels::Fp4 => &FP4_LEVELS,
        }
    }

    /// The codes in the order of their levels. The two zeros of FP4 keep theirs.
    fn ascending(self) -> [u8; 16] {
        let mut codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        let level = |code: u8| self.table()[usize::from(code)];
        codes.sort_by(|&a, &b| level(a).total_cmp(&level(b)));
        codes
    }
}

/// Quantizes a matrix `[rows, cols]` in blocks of `block` values, which run across the ends of rows:
/// where `block` does not divide `cols`, groups are as long as what divides both, and several have
/// the scale of their block.
///
/// # Errors
/// [`Error::Grouped`] where lengths disagree, [`Error::NotFinite`].
pub fn quantize(
    values: &[f32],
    rows: usize,
    cols: usize,
    levels: Levels,
    block: usize,
) -> Result<GroupedMatrix> {
    check_values(values, rows, cols)?;
    if block == 0 {
        return Err(Error::Grouped("blocks of no values".to_owned()));
    }
    let ascending = levels.ascending();
    let sorted = ascending.map(|code| levels.table()[usize::from(code)]);
    let bounds: [f32; 15] = std::array::from_fn(|i| (sorted[i] + sorted[i + 1]) / 2.0);

    let mut codes = Vec::with_capacity(values.len());
    let mut maxima = Vec::with_capacity(values.len().div_ceil(block));
    for x in values.chunks(block) {
        let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs())); // (1)
        let divisor = largest.max(1e-38);
        // A last block that is not full is divided, not multiplied with the inverse.
        let full = x.len() == block;
        let inverse = 1.0 / divisor;
        for &x in x {
            let t = if full { x * inverse } else { x / divisor }.clamp(-1.0, 1.0);
            let rank = bounds.iter().filter(|&&bound| bound < t).count(); // (2)
            codes.push(ascending[rank]);
        }
        maxima.push(if full { largest } else { divisor });
    }

    let group_size = common_divisor(block, cols);
    let groups = values.len() / group_size.max(1);
    let scales = (0..groups).map(|group| maxima[group * group_size / block]).collect();
    let coding = Coding::Levels(*levels.table());
    Ok(GroupedMatrix { rows, cols, group_size, coding, codes, scales, group_of: None })
}

/// The greatest common divisor.
pub fn common_divisor(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Scales that are quantized themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleQuantized {
    /// One a scale.
    pub codes: Vec<u8>,
    /// One for each [`DoubleQuantized::BLOCK`] scales.
    pub maxima: Vec<f32>,
    /// What is added to all.
    pub offset: f32,
}

impl DoubleQuantized {
    /// Scales that share a maximum.
    pub const BLOCK: usize = 256;

    /// Quantizes the scales of blocks, which must be finite.
    pub fn new(scales: &[f32]) -> Self {
        // (3) PyTorch adds in single precision in an order of its own. Scales of 16-bit weights have
        // so few digits that every order gives this sum.
        let sum: f64 = scales.iter().map(|&c| f64::from(c)).sum();
        let offset = sum as f32 / scales.len().max(1) as f32;
        let map = dynamic_map();
        let bounds: [f32; 255] = std::array::from_fn(|j| (map[j] + map[j + 1]) / 2.0);
        let mut codes = Vec::with_capacity(scales.len());
        let mut maxima = Vec::with_capacity(scales.len().div_ceil(Self::BLOCK));
        for c in scales.chunks(Self::BLOCK) {
            let largest = c.iter().fold(0f32, |largest, c| largest.max((c - offset).abs())); // (4)
            let inverse = 1.0 / largest;
            for c in c {
                let t = (c - offset) * inverse;
                let point = ((t.clamp(-1.0, 1.0) + 1.0) * 32767.5 + 0.5).floor(); // (5)
                let point = point * (2.0 / 65535.0) - 1.0;
                codes.push(match largest {
                    0.0 => 0,
                    _ => bounds.partition_point(|&bound| bound < point) as u8, // (6)
                });
            }
            maxima.push(largest);
        }
        Self { codes, maxima, offset }
    }

    /// The scales that the codes stand for.
    pub fn scales(&self) -> Vec<f32> {
        let map = dynamic_map();
        let blocks = self.codes.chunks(Self::BLOCK).zip(&self.maxima);
        blocks
            .flat_map(|(codes, d)| codes.iter().map(move |&code| map[usize::from(code)] * d))
            .map(|scale| scale + self.offset) // (7)
            .collect()
    }
}

/// The 256 levels of the signed "dynamic" type: seven decades, from the outermost inwards with 64 to
/// 1 levels on either side, zero and one.
pub fn dynamic_map() -> [f32; 256] {
    let mut levels = Vec::with_capacity(256);
    for decade in 0..7 {
        let count = 1 << decade;
        // `count` equal parts of [0.1, 1], counted from the nearer end and rounded once.
        let step = (1.0f32 - 0.1) / count as f32;
        let edge = |i: usize| match i <= count / 2 {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((count - i) as f32, 1.0),
        };
        let power = 10f64.powi(decade - 6) as f32;
        for i in 0..count {
            let middle = power * ((edge(i) + edge(i + 1)) / 2.0);
            levels.extend([middle, -middle]);
        }
    }
    levels.extend([0.0, 1.0]);
    levels.sort_by(f32::total_cmp);
    levels.try_into().expect("2 * 127 + 2 levels")
}
