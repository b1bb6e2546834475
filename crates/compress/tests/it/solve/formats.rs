//! What rounding to nearest makes of a matrix in each format.

use bevel_base::grouped::{Coding, Zeros};
use bevel_compress::Stats;
use bevel_compress::solve::{Codes, Form, GroupSpec, Method, Range, Rtn, ScaleType, Target};
use bevel_kernels::Cpu;

use super::{Layer, RTN, targets};

#[test]
fn weights_are_what_the_form_stands_for() {
    let (layer, cpu) = (Layer::random(70, 256, 1), Cpu::new(2).unwrap());
    for target in targets() {
        let solved = layer.solve(&cpu, &target, &RTN);
        match (&solved.form, &target) {
            (Form::Packed { dtype, bytes }, Target::Packed(wanted)) => {
                assert_eq!(dtype, wanted);
                let mut weights = vec![0.0; layer.w.len()];
                bevel_base::pack::dequantize(*dtype, bytes, &mut weights).unwrap();
                assert_eq!(weights, solved.weights);
                let mut rounded = vec![0; bytes.len()];
                bevel_base::pack::quantize(*dtype, &layer.w, None, &mut rounded).unwrap();
                let mut nearest = vec![0.0; layer.w.len()];
                bevel_base::pack::dequantize(*dtype, &rounded, &mut nearest).unwrap();
                let (found, expected) = (square(&layer, &weights), square(&layer, &nearest));
                assert!(found <= expected * 1.0001, "{dtype}: {found} against {expected}");
            }
            (Form::Grouped { matrix, .. }, Target::Grouped(_)) => {
                assert_eq!(matrix.dequantize(), solved.weights);
                check_nearest(&layer, matrix, &target);
            }
            _ => panic!("{target:?} became {:?}", solved.form),
        }
    }
}

fn square(layer: &Layer, q: &[f32]) -> f64 {
    layer.w.iter().zip(q).map(|(w, q)| f64::from(w - q).powi(2)).sum()
}

/// No other code comes closer to a weight.
#[track_caller]
fn check_nearest(layer: &Layer, matrix: &bevel_base::GroupedMatrix, target: &Target) {
    let groups = matrix.groups();
    for (i, &w) in layer.w.iter().enumerate() {
        let at = i / layer.cols * groups + i % layer.cols / matrix.group_size;
        let scale = matrix.scales[at];
        let value = |code: u8| match &matrix.coding {
            Coding::Integer { bits, zeros } => {
                let zero = match zeros {
                    Zeros::Symmetric => 1 << (bits - 1),
                    Zeros::Each(zeros) => i32::from(zeros[at]),
                };
                scale * (i32::from(code) - zero) as f32
            }
            Coding::Affine { minima, .. } => scale * f32::from(code) + minima[at],
            Coding::Levels(levels) => scale * levels[usize::from(code)],
            Coding::Float8 => scale * bevel_base::pack::e4m3(code),
        };
        let codes = match &matrix.coding {
            Coding::Integer { bits, .. } | Coding::Affine { bits, .. } => 1u32 << bits,
            Coding::Levels(_) => 16,
            Coding::Float8 => 256,
        };
        let distance = |code: u32| (value(code as u8) - w).abs();
        let distances = (0..codes).map(distance).filter(|distance| !distance.is_nan());
        let least = distances.fold(f32::INFINITY, f32::min);
        let found = distance(u32::from(matrix.codes[i]));
        // MLX chooses codes before it rounds scales.
        let slack = if matches!(matrix.coding, Coding::Affine { .. }) { 1e-2 } else { 1e-5 };
        assert!(
            found <= least + slack * scale.abs(),
            "{target:?}: {w} is off by {found}, not {least}"
        );
    }
}

#[test]
fn searched_scales_are_better_than_those_of_the_range() {
    let (layer, cpu) = (Layer::random(40, 256, 2), Cpu::new(1).unwrap());
    for bits in [2, 3, 4] {
        for symmetric in [true, false] {
            let error = |range| {
                let target = super::integers(bits, symmetric, 64, range);
                square(&layer, &layer.solve(&cpu, &target, &RTN).weights)
            };
            let (whole, shrunk, searched) =
                (error(Range::MinMax), error(Range::MSE), error(Range::Search));
            assert!(searched < whole && searched < 1.02 * shrunk, "{bits} bits, {symmetric}");
        }
    }
}

#[test]
fn importance_moves_errors_to_where_they_matter_less() {
    let (layer, cpu) = (Layer::random(40, 256, 3), Cpu::new(1).unwrap());
    let weighted = Method::Rtn(Rtn { weighted: true });
    for target in targets().into_iter().skip(2).take(2) {
        let error = |method| {
            let weights = layer.solve(&cpu, &target, method).weights;
            let importance = layer.stats.square_sum();
            let terms = layer.w.iter().zip(&weights).enumerate();
            terms
                .map(|(i, (w, q))| importance[i % layer.cols] * f64::from(w - q).powi(2))
                .sum::<f64>()
        };
        assert!(error(&weighted) < error(&RTN), "{target:?}");
        let mut unknown = Layer::random(40, 256, 3);
        unknown.stats = Stats::new(256, Default::default());
        let (same, plain) =
            (unknown.solve(&cpu, &target, &weighted), unknown.solve(&cpu, &target, &RTN));
        assert_eq!(same.weights, plain.weights);
    }
}

#[test]
fn layouts_without_single_codes_are_rounded_and_say_so() {
    let (layer, cpu) = (Layer::random(4, 256, 4), Cpu::new(1).unwrap());
    for dtype in [bevel_base::DType::F16, bevel_base::DType::IQ3_XXS] {
        let target = Target::Packed(dtype);
        let solved = layer.solve(&cpu, &target, &Method::Gptq(Default::default()));
        assert!(solved.report.fell_back);
        assert!(solved.report.error > 0.0 && solved.report.error < 0.2, "{:?}", solved.report);
        assert!(!layer.solve(&cpu, &target, &RTN).report.fell_back);
    }
}

/// The arithmetic of `mlx.core.quantize`, with scales and minima in half precision.
#[test]
fn affine_codes_over_the_whole_range_are_those_of_mlx() {
    let (layer, cpu) = (Layer::random(6, 128, 5), Cpu::new(1).unwrap());
    let codes = Codes::Affine { bits: 3 };
    let (scale, range) = (ScaleType::F16, Range::MinMax);
    let target = Target::Grouped(GroupSpec { codes, group_size: Some(32), scale, range });
    let Form::Grouped { matrix, .. } = layer.solve(&cpu, &target, &RTN).form else { panic!() };
    let Coding::Affine { minima, .. } = &matrix.coding else { panic!() };
    let half = |x: f32| bevel_base::pack::Half::from_f32(x).to_f32();
    for (i, group) in layer.w.chunks_exact(32).enumerate() {
        let (low, high) =
            group.iter().fold((f32::MAX, f32::MIN), |(a, b), &w| (a.min(w), b.max(w)));
        let below = low.abs() > high.abs();
        let (edge, sign) = if below { (low, 1.0) } else { (high, -1.0) };
        let scale = sign * ((high - low) / 7.0).max(1e-7);
        let steps = (edge / scale).round_ties_even();
        let (scale, minimum) = if steps == 0.0 { (scale, 0.0) } else { (edge / steps, edge) };
        assert_eq!((matrix.scales[i], minima[i]), (half(scale), half(minimum)));
        for (w, code) in group.iter().zip(&matrix.codes[i * 32..]) {
            let expected = ((w - minimum) / scale).round_ties_even().clamp(0.0, 7.0);
            assert_eq!(f32::from(*code), expected);
        }
    }
}

#[test]
fn zeros_keep_their_sign_where_levels_have_both() {
    let (mut layer, cpu) = (Layer::random(1, 32, 6), Cpu::new(1).unwrap());
    layer.w[..4].copy_from_slice(&[1e-6, -1e-6, 0.0, 1.5]);
    let target = targets()[8].clone();
    let Form::Grouped { matrix, .. } = layer.solve(&cpu, &target, &RTN).form else { panic!() };
    assert_eq!(matrix.codes[..3], [0, 8, 0]);
}
