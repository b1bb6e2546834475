use std::ops::Range;

use crate::Batch;
use crate::data::Example;

/// Examples side by side.
#[derive(Debug, Default)]
pub(crate) struct Packed {
    pub(crate) tokens: Vec<u32>,
    pub(crate) sequences: Vec<Range<usize>>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Packed {
    /// Groups of examples in parts of up to so many tokens, or of one group; each token that is learnt weighs
    /// `weight`.
    pub(crate) fn of(groups: &[&[&Example]], most: usize, weight: f32) -> Vec<Self> {
        let mut parts: Vec<Self> = Vec::new();
        for &group in groups {
            // Nothing follows the last token.
            let n: usize = group.iter().map(|example| example.tokens.len() - 1).sum();
            if parts.last().is_none_or(|part| part.tokens.len() + n > most) {
                parts.push(Self::default());
            }
            let part = parts.last_mut().expect("there is one now");
            for example in group {
                part.push(example, weight);
            }
        }
        parts
    }

    fn push(&mut self, example: &Example, weight: f32) {
        let (start, n) = (self.tokens.len(), example.tokens.len() - 1);
        self.sequences.push(start..start + n);
        self.tokens.extend_from_slice(&example.tokens[..n]);
        self.targets.extend_from_slice(&example.tokens[1..]);
        let weights = example.learnt[1..].iter().map(|&learnt| if learnt { weight } else { 0.0 });
        self.weights.extend(weights);
    }

    pub(crate) fn batch(&self) -> Batch<'_> {
        let Self { tokens, sequences, targets, weights } = self;
        Batch { tokens, sequences, targets, weights }
    }
}
