//! Sequences to measure on: from where those of calibration come from, with no text in common with
//! them. What a model was calibrated on it predicts better than anything else.

use std::collections::HashSet;

/// So many tokens in a row are in two texts by chance only where both quote something.
const RUN: usize = 12;

/// The sequences that share no more than an eighth of their runs of tokens with those that were
/// `used`, nor with each other.
pub(super) fn apart(found: Vec<Vec<u32>>, used: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut known: HashSet<Vec<u32>> =
        used.iter().flat_map(|s| runs(s)).map(<[u32]>::to_vec).collect();
    let mut kept = Vec::new();
    for sequence in found {
        let all = runs(&sequence).count();
        let shared = runs(&sequence).filter(|run| known.contains(*run)).count();
        if 8 * shared <= all {
            known.extend(runs(&sequence).map(<[u32]>::to_vec));
            kept.push(sequence);
        }
    }
    kept
}

/// All runs of tokens in a sequence; itself where it is short.
fn runs(sequence: &[u32]) -> impl Iterator<Item = &[u32]> {
    sequence.windows(RUN.min(sequence.len()).max(1))
}

#[cfg(test)]
mod tests {
    use super::apart;

    #[test]
    fn what_was_used_is_left_out() {
        let text: Vec<u32> = (0..1000).collect();
        let piece = |start: usize| text[start..start + 100].to_vec();
        let used = [piece(0), piece(300)];
        // Itself, a half of it, its last tenth, and what begins after it.
        let found = [300, 350, 390, 400, 600].map(piece).to_vec();
        assert_eq!(apart(found, &used), [390, 600].map(piece));
        assert_eq!(apart([400, 450, 600].map(piece).to_vec(), &used), [400, 600].map(piece));
        assert_eq!(apart(vec![vec![1, 2, 3]], &[vec![1, 2, 3], vec![7]]), [[0u32; 3]; 0]);
    }
}
