//! The loss of next-token prediction. Gives the same bits on every instruction set and number of threads.

use crate::Cpu;
use crate::dispatch::for_each_isa;
use crate::divergence::log_sum_exp;
use crate::math::exp;

/// The loss −ln p of each row's target, in nats, where p = softmax(logits), `[n, vocab]`. Logits become the
/// gradient of Σ `weights[i]` · lossᵢ: `weights[i]` · (p − 1 at the target). A row of weight 0 has no loss.
///
/// # Panics
/// Where lengths do not fit, or a target is none of the vocabulary.
pub fn cross_entropy(cpu: &Cpu, logits: &mut [f32], targets: &[u32], weights: &[f32]) -> Vec<f64> {
    let n = targets.len();
    assert_eq!(n, weights.len(), "cross_entropy: a weight for each target");
    if n == 0 {
        return Vec::new();
    }
    assert!(logits.len().is_multiple_of(n), "cross_entropy: rows of one length");
    let vocab = logits.len() / n;
    let mut rows: Vec<(&mut [f32], f64)> =
        logits.chunks_exact_mut(vocab).map(|row| (row, 0.0)).collect();
    cpu.pool().run_chunks(&mut rows, 1, |i, row| {
        let (row, loss) = &mut row[0];
        let (target, weight) = (targets[i] as usize, weights[i]);
        if weight == 0.0 {
            row.fill(0.0);
            return;
        }
        let sum = log_sum_exp(cpu, row);
        *loss = sum - f64::from(row[target]);
        weighted_softmax(cpu.isa(), row, sum as f32, weight);
        row[target] -= weight;
    });
    rows.into_iter().map(|(_, loss)| loss).collect()
}

for_each_isa! {
    fn weighted_softmax(row: &mut [f32], log_sum: f32, weight: f32) {
        for x in row {
            *x = weight * exp(*x - log_sum);
        }
    }
}
