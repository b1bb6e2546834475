//! Weights as small codes with a scale for each group of columns: what GPTQ, AWQ,
//! compressed-tensors, MLX, bitsandbytes and FP8 checkpoints store, each in a byte order of its own.
//! This is the form between them: a reader fills it, a solver makes it, a writer and the execution
//! layouts take it apart.

pub mod float4;
pub mod float8;
pub mod mlx;
pub mod nf4;
mod unpack;

use crate::{DType, Error, Result, pack};

/// A weight matrix `[rows = out, cols = in]` of codes, one a byte, with parameters for each group.
///
/// Group `k` of a row is its columns `k * group_size ..`, the last group being what is left, unless
/// [`GroupedMatrix::group_of`] says otherwise. A matrix has `groups = ceil(cols / group_size)`.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupedMatrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Columns that share a scale.
    pub group_size: usize,
    /// What the codes mean.
    pub coding: Coding,
    /// `[rows, cols]`
    pub codes: Vec<u8>,
    /// `[rows, groups]`
    pub scales: Vec<f32>,
    /// The group of each column, `[cols]`, where columns were quantized in another order (act-order).
    pub group_of: Option<Vec<u32>>,
}

/// How a code and its group's parameters make a weight `ŵ`.
#[derive(Clone, Debug, PartialEq)]
pub enum Coding {
    /// `ŵ = scale · (code − zero)`, codes of `bits` bits; zeros `[rows, groups]`.
    Integer {
        /// 1 to 8.
        bits: u32,
        /// The code that means zero.
        zeros: Zeros,
    },
    /// `ŵ = scale · code + minimum`, codes of `bits` bits (MLX).
    Affine {
        /// 1 to 8.
        bits: u32,
        /// `[rows, groups]`
        minima: Vec<f32>,
    },
    /// `ŵ = scale · levels[code]`, codes of 4 bits (NF4, FP4).
    Levels([f32; 16]),
    /// `ŵ = scale · e4m3(code)`.
    Float8,
}

/// Zero points.
#[derive(Clone, Debug, PartialEq)]
pub enum Zeros {
    /// The same everywhere: half of the codes, `2^(bits − 1)`.
    Symmetric,
    /// `[rows, groups]`
    Each(Vec<u8>),
}

impl Zeros {
    /// Zero points `[rows, groups]` of codes of `bits` bits; [`Zeros::Symmetric`] where all are half
    /// of the codes, whatever the file spelt out.
    pub fn new(bits: u32, zeros: Vec<u8>) -> Self {
        let half = 1 << (bits - 1);
        match zeros.iter().all(|&zero| zero == half) {
            true => Zeros::Symmetric,
            false => Zeros::Each(zeros),
        }
    }

    /// The zero point of codes of `bits` bits at `row * groups + group`.
    pub fn at(&self, bits: u32, at: usize) -> u8 {
        match self {
            Zeros::Symmetric => 1 << (bits - 1),
            Zeros::Each(zeros) => zeros[at],
        }
    }
}

impl GroupedMatrix {
    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_size)
    }

    /// Checks that all parts have the lengths that the dimensions ask for, that codes fit in their
    /// bits, and that groups exist: what holds for every matrix that others may rely on.
    ///
    /// # Errors
    /// [`Error::Grouped`].
    pub fn checked(self) -> Result<Self> {
        let broken = |what: String| Err(Error::Grouped(what));
        if self.group_size == 0 {
            return broken("groups of no columns".to_owned());
        }
        let length = |what: &str, expected: Option<usize>, found: usize| match expected {
            Some(expected) if expected == found => Ok(()),
            _ => Err(Error::Grouped(format!(
                "{found} {what} for [{}, {}] in groups of {}",
                self.rows, self.cols, self.group_size
            ))),
        };
        if let Coding::Integer { bits, .. } | Coding::Affine { bits, .. } = self.coding
            && !(1..=8).contains(&bits)
        {
            return broken(format!("codes of {bits} bits"));
        }
        let groups = self.rows.checked_mul(self.groups());
        length("codes", self.rows.checked_mul(self.cols), self.codes.len())?;
        length("scales", groups, self.scales.len())?;
        if let Some(group_of) = &self.group_of {
            length("group numbers", Some(self.cols), group_of.len())?;
            if group_of.iter().any(|&group| group as usize >= self.groups()) {
                return broken(format!("a column in none of the {} groups", self.groups()));
            }
        }
        let bits = match &self.coding {
            Coding::Integer { bits, zeros } => {
                if let Zeros::Each(zeros) = zeros {
                    length("zero points", groups, zeros.len())?;
                    if zeros.iter().any(|&zero| u32::from(zero) >> bits != 0) {
                        return broken(format!("a zero point beyond {bits} bits"));
                    }
                }
                *bits
            }
            Coding::Affine { bits, minima } => {
                length("minima", groups, minima.len())?;
                *bits
            }
            Coding::Levels(_) => 4,
            Coding::Float8 => 8,
        };
        if self.codes.iter().any(|&code| u32::from(code) >> bits != 0) {
            return broken(format!("a code beyond {bits} bits"));
        }
        Ok(self)
    }

    /// The group of a column.
    pub fn group(&self, col: usize) -> usize {
        match &self.group_of {
            Some(group_of) => group_of[col] as usize,
            None => col / self.group_size,
        }
    }

    /// Writes the weights of row `row` into `out`, `[cols]`.
    ///
    /// # Panics
    /// Where there is no such row or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        self.dequantize_codes(row, &self.codes[row * self.cols..][..self.cols], out);
    }

    /// The same of codes that are given, which the matrix itself need not have.
    ///
    /// # Panics
    /// Where there is no such row or a length is another one.
    pub fn dequantize_codes(&self, row: usize, codes: &[u8], out: &mut [f32]) {
        assert_eq!([codes.len(), out.len()], [self.cols; 2], "length of the row");
        let groups = self.groups();
        let scales = &self.scales[row * groups..][..groups];
        if let Some(group_of) = &self.group_of {
            for ((out, &code), &group) in out.iter_mut().zip(codes).zip(group_of) {
                self.dequantize_group(
                    row,
                    group as usize,
                    scales,
                    &[code],
                    std::slice::from_mut(out),
                );
            }
            return;
        }
        let parts = out.chunks_mut(self.group_size).zip(codes.chunks(self.group_size));
        for (group, (out, codes)) in parts.enumerate() {
            self.dequantize_group(row, group, scales, codes, out);
        }
    }

    /// Weights of one group of a row.
    #[inline(always)]
    fn dequantize_group(
        &self,
        row: usize,
        group: usize,
        scales: &[f32],
        codes: &[u8],
        out: &mut [f32],
    ) {
        let (scale, at) = (scales[group], row * scales.len() + group);
        match &self.coding {
            Coding::Integer { bits, zeros } => {
                let zero = i32::from(zeros.at(*bits, at));
                unpack::each(codes, out, |code| scale * (i32::from(code) - zero) as f32);
            }
            Coding::Affine { minima, .. } => {
                let minimum = minima[at];
                unpack::each(codes, out, |code| scale * f32::from(code) + minimum);
            }
            Coding::Levels(levels) => {
                unpack::levels(codes, out, &levels.map(|level| scale * level))
            }
            Coding::Float8 => unpack::each(codes, out, |code| scale * pack::e4m3(code)),
        }
    }

    /// The weights, `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.dequantize_row(row, out);
        }
        out
    }

    /// The rows in another order: row `r` of the result is row `order(r)` of this.
    pub fn permute_rows(&self, order: impl Fn(usize) -> usize) -> Self {
        fn pick<T: Copy>(values: &[T], rows: usize, order: &dyn Fn(usize) -> usize) -> Vec<T> {
            let len = values.len() / rows.max(1);
            (0..rows).flat_map(|r| values[order(r) * len..][..len].iter().copied()).collect()
        }
        let coding = match &self.coding {
            Coding::Integer { bits, zeros: Zeros::Each(zeros) } => {
                let zeros = Zeros::Each(pick(zeros, self.rows, &order));
                Coding::Integer { bits: *bits, zeros }
            }
            Coding::Affine { bits, minima } => {
                Coding::Affine { bits: *bits, minima: pick(minima, self.rows, &order) }
            }
            other => other.clone(),
        };
        Self {
            coding,
            codes: pick(&self.codes, self.rows, &order),
            scales: pick(&self.scales, self.rows, &order),
            group_of: self.group_of.clone(),
            ..*self
        }
    }
}

/// Rounds scales or minima to what a file stores, in place; values beyond its range become its
/// largest.
///
/// # Errors
/// [`Error::NotWeight`] and others of [`pack::quantize`] where `dtype` is no floating-point type or a
/// value is not finite.
pub fn round_to(dtype: DType, values: &mut [f32]) -> Result<()> {
    let mut stored = vec![0; dtype.row_bytes(values.len())?];
    pack::quantize(dtype, values, None, &mut stored)?;
    pack::dequantize(dtype, &stored, values)
}

/// What every quantizer asks of its input: `[rows, cols]` finite numbers.
fn check_values(values: &[f32], rows: usize, cols: usize) -> Result<()> {
    if rows.checked_mul(cols) != Some(values.len()) {
        return Err(Error::Grouped(format!("{} values for [{rows}, {cols}]", values.len())));
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(Error::NotFinite { index: at % cols, value: values[at] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> GroupedMatrix {
        GroupedMatrix {
            rows: 2,
            cols: 5,
            group_size: 2,
            coding: Coding::Integer { bits: 4, zeros: Zeros::Each(vec![8, 0, 15, 1, 2, 3]) },
            codes: vec![0, 8, 15, 1, 2, 3, 4, 5, 6, 7],
            scales: vec![1.0, 0.5, 2.0, 1.0, -1.0, 0.25],
            group_of: None,
        }
    }

    #[test]
    fn weights_are_scaled_differences_from_the_zero_of_the_group() {
        let expected = [-8.0, 0.0, 7.5, 0.5, -26.0, 2.0, 3.0, -3.0, -4.0, 1.0];
        assert_eq!(sample().checked().unwrap().dequantize(), expected);
        let swapped = sample().permute_rows(|r| 1 - r).checked().unwrap();
        assert_eq!(swapped.dequantize(), [&expected[5..], &expected[..5]].concat());
        let mut ordered = sample();
        ordered.group_of = Some(vec![2, 2, 1, 1, 0]);
        let expected = [-30.0, -14.0, 7.5, 0.5, -6.0];
        assert_eq!(ordered.checked().unwrap().dequantize()[..5], expected);
    }

    #[test]
    fn broken_matrices_are_refused() {
        let breaks: [fn(&mut GroupedMatrix); 6] = [
            |m| m.group_size = 0,
            |m| m.rows = 3,
            |m| m.codes[3] = 16,
            |m| m.scales.truncate(5),
            |m| m.group_of = Some(vec![0, 1, 2, 3, 0]),
            |m| m.coding = Coding::Affine { bits: 4, minima: vec![0.0; 5] },
        ];
        for break_it in breaks {
            let mut matrix = sample();
            break_it(&mut matrix);
            assert!(matches!(matrix.checked(), Err(Error::Grouped(_))));
        }
    }
}
