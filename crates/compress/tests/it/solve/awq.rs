//! AWQ's scales and ranges against naive computations in f64.

use bevel_compress::solve::{Awq, AwqScales, Method, Range, Rtn, Target, awq_scales, solve};
use bevel_compress::{Needs, Stats};
use bevel_kernels::Cpu;

use super::{Layer, integers, targets};

const WEIGHTED: Method = Method::Rtn(Rtn { weighted: true });

/// `‖Q(W diag s) diag(s)⁻¹ X − W X‖²`, with the rounding that mean squares of the inputs weigh.
fn loss(cpu: &Cpu, layer: &Layer, target: &Target, scales: &[f32]) -> f64 {
    let cols = layer.cols;
    let scaled: Vec<f32> = layer.w.iter().enumerate().map(|(i, w)| w * scales[i % cols]).collect();
    // The inputs of the scaled layer are smaller; only their squares matter here.
    let mut stats = Stats::new(cols, Needs::default());
    let x: Vec<f32> = (0..cols).map(|j| (layer.h(j, j) as f32).sqrt() / scales[j]).collect();
    stats.add(cpu, &x, 1, None);
    let solved = solve(cpu, &scaled, layer.rows, cols, &stats, target, &WEIGHTED).unwrap();
    let q: Vec<f32> =
        solved.weights.iter().enumerate().map(|(i, q)| q / scales[i % cols]).collect();
    layer.loss(&q)
}

fn search(cpu: &Cpu, layers: &[&Layer], target: &Target, ties: Option<&[usize]>) -> AwqScales {
    let group: Vec<&[f32]> = layers.iter().map(|layer| &layer.w[..]).collect();
    awq_scales(cpu, &group, layers[0].cols, &layers[0].stats, target, ties).unwrap()
}

#[test]
fn scales_lose_hardly_more_than_the_best_of_the_papers_grid() {
    let (first, mut second) = (Layer::random(240, 128, 1), Layer::random(400, 128, 2));
    second.stats = first.stats.clone();
    let cpu = Cpu::new(2).unwrap();
    let target = integers(4, false, 32, Range::Search);
    let both = |scales: &[f32]| -> f64 {
        [&first, &second].map(|layer| loss(&cpu, layer, &target, scales)).iter().sum()
    };
    let found = search(&cpu, &[&first, &second], &target, None);
    // The search looks less closely for the ranges that go with its scales.
    let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 0.2, "{a} and {b}");
    close(found.loss, both(&found.scales));
    close(found.loss_before, both(&[1.0; 128]));
    let tokens = first.stats.tokens() as f64;
    let best = (0..20)
        .map(|step| {
            let mean = |j: usize| first.stats.abs_sum()[j] / tokens;
            let scales: Vec<f32> =
                (0..128).map(|j| mean(j).powf(f64::from(step) / 20.0) as f32).collect();
            both(&scales)
        })
        .fold(f64::INFINITY, f64::min);
    assert!(best < 0.97 * found.loss_before, "inputs differ too little for a test");
    // Inputs that have much in common make losses of rounding differ by chance.
    let own = both(&found.scales);
    assert!(own <= 1.1 * best && own < 0.97 * found.loss_before, "{own} against {best}");
}

#[test]
fn tied_columns_have_one_scale() {
    let (layer, cpu) = (Layer::random(48, 128, 5), Cpu::new(2).unwrap());
    let target = integers(4, false, 32, Range::Search);
    // Two pairs of heads, 32 wide: each pair shares.
    let ties: Vec<usize> = (0..128).map(|j| j / 64 * 32 + j % 32).collect();
    let found = search(&cpu, &[&layer], &target, Some(&ties));
    for (j, &tie) in ties.iter().enumerate() {
        assert_eq!(found.scales[j], found.scales[tie / 32 * 64 + tie % 32], "column {j}");
    }
    assert!(found.loss < found.loss_before);
    assert!(search(&cpu, &[&layer], &target, None).loss < found.loss);
}

#[test]
fn a_lone_group_is_clamped_as_the_paper_does_it() {
    // One group a row: there are no others whose errors it could know. Sixteen parts of the range.
    let (layer, cpu) = (Layer::random(40, 32, 3), Cpu::new(2).unwrap());
    for bits in [2, 3, 4] {
        let target = integers(bits, true, 32, Range::MinMax);
        let method = Method::Awq(Awq { sweeps: 1 });
        let solved = solve(&cpu, &layer.w, 40, 32, &layer.stats, &target, &method).unwrap();
        let mut best = [f64::INFINITY; 40];
        for step in 0..16 {
            let factor = 1.0 - step as f32 / 32.0;
            for (row, best) in best.iter_mut().enumerate() {
                let w = &layer.w[row * 32..][..32];
                let most = w.iter().fold(0f32, |most, w| w.abs().max(most)) * factor;
                let (top, zero) = (((1 << bits) - 1) as f32, (1 << (bits - 1)) as f32);
                let scale = most * 2.0 / top;
                let level = |w: &f32| (w / scale + zero).round_ties_even().clamp(0.0, top) - zero;
                let q: Vec<f32> = w.iter().map(|w| level(w) * scale).collect();
                let one = Layer { rows: 1, cols: 32, w: w.to_vec(), stats: layer.stats.clone() };
                *best = best.min(one.loss(&q));
            }
        }
        let (found, best) = (layer.loss(&solved.weights), best.iter().sum::<f64>());
        // The largest value may lie half way between two codes.
        assert!((found / best - 1.0).abs() < 0.02, "{bits} bits: {found} and {best}");
    }
}

#[test]
fn ranges_lower_the_loss_with_every_sweep() {
    let (layer, cpu) = (Layer::random(40, 256, 3), Cpu::new(2).unwrap());
    let grouped = |target: &Target| matches!(target, Target::Grouped(_));
    for target in targets().into_iter().filter(grouped) {
        let solved = |method: &Method| layer.solve(&cpu, &target, method).weights;
        let mut before = layer.loss(&solved(&WEIGHTED));
        let first = before;
        for sweeps in 1..4 {
            let after = layer.loss(&solved(&Method::Awq(Awq { sweeps })));
            assert!(after <= before * (1.0 + 1e-5), "{target:?}: {after}, {before} before");
            before = after;
        }
        let is_float = format!("{target:?}").contains("Float8");
        assert!(before < 0.99 * first || is_float, "{target:?}: {before} against {first}");
    }
}
