//! GPTQ against the naive surgeon, and against rounding to nearest.

use bevel_base::{DType, pack};
use bevel_compress::solve::{
    Form, Gptq, Method, Order, Range, SolveError, Target, rounding_error, solve,
};
use bevel_compress::{Needs, Stats};
use bevel_kernels::{Cpu, Isa};

use super::naive::{by_size, check_rows, inverse, walk as naive_walk};
use super::{Layer, RTN, bits, integers, targets, walk};

/// The value of a symmetric grid of `2^bits` codes nearest to `w`.
fn nearest(w: f64, scale: f64, zero: f64, bits: u32) -> f64 {
    let top = f64::from((1u32 << bits) - 1);
    ((w / scale + zero).round_ties_even().clamp(0.0, top) - zero) * scale
}

#[test]
fn groups_in_natural_order_are_those_of_the_naive_surgeon() {
    let (layer, cpu) = (Layer::random(40, 160, 1), Cpu::new(2).unwrap());
    for (size, symmetric) in [(32, true), (160, true), (40, false), (32, false)] {
        let solved =
            layer.solve(&cpu, &integers(4, symmetric, size, Range::MinMax), &walk(Order::Natural));
        let order: Vec<usize> = (0..layer.cols).collect();
        let mut grids = vec![(0.0, 0.0); layer.rows];
        let expected = naive_walk(&layer, &order, 0.01, |row, j, w| {
            if j % size == 0 {
                // Scales are fixed on the updated weights when a group is reached.
                let group = &w[j..j + size];
                let (low, high) =
                    group.iter().fold((0f64, 0f64), |(a, b), &w| (a.min(w), b.max(w)));
                grids[row] = if symmetric {
                    (high.max(-low) * 2.0 / 15.0, 8.0)
                } else {
                    let scale = (high - low) / 15.0;
                    (scale, (-low / scale).round_ties_even())
                };
            }
            nearest(w[j], grids[row].0, grids[row].1, 4)
        });
        check_rows(&solved.weights, &expected, layer.cols, 50);
    }
}

#[test]
fn static_groups_follow_the_order_of_size() {
    let (layer, cpu) = (Layer::random(40, 128, 2), Cpu::new(1).unwrap());
    let solved =
        layer.solve(&cpu, &integers(3, true, 32, Range::Search), &walk(Order::StaticGroups));
    let Form::Grouped { matrix, .. } = &solved.form else { panic!("groups") };
    assert_eq!(matrix.group_of, None);
    let expected = naive_walk(&layer, &by_size(&layer), 0.01, |row, j, w| {
        nearest(w[j], f64::from(matrix.scales[row * 4 + j / 32]), 4.0, 3)
    });
    check_rows(&solved.weights, &expected, layer.cols, 50);
}

#[test]
fn act_order_makes_groups_of_columns_that_follow_each_other() {
    let (layer, cpu) = (Layer::random(40, 128, 3), Cpu::new(1).unwrap());
    let solved = layer.solve(&cpu, &integers(4, true, 32, Range::MinMax), &walk(Order::ActOrder));
    let Form::Grouped { matrix, .. } = &solved.form else { panic!("groups") };
    let order = by_size(&layer);
    let group_of = matrix.group_of.as_ref().unwrap();
    for (position, &j) in order.iter().enumerate() {
        assert_eq!(group_of[j] as usize, position / 32);
    }
    let mut scales = vec![0.0; layer.rows];
    let mut position = 0;
    let mut last = order[0];
    let expected = naive_walk(&layer, &order, 0.01, |row, j, w| {
        if j != last {
            (position, last) = (position + 1, j);
        }
        if position % 32 == 0 {
            let group = &order[position..position + 32];
            scales[row] = group.iter().fold(0f64, |most, &k| most.max(w[k].abs())) * 2.0 / 15.0;
        }
        nearest(w[j], scales[row], 8.0, 4)
    });
    check_rows(&solved.weights, &expected, layer.cols, 50);
}

#[test]
fn block_formats_are_those_of_the_naive_surgeon() {
    let (layer, cpu) = (Layer::random(24, 512, 4), Cpu::new(2).unwrap());
    for dtype in [DType::Q4_K, DType::Q2_K, DType::Q3_K, DType::IQ4_NL] {
        let solved = layer.solve(&cpu, &Target::Packed(dtype), &walk(Order::Natural));
        let order: Vec<usize> = (0..layer.cols).collect();
        let importance: Vec<f32> = order.iter().map(|&j| layer.h(j, j) as f32).collect();
        let grid = pack::grid::Grid::of(dtype).unwrap();
        let (span, group) = (grid.block_len(), grid.group_len());
        let mut scales = vec![(Vec::new(), Vec::new()); layer.rows];
        let expected = naive_walk(&layer, &order, 0.01, |row, j, w| {
            if j % span == 0 {
                let x: Vec<f32> = w[j..j + span].iter().map(|&w| w as f32).collect();
                let (mut steps, mut offsets) = (vec![0.0; span / group], vec![0.0; span / group]);
                let mut blocks = vec![0; grid.block_bytes()];
                let weights = Some(&importance[j..j + span]);
                grid.fit(&x, weights, &mut blocks, &mut steps, &mut offsets).unwrap();
                scales[row] = (steps, offsets);
            }
            let at = j % span / group;
            let (step, offset) = (f64::from(scales[row].0[at]), f64::from(scales[row].1[at]));
            let t = if step == 0.0 { 0.0 } else { (w[j] - offset) / step };
            step * f64::from(grid.levels().level(grid.levels().nearest(t as f32))) + offset
        });
        check_rows(&solved.weights, &expected, layer.cols, 8);
    }
}

#[test]
fn real_layers_lose_less_than_by_rounding() {
    let (layer, cpu) = (Layer::real(), Cpu::new(2).unwrap());
    let energy = layer.loss(&vec![0.0; layer.w.len()]);
    for target in targets() {
        let rounded = layer.solve(&cpu, &target, &RTN);
        let walked = layer.solve(&cpu, &target, &walk(Order::StaticGroups));
        let natural = layer.solve(&cpu, &target, &walk(Order::Natural));
        let refined = layer.solve(&cpu, &target, &Method::Gptq(Gptq::default()));
        let loss = layer.loss(&refined.weights) / energy;
        assert!((refined.report.error / loss - 1.0).abs() < 1e-3, "{target:?}: {loss}");
        let before = |s| rounding_error(&cpu, &layer.w, layer.rows, &layer.stats, &target, s);
        let rtn = before(Some(&refined)).unwrap();
        // From a quarter of the rows.
        let off = rounded.report.error / rtn - 1.0;
        assert!(off.abs() < 0.2, "{target:?}: {off}");
        let alone = before(None).unwrap();
        assert!((rounded.report.error / alone - 1.0).abs() < 0.3, "{target:?}: {alone}");
        for better in [&walked, &natural] {
            assert!(better.report.error < 0.8 * rtn, "{target:?}: {:?}", better.report);
        }
        assert!(
            refined.report.error < 0.99 * walked.report.error,
            "{target:?}: {:?}",
            refined.report
        );
    }
}

#[test]
fn results_do_not_depend_on_threads_or_instruction_sets() {
    let layer = Layer::random(70, 256, 5);
    let natural = Method::Gptq(Gptq { order: Order::Natural, ..Gptq::default() });
    let all = [Target::Packed(DType::Q4_K), integers(2, false, 32, Range::Search)];
    for target in all.iter().chain(&[targets()[7].clone(), targets()[9].clone()]) {
        for method in [&RTN, &natural, &Method::Gptq(Gptq::default())] {
            let expected = bits(&layer.solve(&Cpu::with_isa(1, Isa::Scalar), target, method).form);
            for (threads, isa) in [2, 3, 1].into_iter().zip(Isa::available().into_iter().rev()) {
                let solved = layer.solve(&Cpu::with_isa(threads, isa), target, method);
                assert!(bits(&solved.form) == expected, "{target:?}: {isa}, {threads} threads");
            }
        }
    }
}

/// Inputs of which one is always zero and one a copy of another, and weights.
fn degenerate() -> Layer {
    let mut layer = Layer::random(8, 64, 6);
    let mut random = super::random(7);
    let mut x: Vec<f32> = (0..40 * 64).map(|_| random()).collect();
    for row in x.chunks_exact_mut(64) {
        (row[5], row[9]) = (0.0, row[10]);
    }
    layer.stats = Stats::new(64, Needs { gram: true, cross: false });
    layer.stats.add(&Cpu::new(1).unwrap(), &x, 40, None);
    layer
}

#[test]
fn degenerate_inputs_are_counted() {
    let (layer, cpu) = (degenerate(), Cpu::new(1).unwrap());
    let exact = Method::Gptq(Gptq { damping: 0.0, ..Gptq::default() });
    let solved = layer.solve(&cpu, &integers(4, true, 32, Range::MinMax), &exact);
    assert_eq!(solved.report.dead_columns, 1);
    assert!(solved.report.damping_retries > 0);
    assert!(solved.weights.chunks_exact(64).all(|row| row[5] == 0.0));
    let solved = layer.solve(&cpu, &integers(4, true, 32, Range::MinMax), &walk(Order::Natural));
    assert_eq!(solved.report.damping_retries, 0);
}

#[test]
fn what_cannot_be_solved_is_refused() {
    let (mut layer, cpu) = (Layer::random(4, 32, 8), Cpu::new(1).unwrap());
    let (good, bad) = (integers(4, true, 32, Range::MinMax), integers(4, true, 33, Range::MinMax));
    let run = |layer: &Layer, target: &Target, method: &Method| {
        solve(&cpu, &layer.w, layer.rows, layer.cols, &layer.stats, target, method).unwrap_err()
    };
    let gptq = Method::Gptq(Gptq::default());
    assert!(matches!(run(&layer, &bad, &gptq), SolveError::Target(_)));
    assert!(matches!(
        run(&layer, &integers(9, true, 32, Range::MinMax), &RTN),
        SolveError::Target(_)
    ));
    assert!(matches!(run(&layer, &Target::Packed(DType::Q4_K), &RTN), SolveError::Layout(_)));
    let drifting = Method::Gptq(Gptq { drift: 0.25, ..Gptq::default() });
    assert!(matches!(run(&layer, &good, &drifting), SolveError::Missing { .. }));
    let known = std::mem::replace(&mut layer.stats, Stats::new(32, Needs::default()));
    assert!(matches!(run(&layer, &good, &gptq), SolveError::Missing { .. }));
    layer.stats = Stats::new(32, Needs { gram: true, cross: false });
    layer.stats.add(&cpu, &[f32::INFINITY; 32], 1, None);
    assert!(matches!(run(&layer, &good, &gptq), SolveError::Inputs { column: 0, .. }));
    layer.stats = known;
    layer.w[7] = f32::NAN;
    assert!(matches!(run(&layer, &good, &gptq), SolveError::Weights { index: 7, .. }));
}

/// `‖Ŵ X − W X̃‖²` less what no `Ŵ` changes: `tr(D H Dᵀ) − 2 tr(D X ΔXᵀ Wᵀ)`.
fn asymmetric_loss(layer: &Layer, q: &[f32]) -> f64 {
    let (cols, cross) = (layer.cols, layer.stats.cross().unwrap());
    let mut pull = 0.0;
    for (w, q) in layer.w.chunks_exact(cols).zip(q.chunks_exact(cols)) {
        for j in 0..cols {
            let moved: f64 =
                (0..cols).map(|i| f64::from(w[i]) * f64::from(cross[i * cols + j])).sum();
            pull += (f64::from(q[j]) - f64::from(w[j])) * moved;
        }
    }
    layer.loss(q) - 2.0 * pull
}

#[test]
fn drift_of_the_inputs_is_corrected() {
    let cpu = Cpu::new(2).unwrap();
    let mut layer = Layer::random(40, 128, 9);
    let mut random = super::random(10);
    let full: Vec<f32> = (0..500 * 128).map(|_| random()).collect();
    let x: Vec<f32> = full.iter().map(|x| x * 0.8 + random() * 0.2).collect();
    layer.stats = Stats::new(128, Needs { gram: true, cross: true });
    layer.stats.add(&cpu, &x, 500, Some(&full));
    let target = integers(4, true, 32, Range::Search);
    for refine in [Some(0), Some(2)] {
        let loss = |drift: f32| {
            let options = Gptq { drift, refine, ..Gptq::default() };
            asymmetric_loss(&layer, &layer.solve(&cpu, &target, &Method::Gptq(options)).weights)
        };
        let (plain, quarter, whole) = (loss(0.0), loss(0.25), loss(1.0));
        assert!(whole < quarter && quarter < plain, "{refine:?}: {plain} {quarter} {whole}");
    }
}

#[test]
fn drift_moves_the_weights_to_those_of_least_squares() {
    let cpu = Cpu::new(2).unwrap();
    let (rows, cols, tokens) = (20, 32, 400);
    let mut layer = Layer::random(rows, cols, 12);
    let mut random = super::random(13);
    let mut values = |count: usize| -> Vec<f32> { (0..count).map(|_| random()).collect() };
    let x = values(tokens * cols);
    let full: Vec<f32> = x.iter().zip(values(tokens * cols)).map(|(x, r)| x + 0.3 * r).collect();
    let lost = values(tokens * rows);
    layer.stats = Stats::new(cols, Needs { gram: true, cross: true });
    layer.stats.add(&cpu, &x, tokens, Some(&full));
    layer.stats.add_residual(&cpu, &x, &lost, tokens);
    // The outputs to be met, less those that the weights give: `w ΔX + ΔR`, times `xᵀ (H + λI)⁻¹`.
    let inverse = inverse(&layer, 0.01);
    let alpha = 0.8 * tokens as f64 / (tokens + 3 * cols) as f64;
    let mut expected: Vec<f64> = layer.w.iter().map(|&w| f64::from(w)).collect();
    for row in 0..rows {
        let mut d = vec![0.0; cols];
        for token in 0..tokens {
            let drift =
                |j: usize| f64::from(full[token * cols + j]) - f64::from(x[token * cols + j]);
            let missed: f64 =
                (0..cols).map(|j| f64::from(layer.w[row * cols + j]) * drift(j)).sum::<f64>()
                    + f64::from(lost[token * rows + row]);
            for (d, x) in d.iter_mut().zip(&x[token * cols..]) {
                *d += missed * f64::from(*x);
            }
        }
        for j in 0..cols {
            let shift: f64 = (0..cols).map(|i| d[i] * inverse[i * cols + j]).sum();
            expected[row * cols + j] += alpha * shift;
        }
    }
    // Codes so fine that they stand for the weights themselves.
    let options = Gptq { drift: 0.8, refine: Some(0), ..Gptq::default() };
    let target = integers(8, false, 32, Range::MinMax);
    let solved = layer.solve(&cpu, &target, &Method::Gptq(options));
    let moved: f64 = layer.w.iter().zip(&expected).map(|(w, e)| (f64::from(*w) - e).powi(2)).sum();
    let off: f64 =
        solved.weights.iter().zip(&expected).map(|(q, e)| (f64::from(*q) - e).powi(2)).sum();
    assert!(off < 5e-3 * moved, "{off} is left of {moved}");
}

#[test]
fn the_naive_inverse_is_one() {
    let layer = Layer::random(1, 32, 11);
    let inverse = inverse(&layer, 0.0);
    for i in 0..32 {
        let product: f64 = (0..32).map(|k| layer.h(i, k) * inverse[k * 32 + i]).sum();
        assert!((product - 1.0).abs() < 1e-6);
    }
}
