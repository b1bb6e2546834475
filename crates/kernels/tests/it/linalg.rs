//! Dense linear algebra against f64, over sizes around tiles, panels and blocks; the same bits on
//! every instruction set and number of threads.

use bevel_kernels::linalg::{
    NotPositive, Panels, Precision, Region, Rows, Term, Update, View, cholesky, column_sums, gemm,
    gemm_in, gram, inverse_cholesky_upper, mirror, multiply,
};
use bevel_kernels::{Cpu, Isa};

use crate::random::Random;

/// Runs `op` on every instruction set with one, two and three threads; all results are the same.
#[track_caller]
fn everywhere(op: impl Fn(&Cpu) -> Vec<f32>) -> Vec<f32> {
    let first = op(&Cpu::with_isa(1, Isa::Scalar));
    for isa in Isa::available() {
        for threads in 1..=3 {
            let other = op(&Cpu::with_isa(threads, isa));
            let same = first.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && first.len() == other.len(), "{isa}, {threads} threads");
        }
    }
    first
}

#[track_caller]
fn check_near(values: &[f32], expected: impl Fn(usize) -> f64, bound: f64) {
    for (i, &value) in values.iter().enumerate() {
        let error = (f64::from(value) - expected(i)).abs();
        assert!(error <= bound, "value {i} is {value}, expected {}", expected(i));
    }
}

/// Values of `len` with zeros and large ones among them.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.value() * [0.0, 0.1, 1.0, 4.0][random.below(4)]).collect()
}

#[track_caller]
fn check_product(m: usize, k: usize, n: usize, update: Update, left: bool, right: bool) {
    let (a, b, stride) = (values(m * k, 1), values(k * n, 2), n + 3);
    let start = values((m.max(1) - 1) * stride + n, 3);
    let factor = |data, rows, cols, transposed: bool| match transposed {
        true => View::new(data, cols, rows).transposed(),
        false => View::new(data, rows, cols),
    };
    let (a, b) = (factor(&a, m, k, left), factor(&b, k, n, right));
    let c = everywhere(|cpu| {
        let mut c = start.clone();
        gemm(cpu, update, a, b, &mut c, stride, Region::Whole);
        c
    });
    let sign = if update == Update::Subtract { -1.0 } else { 1.0 };
    let product = |i: usize, j: usize| -> f64 {
        (0..k).map(|k| f64::from(a.at(i, k)) * f64::from(b.at(k, j))).sum()
    };
    let expected = |at: usize| {
        let (i, j) = (at / stride, at % stride);
        let before = if update == Update::Set && j < n { 0.0 } else { f64::from(start[at]) };
        before + if j < n { sign * product(i, j) } else { 0.0 }
    };
    check_near(&c, expected, 2e-6 * (k + 8) as f64);
}

#[test]
fn products_of_all_shapes() {
    let shapes = [
        (1, 1, 1),
        (1, 300, 5),
        (5, 3, 1),
        (12, 16, 32),
        (13, 17, 33),
        (11, 256, 31),
        (7, 257, 16),
        (40, 513, 65),
        (193, 9, 37),
        (25, 5, 520),
        (8, 64, 64),
        (24, 1100, 32),
        (48, 96, 70),
    ];
    for (m, k, n) in shapes {
        for (left, right) in [(false, false), (true, false), (false, true), (true, true)] {
            let update = if left { Update::Add } else { Update::Subtract };
            check_product(m, k, n, update, left, right);
            check_product(m, k, n, Update::Set, left, right);
            check_bf16_product(m, k, n, left, right);
        }
    }
}

/// In bf16 the product is that of rounded factors where the processor has such products, and that of the factors
/// themselves elsewhere; the same bits for any number of threads.
#[track_caller]
fn check_bf16_product(m: usize, k: usize, n: usize, left: bool, right: bool) {
    let (a, b, stride) = (values(m * k, 4), values(k * n, 5), n + 3);
    let factor = |data, rows, cols, transposed: bool| match transposed {
        true => View::new(data, cols, rows).transposed(),
        false => View::new(data, rows, cols),
    };
    let (a, b) = (factor(&a, m, k, left), factor(&b, k, n, right));
    for isa in Isa::available() {
        let round = |value: f32| match isa.has_bf16_products() {
            true => half::bf16::from_f32(value).to_f64(),
            false => f64::from(value),
        };
        let expected = |at: usize| {
            let (i, j) = (at / stride, at % stride);
            match j < n {
                true => (0..k).map(|k| round(a.at(i, k)) * round(b.at(k, j))).sum(),
                false => 7.0,
            }
        };
        let mut first: Option<Vec<f32>> = None;
        for threads in 1..=3 {
            let mut c = vec![7.0; (m - 1) * stride + n];
            let cpu = Cpu::with_isa(threads, isa);
            gemm_in(&cpu, Precision::Bf16, Update::Set, a, b, &mut c, stride);
            check_near(&c, expected, 2e-6 * (k + 8) as f64);
            assert_eq!(first.get_or_insert(c.clone()), &c, "{isa}, {threads} threads");
        }
    }
}

#[test]
fn products_of_nothing_change_nothing() {
    for (m, k, n) in [(0, 3, 4), (3, 0, 4), (3, 4, 0)] {
        let (a, b, start) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
        let c = everywhere(|cpu| {
            let (a, b) = (View::new(&a, m, k), View::new(&b, k, n));
            let mut c = start.clone();
            gemm(cpu, Update::Add, a, b, &mut c, n, Region::Whole);
            c
        });
        assert_eq!(c, start);
        let set = everywhere(|cpu| {
            let (a, b) = (View::new(&a, m, k), View::new(&b, k, n));
            let mut c = start.clone();
            gemm(cpu, Update::Set, a, b, &mut c, n, Region::Whole);
            c
        });
        assert!(set.iter().all(|&c| c == 0.0));
    }
}

#[test]
fn parts_of_matrices_are_multiplied_in_place() {
    let (a, b) = (values(20 * 30, 5), values(30 * 40, 6));
    let (a, b) =
        (View::new(&a, 20, 30).part(3..19, 5..28), View::new(&b, 30, 40).part(6..29, 7..24));
    let c = everywhere(|cpu| {
        let mut c = vec![0.0; 16 * 17];
        gemm(cpu, Update::Add, a, b, &mut c, 17, Region::Whole);
        c
    });
    let expected = |at: usize| -> f64 {
        (0..23).map(|k| f64::from(a.at(at / 17, k)) * f64::from(b.at(k, at % 17))).sum()
    };
    check_near(&c, expected, 1e-4);
}

#[test]
fn gram_matrices_add_up() {
    for (n, cols) in [(1, 1), (3, 70), (300, 33), (64, 129)] {
        let x = values(2 * n * cols, 7);
        let h = everywhere(|cpu| {
            let mut h = vec![0.0; cols * cols];
            gram(cpu, &x[..n * cols], n, cols, &mut h);
            gram(cpu, &x[n * cols..], n, cols, &mut h);
            mirror(cpu, &mut h, cols);
            h
        });
        let expected = |at: usize| -> f64 {
            let column = |row: usize, j: usize| f64::from(x[row * cols + j]);
            (0..2 * n).map(|row| column(row, at / cols) * column(row, at % cols)).sum()
        };
        check_near(&h, expected, 2e-5 * (n + 8) as f64);
    }
}

#[test]
fn column_sums_are_exact_to_doubles() {
    for (n, cols) in [(0, 3), (1, 1), (5, 64), (9, 131)] {
        let x = values(n * cols, 8);
        everywhere(|cpu| {
            let (mut squares, mut sizes) = (vec![0.5; cols], vec![0.25; cols]);
            let mut largest = vec![0.01; cols];
            column_sums(cpu, &x, n, cols, &mut squares, &mut sizes, &mut largest);
            for j in 0..cols {
                let column = || (0..n).map(|row| f64::from(x[row * cols + j]));
                assert_eq!(squares[j], column().fold(0.5, |sum, x| sum + x * x));
                assert_eq!(sizes[j], column().fold(0.25, |sum, x| sum + x.abs()));
                let expected = column().map(|x| x.abs() as f32).fold(0.01, f32::max);
                assert_eq!(largest[j], expected);
            }
            largest
        });
    }
}

/// A Gram matrix of correlated inputs with one per cent of its mean diagonal added.
fn hessian(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let tokens = n / 2 + 3;
    let common = random.values(tokens, 3.0);
    let x: Vec<f64> = (0..tokens * n).map(|i| f64::from(random.value() + common[i / n])).collect();
    let mut h = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            h[i * n + j] = (0..tokens).map(|t| x[t * n + i] * x[t * n + j]).sum::<f64>();
        }
    }
    let damp = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64 * 0.01;
    (0..n).for_each(|i| h[i * n + i] += damp);
    h.iter().map(|&h| h as f32).collect()
}

const SIZES: [usize; 7] = [1, 2, 31, 127, 128, 129, 300];

#[test]
fn cholesky_factors_multiply_to_the_matrix() {
    for n in SIZES {
        let h = hessian(n, 9);
        let l = everywhere(|cpu| {
            let mut l = h.clone();
            cholesky(cpu, &mut l, n).unwrap();
            l
        });
        let l = |i: usize, j: usize| f64::from(l[i * n + j]);
        for i in 0..n {
            for j in 0..n {
                let product: f64 = (0..n).map(|k| l(i, k) * l(j, k)).sum();
                let expected = f64::from(h[i * n + j]);
                let size = f64::from(h[i * n + i] * h[j * n + j]).sqrt();
                assert!((product - expected).abs() < 3e-6 * size, "{n}: ({i}, {j})");
                assert!(j <= i || l(i, j) == 0.0);
            }
        }
    }
}

/// The same matrix by the textbook, in f64: Cholesky factor of the inverse.
fn naive_inverse_factor(h: &[f32], n: usize) -> Vec<f64> {
    // Gauss–Jordan.
    let mut a: Vec<f64> = h.iter().map(|&h| f64::from(h)).collect();
    let mut inverse = vec![0.0; n * n];
    (0..n).for_each(|i| inverse[i * n + i] = 1.0);
    for k in 0..n {
        let pivot = a[k * n + k];
        for j in 0..n {
            a[k * n + j] /= pivot;
            inverse[k * n + j] /= pivot;
        }
        for i in (0..n).filter(|&i| i != k) {
            let factor = a[i * n + k];
            for j in 0..n {
                a[i * n + j] -= factor * a[k * n + j];
                inverse[i * n + j] -= factor * inverse[k * n + j];
            }
        }
    }
    // A⁻¹ = Uᵀ U, row by row.
    let mut u = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            let known: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
            let rest = inverse[i * n + j] - known;
            u[i * n + j] = if i == j { rest.sqrt() } else { rest / u[i * n + i] };
        }
    }
    u
}

#[test]
fn the_factor_of_the_inverse_is_that_of_f64() {
    for n in SIZES {
        let h = hessian(n, 10);
        let u = everywhere(|cpu| {
            let mut u = h.clone();
            inverse_cholesky_upper(cpu, &mut u, n).unwrap();
            u
        });
        let expected = naive_inverse_factor(&h, n);
        let diagonals: Vec<f64> = (0..n).map(|i| expected[i * n + i]).collect();
        for (at, (&u, &expected)) in u.iter().zip(&expected).enumerate() {
            let (i, j) = (at / n, at % n);
            // What a solver uses is a row of the factor over its diagonal.
            let size = expected.abs().max(0.1 * diagonals[i]);
            let error = (f64::from(u) - expected).abs();
            // A condition number of some 10⁴ takes four digits of seven.
            assert!(error < 2e-3 * size, "{n}: ({i}, {j}) is {u}, expected {expected}");
            assert!(j >= i || u == 0.0);
        }
    }
}

#[test]
fn matrices_that_are_not_positive_are_refused() {
    let cpu = Cpu::with_isa(2, Isa::Scalar);
    for (n, broken) in [(1, 0), (5, 3), (140, 2), (140, 139)] {
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let mut matrix = vec![0.0; n * n];
            (0..n).for_each(|i| matrix[i * n + i] = 1.0);
            matrix[broken * n + broken] = value;
            let expected = Err(NotPositive { pivot: broken });
            assert_eq!(cholesky(&cpu, &mut matrix.clone(), n), expected);
            assert_eq!(inverse_cholesky_upper(&cpu, &mut matrix, n), expected);
        }
    }
}

/// A matrix in memory.
struct Held<'a>(&'a [f32], usize);

impl Rows for Held<'_> {
    fn rows(&self) -> usize {
        self.0.len() / self.1
    }

    fn cols(&self) -> usize {
        self.1
    }

    fn read(&self, index: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[index * self.1..][..self.1]);
    }
}

/// Panels of rows that are read one by one give the bits of the whole product, turned and not.
#[test]
fn rows_are_packed_as_they_are_read() {
    for (n, rows, cols) in [(5, 40, 33), (30, 7, 600), (12, 65, 1030), (3, 1, 1), (40, 700, 16)] {
        let (x, w, d) = (values(n * cols, 1), values(rows * cols, 2), values(n * rows, 3));
        let (matrix, view) = (Held(&w, cols), View::new(&w, rows, cols));
        assert_eq!((matrix.rows(), matrix.cols()), (rows, cols));
        for (isa, precision) in Isa::available()
            .into_iter()
            .flat_map(|isa| [(isa, Precision::Bf16), (isa, Precision::Single)])
        {
            let cpu = Cpu::with_isa(2, isa);
            let (mut left, mut right) = (Panels::default(), Panels::default());
            let (mut found, mut expected) = (vec![7.0; n * rows], vec![8.0; n * rows]);
            let x = View::new(&x, n, cols);
            left.pack_left(&cpu, precision, x);
            right.pack_turned_rows(&cpu, precision, &matrix, 0..rows);
            multiply(&cpu, Update::Set, &[Term::new(&left, &right)], &mut found, rows);
            gemm_in(&cpu, precision, Update::Set, x, view.transposed(), &mut expected, rows);
            assert_eq!(found, expected, "{isa}, {precision:?}: turned");

            let (mut found, mut expected) = (vec![1.0; n * cols], vec![1.0; n * cols]);
            let d = View::new(&d, n, rows);
            left.pack_left(&cpu, precision, d);
            right.pack_rows(&cpu, precision, &matrix, 0..rows);
            multiply(&cpu, Update::Add, &[Term::new(&left, &right)], &mut found, cols);
            gemm_in(&cpu, precision, Update::Add, d, view, &mut expected, cols);
            assert_eq!(found, expected, "{isa}, {precision:?}: not turned");

            // With a further term, and from a later column of the second factors on.
            let column = Panels::WIDTHS;
            if rows > column {
                let (wide, low) = (rows - column, View::new(&w[..n * 3], n, 3));
                let high = View::new(&w[..3 * rows], 3, rows);
                let [mut whole, mut a, mut b, mut rest] = [(); 4].map(|()| Panels::default());
                whole.pack_left(&cpu, precision, x);
                right.pack_turned_rows(&cpu, precision, &matrix, column..rows);
                rest.pack_turned_rows(&cpu, precision, &matrix, 0..rows);
                a.pack_left(&cpu, precision, low);
                b.pack_right(&cpu, precision, high);
                let extra = Term { column, ..Term::new(&a, &b) };
                let mut sum = vec![5.0; n * wide];
                multiply(&cpu, Update::Set, &[Term::new(&whole, &right), extra], &mut sum, wide);
                let later = Term { column, ..Term::new(&whole, &rest) };
                let mut other = vec![6.0; n * wide];
                multiply(&cpu, Update::Set, &[later, extra], &mut other, wide);
                assert_eq!(sum, other, "{isa}, {precision:?}: terms");
                let mut all = vec![5.0; n * rows];
                gemm_in(&cpu, precision, Update::Set, x, view.transposed(), &mut all, rows);
                gemm_in(&cpu, precision, Update::Add, low, high, &mut all, rows);
                let expected = |at: usize| f64::from(all[at / wide * rows + column + at % wide]);
                check_near(&sum, expected, 2e-6 * (cols + 8) as f64);
            }

            // In two parts along the rows.
            let (mut found, cut) = (vec![1.0; n * cols], rows / 4 * 2);
            for part in [0..cut, cut..rows] {
                right.pack_rows(&cpu, precision, &matrix, part.clone());
                let term = Term { first: part.start, ..Term::new(&left, &right) };
                multiply(&cpu, Update::Add, &[term], &mut found, cols);
            }
            check_near(&found, |at| f64::from(expected[at]), 2e-6 * (rows + 8) as f64);
        }
    }
}
