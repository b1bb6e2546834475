use bevel_kernels::{Cpu, Isa, RowDivergence, kl_divergence, log_sum_exp};

use crate::random::Random;

/// Lengths around a vector and around the blocks of partial sums, and that of a real vocabulary.
const LENGTHS: [usize; 10] = [1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 50_001];

fn f64s(row: &[f32]) -> impl Iterator<Item = f64> {
    row.iter().map(|&x| f64::from(x))
}

fn naive_log_sum(row: &[f32]) -> f64 {
    let highest = f64s(row).fold(f64::NEG_INFINITY, f64::max);
    highest + f64s(row).map(|x| (x - highest).exp()).sum::<f64>().ln()
}

fn naive(base: &[f32], other: &[f32]) -> RowDivergence {
    let (b, o) = (naive_log_sum(base), naive_log_sum(other));
    let term = |(x, y): (f64, f64)| {
        let p = (x - b).exp();
        if p == 0.0 { 0.0 } else { p * ((x - b) - (y - o)) }
    };
    RowDivergence { kl: f64s(base).zip(f64s(other)).map(term).sum(), base: b, other: o }
}

#[track_caller]
fn check(base: &[f32], other: &[f32]) {
    let expected = naive(base, other);
    let scalar = kl_divergence(&Cpu::with_isa(1, Isa::Scalar), base, other);
    for (name, found, expected, bound) in [
        ("KL", scalar.kl, expected.kl, 1e-6 * (1.0 + expected.kl)),
        ("base", scalar.base, expected.base, 1e-6),
        ("other", scalar.other, expected.other, 1e-6),
    ] {
        assert!((found - expected).abs() <= bound, "{name} is {found}, expected {expected}");
    }
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let bits = |d: RowDivergence| [d.kl.to_bits(), d.base.to_bits(), d.other.to_bits()];
        assert_eq!(bits(kl_divergence(&cpu, base, other)), bits(scalar), "{isa}");
        assert_eq!(log_sum_exp(&cpu, base).to_bits(), scalar.base.to_bits(), "{isa}");
    }
}

#[test]
fn divergence_of_random_rows() {
    for len in LENGTHS {
        for (size, distance) in [(0.0, 1.0), (1.0, 0.01), (10.0, 0.1), (10.0, 3.0), (50.0, 20.0)] {
            let mut random = Random::new(len as u64);
            let base = random.values(len, size);
            let moved = |x: &f32| x + random.value() * distance + 7.0;
            let other: Vec<f32> = base.iter().map(moved).collect();
            check(&base, &other);
        }
    }
}

#[test]
fn equal_rows_do_not_diverge() {
    let row = Random::new(3).values(5000, 12.0);
    assert_eq!(kl_divergence(&Cpu::with_isa(1, Isa::Scalar), &row, &row).kl, 0.0);
}

#[test]
fn excluded_tokens() {
    let (mut base, mut other) = (Random::new(4).values(100, 3.0), Random::new(5).values(100, 3.0));
    base[7] = f32::NEG_INFINITY;
    check(&base, &other);
    other[7] = f32::NEG_INFINITY;
    check(&base, &other);
    // What the base thinks possible and the other impossible is infinitely surprising.
    other[8] = f32::NEG_INFINITY;
    for isa in Isa::available() {
        assert_eq!(kl_divergence(&Cpu::with_isa(1, isa), &base, &other).kl, f64::INFINITY);
    }
}

#[test]
fn rows_that_are_no_distributions() {
    let good = [1.0f32; 40];
    for bad in [f32::NAN, f32::INFINITY] {
        let mut row = good;
        row[33] = bad;
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(1, isa);
            assert!(log_sum_exp(&cpu, &row).is_nan());
            assert!(kl_divergence(&cpu, &row, &good).base.is_nan());
            assert!(kl_divergence(&cpu, &good, &row).other.is_nan());
        }
    }
    assert!(log_sum_exp(&Cpu::with_isa(1, Isa::Scalar), &[f32::NEG_INFINITY; 20]).is_nan());
}
