use bevel_eval::{Mean, Spread};

#[test]
fn mean_and_error_of_known_numbers() {
    // 2, 4, 4, 4, 5, 5, 7, 9: mean 5, Σ(x − 5)² = 32.
    let mut mean = Mean::default();
    mean.extend([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
    assert_eq!((mean.count(), mean.mean()), (8, 5.0));
    assert!((mean.deviation() - (32.0f64 / 7.0).sqrt()).abs() < 1e-15);
    assert!((mean.standard_error() - (32.0f64 / 7.0 / 8.0).sqrt()).abs() < 1e-15);
}

#[test]
fn a_large_offset_costs_no_digits() {
    // Sums of squares in f64 would have lost the variance entirely.
    let mut mean = Mean::default();
    mean.extend((0..1000).map(|i| 1e9 + f64::from(i % 2)));
    assert!((mean.deviation() - (250.0f64 / 999.0).sqrt()).abs() < 1e-6, "{}", mean.deviation());
}

#[test]
fn fewer_than_two_values_have_no_error() {
    let mut mean = Mean::default();
    assert_eq!((mean.mean(), mean.standard_error()), (0.0, 0.0));
    mean.push(3.0);
    assert_eq!((mean.mean(), mean.standard_error()), (3.0, 0.0));
}

#[test]
fn intervals_hold_the_truth_nineteen_times_in_twenty() {
    // Uniform numbers on [0, 1) from a linear congruential generator; their mean is 1/2.
    let mut state = 1u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    const RUNS: usize = 2000;
    let held = (0..RUNS)
        .filter(|_| {
            let mut mean = Mean::default();
            mean.extend((0..50).map(|_| uniform()));
            (mean.mean() - 0.5).abs() < 1.96 * mean.standard_error()
        })
        .count();
    let part = held as f64 / RUNS as f64;
    assert!((0.93..0.965).contains(&part), "{part}");
}

#[test]
fn spread_of_a_handful() {
    assert_eq!(Spread::of(&[]), None);
    let spread = Spread::of(&[3.0, 1.0, 2.0, 10.0]).unwrap();
    assert_eq!((spread.min, spread.median, spread.mean, spread.max), (1.0, 2.5, 4.0, 10.0));
    assert_eq!(Spread::of(&[5.0, 1.0, 2.0]).unwrap().median, 2.0);
}
