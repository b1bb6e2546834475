//! Wanda's masks against scores computed one by one.

use bevel_compress::solve::{SolveError, Sparsity, wanda};
use bevel_compress::{Needs, Stats};
use bevel_kernels::Cpu;

use super::Layer;

/// Every weight that stays scores at least as much as every one of its run that goes.
#[track_caller]
fn check(sparsity: Sparsity, run: usize, count: usize) {
    let (layer, cpu) = (Layer::random(37, 96, 1), Cpu::new(2).unwrap());
    let pruned = wanda(&cpu, &layer.w, 37, 96, &layer.stats, sparsity).unwrap();
    let norm = |j: usize| layer.stats.square_sum()[j].sqrt();
    for row in 0..37 {
        for first in (0..96).step_by(run) {
            let scores = |goes: bool| -> Vec<f64> {
                let of_run = (first..first + run).filter(|j| pruned.pruned[row * 96 + j] == goes);
                of_run.map(|j| f64::from(layer.w[row * 96 + j].abs()) * norm(j)).collect()
            };
            let [gone, kept] = [true, false].map(scores);
            assert_eq!(gone.len(), count);
            let most = gone.into_iter().fold(0.0, f64::max);
            let least = kept.into_iter().fold(f64::INFINITY, f64::min);
            assert!(most <= least * (1.0 + 1e-6), "{most} goes and {least} stays");
        }
    }
    let weights = pruned.weights.iter().zip(&layer.w).zip(&pruned.pruned);
    for ((after, before), goes) in weights {
        assert_eq!(*after, if *goes { 0.0 } else { *before });
    }
    let loss = layer.loss(&pruned.weights) / layer.loss(&vec![0.0; 37 * 96]);
    assert!((pruned.report.error - loss).abs() <= 1e-3 * loss, "{} {loss}", pruned.report.error);
}

#[test]
fn rows_and_runs_lose_what_scores_least() {
    check(Sparsity::Fraction(0.5), 96, 48);
    check(Sparsity::Fraction(0.3), 96, 28);
    check(Sparsity::Fraction(0.0), 96, 0);
    check(Sparsity::Pattern { n: 2, m: 4 }, 4, 2);
    check(Sparsity::Pattern { n: 4, m: 8 }, 8, 4);
}

#[test]
fn what_cannot_be_pruned_is_refused() {
    let (layer, cpu) = (Layer::random(8, 96, 1), Cpu::new(1).unwrap());
    let run = |sparsity, stats: &Stats| wanda(&cpu, &layer.w, 8, 96, stats, sparsity).unwrap_err();
    assert!(matches!(run(Sparsity::Fraction(1.0), &layer.stats), SolveError::Target(_)));
    assert!(matches!(run(Sparsity::Pattern { n: 2, m: 5 }, &layer.stats), SolveError::Target(_)));
    let nothing = Stats::new(96, Needs::default());
    assert!(matches!(run(Sparsity::Fraction(0.5), &nothing), SolveError::Missing { .. }));
}
