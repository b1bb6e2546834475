//! SparseGPT's masks and weights against the naive surgeon.

use bevel_compress::solve::{SolveError, Sparsity, sparsegpt};
use bevel_kernels::Cpu;

use super::Layer;
use super::naive::{check_rows, inverse, walk};

/// `U_jj²` for all columns: the pivots of the inverse Hessian when columns are eliminated in order.
fn pivots(layer: &Layer) -> Vec<f64> {
    let cols = layer.cols;
    let mut inverse = inverse(layer, 0.01);
    for j in 0..cols {
        let pivot = inverse[j * cols + j];
        for a in j + 1..cols {
            for b in j + 1..cols {
                inverse[a * cols + b] -= inverse[a * cols + j] * inverse[j * cols + b] / pivot;
            }
        }
    }
    (0..cols).map(|j| inverse[j * cols + j]).collect()
}

#[test]
fn patterns_are_those_of_the_naive_surgeon() {
    let layer = Layer::random(70, 96, 1);
    let (cols, pivots) = (layer.cols, pivots(&layer));
    let order: Vec<usize> = (0..cols).collect();
    for (n, m) in [(2, 4), (4, 8), (1, 3)] {
        let sparsity = Sparsity::Pattern { n, m };
        let pruned =
            sparsegpt(&Cpu::new(2).unwrap(), &layer.w, 70, cols, &layer.stats, sparsity, 0.01)
                .unwrap();
        let mut masks = vec![Vec::new(); 70];
        let expected = walk(&layer, &order, 0.01, |row, j, w| {
            if j % m == 0 {
                let mut run: Vec<usize> = (j..j + m).collect();
                run.sort_by(|&a, &b| {
                    (w[a] * w[a] / pivots[a]).total_cmp(&(w[b] * w[b] / pivots[b]))
                });
                masks[row] = run[..n].to_vec();
            }
            if masks[row].contains(&j) { 0.0 } else { w[j] }
        });
        check_rows(&pruned.weights, &expected, cols, 50);
        for (w, pruned) in pruned.weights.chunks_exact(m).zip(pruned.pruned.chunks_exact(m)) {
            assert_eq!(pruned.iter().filter(|pruned| **pruned).count(), n);
            assert!(w.iter().zip(pruned).all(|(w, pruned)| !pruned || *w == 0.0));
        }
    }
}

#[test]
fn blocks_lose_their_least_weights_over_all_rows() {
    let layer = Layer::random(70, 300, 2);
    let (cols, pivots) = (layer.cols, pivots(&layer));
    let order: Vec<usize> = (0..cols).collect();
    let cpu = Cpu::new(3).unwrap();
    let half = Sparsity::Fraction(0.6);
    let pruned = sparsegpt(&cpu, &layer.w, 70, cols, &layer.stats, half, 0.01).unwrap();
    for first in (0..cols).step_by(128) {
        let block = first..cols.min(first + 128);
        let mask = pruned.pruned.chunks_exact(cols).flat_map(|row| &row[block.clone()]);
        let count = mask.filter(|pruned| **pruned).count();
        assert_eq!(count, (block.len() as f64 * 70.0 * 0.6) as usize);
    }
    // Given the mask, weights are the surgeon's; and the mask is right where it is given those.
    let mut reached = vec![0.0; 70 * cols];
    let mut at_block = vec![0.0; 70 * cols];
    let expected = walk(&layer, &order, 0.01, |row, j, w| {
        if j % 128 == 0 {
            let end = cols.min(j + 128);
            at_block[row * cols + j..row * cols + end].copy_from_slice(&w[j..end]);
        }
        reached[row * cols + j] = w[j];
        if pruned.pruned[row * cols + j] { 0.0 } else { w[j] }
    });
    check_rows(&pruned.weights, &expected, cols, 50);
    for first in (0..cols).step_by(128) {
        let scores = |wanted: bool| {
            let (pruned, w) = (&pruned.pruned, &at_block);
            let block = (0..70).flat_map(move |row| {
                (first..cols.min(first + 128)).map(move |j| (row * cols + j, j))
            });
            block
                .filter(move |(at, _)| pruned[*at] == wanted)
                .map(|(at, j)| w[at] * w[at] / pivots[j])
        };
        let (lost, kept) = (scores(true).fold(0.0, f64::max), scores(false).fold(1e300, f64::min));
        assert!(lost <= kept * 1.001, "block {first}: lost {lost}, kept {kept}");
    }
    let magnitude: Vec<f32> = {
        let mut sizes: Vec<f32> = layer.w.iter().map(|w| w.abs()).collect();
        sizes.sort_by(f32::total_cmp);
        let least = sizes[sizes.len() * 6 / 10];
        layer.w.iter().map(|&w| if w.abs() < least { 0.0 } else { w }).collect()
    };
    assert!(layer.loss(&pruned.weights) < 0.5 * layer.loss(&magnitude));
}

#[test]
fn patterns_that_do_not_fit_are_refused() {
    let (layer, cpu) = (Layer::random(2, 30, 3), Cpu::new(1).unwrap());
    for sparsity in [
        Sparsity::Pattern { n: 2, m: 4 },
        Sparsity::Pattern { n: 3, m: 3 },
        Sparsity::Fraction(1.0),
        Sparsity::Fraction(f64::NAN),
    ] {
        let result = sparsegpt(&cpu, &layer.w, 2, 30, &layer.stats, sparsity, 0.01);
        assert!(matches!(result, Err(SolveError::Target(_))), "{sparsity:?}");
    }
}
