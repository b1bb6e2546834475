//! AWQ's scales and clipping against a naive search in f64.

use bevel_compress::solve::{Range, Target, awq_clip, awq_scales, solve};
use bevel_kernels::Cpu;

use super::{Layer, RTN, integers};

/// Four-bit codes in groups of 32 without a search: `Q(w)`.
fn rounded(w: &[f32], symmetric: bool) -> Vec<f32> {
    w.chunks_exact(32)
        .flat_map(|group| {
            let (low, high) = group.iter().fold((0f32, 0f32), |(a, b), &w| (a.min(w), b.max(w)));
            let scale = if symmetric { high.max(-low) * 2.0 / 15.0 } else { (high - low) / 15.0 };
            let zero = if symmetric { 8.0 } else { (-low / scale).round_ties_even() };
            let value = move |w: &f32| {
                ((w / scale + zero).round_ties_even().clamp(0.0, 15.0) - zero) * scale
            };
            group.iter().map(value).collect::<Vec<f32>>()
        })
        .collect()
}

#[test]
fn scales_are_the_best_of_the_grid() {
    let (first, mut second) = (Layer::random(24, 128, 1), Layer::random(40, 128, 2));
    second.stats = first.stats.clone();
    let cpu = Cpu::new(2).unwrap();
    let (cols, tokens) = (128, first.stats.tokens() as f64);
    let loss = |scales: &[f64]| -> f64 {
        let layer_loss = |layer: &Layer| {
            let scaled: Vec<f32> =
                layer.w.iter().enumerate().map(|(i, w)| w * scales[i % cols] as f32).collect();
            let q: Vec<f32> = rounded(&scaled, false)
                .iter()
                .enumerate()
                .map(|(i, q)| q / scales[i % cols] as f32)
                .collect();
            layer.loss(&q)
        };
        layer_loss(&first) + layer_loss(&second)
    };
    for duo in [false, true] {
        let magnitude = |j: usize| -> f64 {
            let part = |w: &[f32]| {
                let group = &w[j / 32 * 32..][..32];
                f64::from(w[j].abs() / group.iter().fold(0f32, |most, w| w.abs().max(most)))
            };
            let parts = first.w.chunks_exact(cols).chain(second.w.chunks_exact(cols)).map(part);
            parts.sum::<f64>() / 64.0
        };
        let candidates: Vec<(f64, Vec<f64>)> = (0..20)
            .map(|step| {
                let alpha = f64::from(step) / 20.0;
                let raw = |j: usize| {
                    let input = (first.stats.abs_sum()[j] / tokens).powf(alpha);
                    if duo { input / (magnitude(j).powf(1.0 - alpha) + 1e-4) } else { input }
                };
                let raw: Vec<f64> = (0..cols).map(raw).collect();
                let (least, most) =
                    raw.iter().fold((1e300, 0f64), |(a, b), &s| (f64::min(a, s), b.max(s)));
                let scales: Vec<f64> = raw.iter().map(|s| s / (least * most).sqrt()).collect();
                (loss(&scales), scales)
            })
            .collect();
        let best = candidates.iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        let target = integers(4, false, 32, Range::MinMax);
        let group = [&first.w[..], &second.w];
        let found = awq_scales(&cpu, &group, cols, &first.stats, &target, duo).unwrap();
        assert!((found.loss / best.0 - 1.0).abs() < 0.02, "{found:?} against {}", best.0);
        assert!((found.loss_before / loss(&[1.0; 128]) - 1.0).abs() < 0.02);
        assert!(found.loss < 0.95 * found.loss_before);
        let alike = |(a, b): (&f32, &f64)| (f64::from(*a) / b - 1.0).abs() < 1e-5;
        assert!(found.scales.iter().zip(&best.1).all(alike), "α = {}", found.alpha);
    }
}

#[test]
fn clipping_lowers_the_loss() {
    let (layer, cpu) = (Layer::random(40, 128, 3), Cpu::new(2).unwrap());
    for bits in [2, 3, 4] {
        let target = integers(bits, false, 32, Range::MinMax);
        let Target::Grouped(spec) = &target else { unreachable!() };
        let clipped = awq_clip(&cpu, &layer.w, 128, &layer.stats, spec).unwrap();
        let loss = |w: &[f32]| {
            let solved = solve(&cpu, w, 40, 128, &layer.stats, &target, &RTN).unwrap();
            // Each group by itself: the blocks of H on the diagonal.
            let mut loss = 0.0;
            for (w, q) in layer.w.chunks_exact(128).zip(solved.weights.chunks_exact(128)) {
                let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
                for i in 0..128 {
                    let group = i / 32 * 32..i / 32 * 32 + 32;
                    loss += d[i] * group.map(|j| layer.h(i, j) * d[j]).sum::<f64>();
                }
            }
            loss
        };
        let (after, before) = (loss(&clipped), loss(&layer.w));
        assert!(after < before, "{bits} bits: {after} against {before}");
        let shrunk = |(group, clipped): (&[f32], &[f32])| {
            let most = |w: &[f32]| w.iter().fold(0f32, |most, w| w.abs().max(most));
            most(clipped) >= 0.549 * most(group) && most(clipped) <= most(group)
        };
        assert!(layer.w.chunks_exact(32).zip(clipped.chunks_exact(32)).all(shrunk));
    }
}
