//! How much a token counts where outputs join the residual stream.
//!
//! A few tokens, a sequence's first above all, have streams hundreds of times as large as all others
//! (Massive Activations in Large Language Models, arXiv 2402.17762). What is lost there is as large and
//! matters no more, because the next norm divides by the stream's size. In a sum of squares it would
//! be everything: GPTAQ would move the weights of all layers after by several times their size, to
//! make up for what one token lost.

/// The factor of each token's inputs and outputs: 1, and less in proportion where the stream, `[tokens,
/// dim]`, is larger than that of half of the sequence's tokens.
pub(super) fn factors(stream: &[f32], dim: usize) -> Vec<f32> {
    let size = |x: &[f32]| x.iter().map(|v| v * v).sum::<f32>().sqrt();
    let sizes: Vec<f32> = stream.chunks_exact(dim).map(size).collect();
    let mut sorted = sizes.clone();
    sorted.sort_by(f32::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    sizes.iter().map(|&size| if size > median { median / size } else { 1.0 }).collect()
}

/// Multiplies each token's row of `rows`, `[tokens, any]`, by its factor.
pub(super) fn weigh(rows: &mut [f32], factors: &[f32]) {
    let cols = rows.len() / factors.len().max(1);
    for (row, factor) in rows.chunks_exact_mut(cols.max(1)).zip(factors) {
        row.iter_mut().for_each(|v| *v *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_tokens_count_as_those_of_the_middle() {
        let stream = [300.0, 400.0, 0.3, 0.4, 0.5, 0.0, 0.0, 2.0, 0.0, 0.0];
        assert_eq!(factors(&stream, 2), [0.5 / 500.0, 1.0, 1.0, 0.25, 1.0]);
        let mut rows = [1.0, 2.0, 3.0, 4.0];
        weigh(&mut rows, &[0.5, 2.0]);
        assert_eq!(rows, [0.5, 1.0, 6.0, 8.0]);
    }

    #[test]
    fn streams_that_are_empty_zero_or_not_finite_are_left_alone() {
        assert_eq!(factors(&[], 4), [0.0; 0]);
        assert_eq!(factors(&[0.0; 6], 2), [1.0; 3]);
        assert_eq!(factors(&[1.0, f32::NAN, 2.0], 1), [1.0, 1.0, 1.0]);
        weigh(&mut [], &[]);
    }
}
