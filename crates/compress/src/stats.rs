//! What calibration knows about the inputs of a linear layer.

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{self, Region, Update, View};

use crate::{Error, Result};

/// Which of the costly statistics are to be gathered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The Gram matrix: GPTQ, SparseGPT, AWQ, and every error measured in a layer's output.
    pub gram: bool,
    /// The cross matrix: GPTAQ.
    pub cross: bool,
}

/// Sums over the inputs `x` (`[tokens, cols]`) of a linear layer. Sums, not means: divide by
/// [`Stats::tokens`].
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    cols: usize,
    tokens: u64,
    /// `[cols, cols]`; defined on and below the diagonal.
    gram: Option<Vec<f32>>,
    cross: Option<Vec<f32>>,
    square_sum: Vec<f64>,
    abs_sum: Vec<f64>,
    max_abs: Vec<f32>,
}

impl Stats {
    /// Nothing seen yet.
    pub fn new(cols: usize, needs: Needs) -> Self {
        let matrix = |needed: bool| needed.then(|| vec![0.0; cols * cols]);
        Self {
            cols,
            tokens: 0,
            gram: matrix(needs.gram),
            cross: matrix(needs.cross),
            square_sum: vec![0.0; cols],
            abs_sum: vec![0.0; cols],
            max_abs: vec![0.0; cols],
        }
    }

    /// Adds the `n` rows of `x`, `[n, cols]`. `x_full` is what the same rows are in the model before
    /// compression; it is asked for by [`Needs::cross`] alone.
    ///
    /// # Panics
    /// Where the lengths do not fit, or the cross matrix is needed and `x_full` missing.
    pub fn add(&mut self, cpu: &Cpu, x: &[f32], n: usize, x_full: Option<&[f32]>) {
        let cols = self.cols;
        let (squares, magnitudes) = (&mut self.square_sum, &mut self.abs_sum);
        linalg::column_sums(cpu, x, n, cols, squares, magnitudes, &mut self.max_abs);
        if let Some(gram) = &mut self.gram {
            linalg::gram(cpu, x, n, cols, gram);
        }
        if let Some(cross) = &mut self.cross {
            let x_full = x_full.expect("the cross matrix needs the full model's inputs");
            let drift: Vec<f32> = x_full.iter().zip(x).map(|(full, x)| full - x).collect();
            let (drift, x) = (View::new(&drift, n, cols).transposed(), View::new(x, n, cols));
            linalg::gemm(cpu, Update::Add, drift, x, cross, cols, Region::Whole);
        }
        self.tokens += n as u64;
    }

    /// Inputs of the layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows added.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// What is gathered.
    pub fn needs(&self) -> Needs {
        Needs { gram: self.gram.is_some(), cross: self.cross.is_some() }
    }

    /// `Σ x xᵀ`, `[cols, cols]`, **defined on and below the diagonal**.
    pub fn gram(&self) -> Option<&[f32]> {
        self.gram.as_deref()
    }

    /// `Σ (x_full − x) xᵀ`, `[cols, cols]`.
    pub fn cross(&self) -> Option<&[f32]> {
        self.cross.as_deref()
    }

    /// `Σ x²` of each column: llama.cpp's importance matrix, times tokens.
    pub fn square_sum(&self) -> &[f64] {
        &self.square_sum
    }

    /// `Σ |x|` of each column.
    pub fn abs_sum(&self) -> &[f64] {
        &self.abs_sum
    }

    /// The largest `|x|` of each column.
    pub fn max_abs(&self) -> &[f32] {
        &self.max_abs
    }

    /// The mean square of each column's inputs, the weight of an error there.
    pub fn importance(&self) -> Vec<f32> {
        let tokens = self.tokens.max(1) as f64;
        self.square_sum.iter().map(|sum| (sum / tokens) as f32).collect()
    }

    /// Everything, to the bit, in little-endian order.
    pub fn to_bytes(&self) -> Vec<u8> {
        let matrices = [&self.gram, &self.cross];
        let floats: usize = matrices.iter().map(|m| m.as_ref().map_or(0, Vec::len)).sum();
        let mut bytes = Vec::with_capacity(HEADER + self.cols * 20 + floats * 4);
        bytes.extend((self.cols as u64).to_le_bytes());
        bytes.extend(self.tokens.to_le_bytes());
        let flags = u64::from(self.gram.is_some()) | u64::from(self.cross.is_some()) << 1;
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.square_sum.iter().chain(&self.abs_sum).flat_map(|v| v.to_le_bytes()));
        let floats = matrices.into_iter().flatten().flatten();
        bytes.extend(self.max_abs.iter().chain(floats).flat_map(|v| v.to_le_bytes()));
        bytes
    }

    /// What [`Stats::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Statistics`] where the bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let broken = || Error::Statistics(bytes.len());
        let (header, rest) = bytes.split_at_checked(HEADER).ok_or_else(broken)?;
        let (words, _) = header.as_chunks();
        let [cols, tokens, flags] = [0, 1, 2].map(|i| u64::from_le_bytes(words[i]));
        let matrices = u64::from(flags.count_ones());
        let expected = cols.checked_mul(cols).and_then(|square| square.checked_mul(4 * matrices));
        let expected = expected.and_then(|len| cols.checked_mul(20)?.checked_add(len));
        if flags > 3 || expected != Some(rest.len() as u64) {
            return Err(broken());
        }
        let cols = cols as usize;
        let (doubles, singles) = rest.split_at(16 * cols);
        let doubles: Vec<f64> =
            doubles.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
        let (singles, _) = singles.as_chunks();
        let singles = |first: usize, len: usize| -> Vec<f32> {
            singles[first..first + len].iter().map(|&b| f32::from_le_bytes(b)).collect()
        };
        let square = cols * cols;
        let has = |flag: u64| flags & flag != 0;
        let gram = has(1).then(|| singles(cols, square));
        let cross = has(2).then(|| singles(cols + if has(1) { square } else { 0 }, square));
        Ok(Self {
            cols,
            tokens,
            gram,
            cross,
            square_sum: doubles[..cols].to_vec(),
            abs_sum: doubles[cols..].to_vec(),
            max_abs: singles(0, cols),
        })
    }
}

/// Bytes before the sums.
const HEADER: usize = 24;
