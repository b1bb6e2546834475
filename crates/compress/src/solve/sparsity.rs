//! What pruning leaves.

use super::{SolveError, SolveReport, SolveResult};

/// Which weights go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sparsity {
    /// This part of the weights, of each block by SparseGPT, of each row by Wanda.
    Fraction(f64),
    /// Of every `m` neighbouring weights of a row, `n`.
    Pattern {
        /// Weights pruned.
        n: usize,
        /// Weights in a run.
        m: usize,
    },
}

/// A pruned matrix.
#[derive(Clone, Debug)]
pub struct Pruned {
    /// `[rows, cols]`, zero where pruned.
    pub weights: Vec<f32>,
    /// True where a weight was pruned, `[rows, cols]`.
    pub pruned: Vec<bool>,
    /// What happened.
    pub report: SolveReport,
}

impl Sparsity {
    /// Columns that are decided about together.
    ///
    /// # Errors
    /// [`SolveError::Target`] where there is no such sparsity of rows of `cols` columns.
    pub(super) fn run(self, cols: usize) -> SolveResult<usize> {
        match self {
            Sparsity::Fraction(part) if (0.0..1.0).contains(&part) => Ok(1),
            Sparsity::Pattern { n, m } if n < m && cols.is_multiple_of(m) => Ok(m),
            _ => Err(SolveError::Target(format!(
                "{self:?} of rows of {cols} columns: a part is at least 0 and below 1, and a pattern's run divides the row"
            ))),
        }
    }
}

/// True at the `count` least scores; of equal ones the first.
pub(super) fn least(scores: &[f32], count: usize) -> Vec<bool> {
    if count == 0 {
        return vec![false; scores.len()];
    }
    let mut sorted = scores.to_vec();
    let (_, threshold, _) = sorted.select_nth_unstable_by(count - 1, f32::total_cmp);
    let threshold = *threshold;
    let mut equal = count - scores.iter().filter(|s| s.total_cmp(&threshold).is_lt()).count();
    let take = |score: &f32| match score.total_cmp(&threshold) {
        std::cmp::Ordering::Less => true,
        std::cmp::Ordering::Greater => false,
        std::cmp::Ordering::Equal => {
            let first = equal > 0;
            equal = equal.saturating_sub(1);
            first
        }
    };
    scores.iter().map(take).collect()
}
