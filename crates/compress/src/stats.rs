//! What calibration knows about the inputs of a linear layer.

use bevel_kernels::Cpu;
use bevel_kernels::linalg::{self, Region, Update, View};

/// Which of the costly statistics are to be gathered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The Gram matrix: GPTQ, SparseGPT, AWQ, and every error measured in a layer's output.
    pub gram: bool,
    /// The cross matrix: GPTAQ.
    pub cross: bool,
}

impl Needs {
    /// Operations of the costly statistics for `tokens` rows of `cols` inputs; a multiplication and an
    /// addition are two. Of the Gram matrix one triangle is computed.
    pub(crate) fn operations(self, tokens: usize, cols: usize) -> f64 {
        let matrices = f64::from(u8::from(self.gram)) + 2.0 * f64::from(u8::from(self.cross));
        matrices * tokens as f64 * (cols * cols) as f64
    }
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
    /// `[rows, cols]`
    residual: Option<Vec<f32>>,
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
            residual: None,
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

    /// Adds what the stream that the layer's outputs join has lost before: `lost`, `[n, rows]`, is the
    /// stream in the model before compression less the stream, for the `n` rows of `x`.
    pub fn add_residual(&mut self, cpu: &Cpu, x: &[f32], lost: &[f32], n: usize) {
        let (cols, rows) = (self.cols, lost.len() / n.max(1));
        let residual = self.residual.get_or_insert_with(|| vec![0.0; rows * cols]);
        let (lost, x) = (View::new(lost, n, rows).transposed(), View::new(x, n, cols));
        linalg::gemm(cpu, Update::Add, lost, x, residual, cols, Region::Whole);
    }

    /// The same without the Gram matrix: what a method that does not need it gathers.
    pub(crate) fn without_gram(&self) -> Self {
        Self {
            cols: self.cols,
            tokens: self.tokens,
            gram: None,
            cross: None,
            residual: None,
            square_sum: self.square_sum.clone(),
            abs_sum: self.abs_sum.clone(),
            max_abs: self.max_abs.clone(),
        }
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

    /// `Σ lost xᵀ`, `[rows, cols]`, where the layer's outputs join a stream: what
    /// [`Stats::add_residual`] summed.
    pub fn residual(&self) -> Option<&[f32]> {
        self.residual.as_deref()
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
}
