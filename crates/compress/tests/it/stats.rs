//! Calibration statistics against sums in f64; they survive a round trip through bytes.

use bevel_compress::{Needs, Stats};
use bevel_kernels::Cpu;

use crate::support::Values;

const ALL: Needs = Needs { gram: true, cross: true };

fn sample(cols: usize, needs: Needs) -> (Stats, Vec<f32>, Vec<f32>) {
    let cpu = Cpu::new(2).unwrap();
    let mut values = Values::new(11);
    let (x, full) = (values.take(23 * cols), values.take(23 * cols));
    let mut stats = Stats::new(cols, needs);
    let (first, second) = x.split_at(9 * cols);
    stats.add(&cpu, first, 9, Some(&full[..9 * cols]));
    stats.add(&cpu, second, 14, Some(&full[9 * cols..]));
    (stats, x, full)
}

#[test]
fn sums_are_those_of_all_rows() {
    let cols = 37;
    let (stats, x, full) = sample(cols, ALL);
    let sum = |f: &dyn Fn(usize) -> f64| (0..23).map(|row| f(row * cols)).sum::<f64>();
    let (x, full) = (|i: usize| f64::from(x[i]), |i: usize| f64::from(full[i]));
    assert_eq!((stats.tokens(), stats.cols()), (23, cols));
    for i in 0..cols {
        // The values are multiples of 1/64: all sums are exact.
        assert_eq!(stats.square_sum()[i], sum(&|row| x(row + i) * x(row + i)));
        assert_eq!(stats.abs_sum()[i], sum(&|row| x(row + i).abs()));
        let largest = (0..23).map(|row| x(row * cols + i).abs()).fold(0.0, f64::max);
        assert_eq!(f64::from(stats.max_abs()[i]), largest);
        for j in 0..cols {
            if j <= i {
                let gram = stats.gram().unwrap()[i * cols + j];
                assert_eq!(f64::from(gram), sum(&|row| x(row + i) * x(row + j)));
            }
            let cross = stats.cross().unwrap()[i * cols + j];
            let drift = |at: usize| full(at) - x(at);
            assert_eq!(f64::from(cross), sum(&|row| drift(row + i) * x(row + j)));
        }
    }
}
