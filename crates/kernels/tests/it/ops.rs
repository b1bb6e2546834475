//! Norms, rope, activations and element-wise operations against f64, over lengths with tails and
//! values from tiny to huge; the same bits on every instruction set and number of threads.

use bevel_kernels::{
    Cpu, Isa, RopeSpec, RopeStyle, RopeTable, add, add_bias, add_scaled, gelu_erf_mul,
    gelu_tanh_mul, rms_norm, rms_norm_in_place, rope, scale, silu_mul, softcap, softmax,
};

use crate::random::Random;

/// Lengths around a vector, and one that is worth several threads.
const LENGTHS: [usize; 12] = [0, 1, 2, 7, 15, 16, 17, 31, 33, 100, 1000, 50_001];

/// Values of every size, with the special ones that a sum of squares survives.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut values: Vec<f32> = (0..len)
        .map(|_| random.value() * [1e-6, 0.1, 1.0, 5.0, 30.0, 200.0][random.below(6)])
        .collect();
    let special = [0.0, -0.0, 1e-40, f32::MIN_POSITIVE, 1e6, -1e6];
    values.iter_mut().skip(3).zip(special).for_each(|(value, special)| *value = special);
    values
}

/// Runs `op` on every instruction set and on one and three threads, and compares with `expected` as
/// `|error| ≤ relative · |expected| + absolute`.
#[track_caller]
fn check(expected: &[f64], relative: f64, absolute: f64, op: impl Fn(&Cpu) -> Vec<f32>) {
    let scalar = op(&Cpu::with_isa(1, Isa::Scalar));
    assert_eq!(scalar.len(), expected.len());
    for (i, (&value, &expected)) in scalar.iter().zip(expected).enumerate() {
        let error = (f64::from(value) - expected).abs();
        let bound = relative * expected.abs() + absolute;
        assert!(error <= bound, "value {i} is {value:e}, expected {expected:e}");
    }
    for isa in Isa::available() {
        for threads in [1, 3] {
            let other = op(&Cpu::with_isa(threads, isa));
            let same = scalar.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && other.len() == scalar.len(), "{isa}, {threads} threads");
        }
    }
}

fn f64s(values: &[f32]) -> impl Iterator<Item = f64> {
    values.iter().map(|&v| f64::from(v))
}

/// erf by its series near zero and erfc by its continued fraction elsewhere.
fn normal_cdf(x: f64) -> f64 {
    let y = x.abs() / std::f64::consts::SQRT_2;
    let tail = if y < 2.5 {
        let (mut term, mut sum) = (y, y);
        for n in 1..100 {
            term *= -y * y / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        1.0 - sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..200).rev().fold(y, |f, n| y + f64::from(n) / 2.0 / f);
        (-y * y).exp() / std::f64::consts::PI.sqrt() / fraction
    };
    if x < 0.0 { tail / 2.0 } else { 1.0 - tail / 2.0 }
}

/// The exponent's argument is rounded, so e^x loses |x| · 2⁻²⁴: far in a tail whose value nobody sees.
#[test]
fn gated_activations() {
    type Op = fn(&Cpu, &mut [f32], &[f32], &[f32]);
    type Exact<'a> = &'a dyn Fn(f64) -> f64;
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let gelu_tanh = |x: f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        x / (1.0 + (-2.0 * u).exp())
    };
    let gelu = |x: f64| x * normal_cdf(x);
    let ops: [(Op, Exact<'_>, f64); 3] =
        [(silu_mul, &silu, 8e-7), (gelu_tanh_mul, &gelu_tanh, 2e-5), (gelu_erf_mul, &gelu, 2e-5)];
    for (op, exact, relative) in ops {
        for len in LENGTHS {
            let (gate, up) = (values(len, 1), Random::new(2).values(len, 2.0));
            let expected: Vec<f64> =
                f64s(&gate).zip(f64s(&up)).map(|(g, u)| exact(g) * u).collect();
            check(&expected, relative, 1e-30, |cpu| {
                let mut out = vec![f32::NAN; len];
                op(cpu, &mut out, &gate, &up);
                out
            });
        }
    }
}

/// Where it matters, between −4 and 4, the activations are within a few units in the last place.
#[test]
fn gated_activations_in_their_usual_range() {
    let gate: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 1e-3).collect();
    let up = vec![1.0; gate.len()];
    let run = |op: fn(&Cpu, &mut [f32], &[f32], &[f32])| {
        let (gate, up) = (&gate, &up);
        move |cpu: &Cpu| {
            let mut out = vec![0.0; gate.len()];
            op(cpu, &mut out, gate, up);
            out
        }
    };
    let exact = |f: &dyn Fn(f64) -> f64| f64s(&gate).map(f).collect::<Vec<f64>>();
    check(&exact(&|x| x / (1.0 + (-x).exp())), 5e-7, 0.0, run(silu_mul));
    let tanh_form = |x: f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        0.5 * x * (1.0 + u.tanh())
    };
    check(&exact(&tanh_form), 1e-6, 1e-8, run(gelu_tanh_mul));
    check(&exact(&|x| x * normal_cdf(x)), 1.5e-6, 0.0, run(gelu_erf_mul));
}

#[test]
fn activations_of_the_infinite() {
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        for op in [silu_mul, gelu_tanh_mul, gelu_erf_mul] {
            let mut out = [0.0; 3];
            op(&cpu, &mut out, &[f32::INFINITY, -1e30, f32::NAN], &[1.0; 3]);
            assert!(out[0] == f32::INFINITY && out[1] == 0.0 && out[2].is_nan(), "{isa}: {out:?}");
        }
    }
}

#[test]
fn sums_and_scales() {
    for len in LENGTHS {
        let (x, y) = (values(len, 3), values(len, 4));
        let pairs = || f64s(&x).zip(f64s(&y));
        let expected: Vec<f64> = pairs().map(|(x, y)| x + y).collect();
        check(&expected, 1e-7, 1e-44, |cpu| {
            let mut x = x.clone();
            add(cpu, &mut x, &y);
            x
        });
        // Cancellation: relative to the operands.
        let expected: Vec<f64> = pairs().map(|(x, y)| x + f64::from(0.37f32) * y).collect();
        let largest = pairs().map(|(x, y)| x.abs().max(y.abs())).fold(0.0, f64::max);
        check(&expected, 1e-7, 1e-7 * largest, |cpu| {
            let mut x = x.clone();
            add_scaled(cpu, &mut x, &y, 0.37);
            x
        });
        let expected: Vec<f64> = f64s(&x).map(|x| x * f64::from(0.37f32)).collect();
        check(&expected, 1e-7, 1e-44, |cpu| {
            let mut x = x.clone();
            scale(cpu, &mut x, 0.37);
            x
        });
        for cap in [1.0, 30.0, 50.0] {
            let expected: Vec<f64> = f64s(&x).map(|x| cap * (x / cap).tanh()).collect();
            check(&expected, 5e-7, 1e-42, |cpu| {
                let mut x = x.clone();
                softcap(cpu, &mut x, cap as f32);
                x
            });
        }
    }
}

#[test]
fn biases() {
    for (n, d) in [(0, 5), (1, 1), (3, 17), (100, 576), (2, 40_000)] {
        let (x, bias) = (values(n * d, 5), values(d, 6));
        let expected: Vec<f64> =
            f64s(&x).enumerate().map(|(i, x)| x + f64::from(bias[i % d])).collect();
        check(&expected, 1e-7, 1e-44, |cpu| {
            let mut x = x.clone();
            add_bias(cpu, &mut x, &bias, n, d);
            x
        });
    }
}

#[test]
fn root_mean_square_norms() {
    for (n, d) in [(0, 8), (1, 1), (4, 7), (3, 16), (5, 63), (2, 576), (90, 576), (1, 8192)] {
        for size in [1e-10, 1e-3, 1.0, 1e4, 1e15] {
            let x = Random::new(7).values(n * d, size);
            let weight = Random::new(8).values(d, 2.0);
            let mut expected = Vec::new();
            for row in x.chunks_exact(d) {
                let mean = f64s(row).map(|v| v * v).sum::<f64>() / d as f64;
                let scale = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
                expected.extend(f64s(row).zip(f64s(&weight)).map(|(x, w)| x * scale * w));
            }
            check(&expected, 1e-6, 1e-40, |cpu| {
                let mut out = vec![f32::NAN; n * d];
                rms_norm(cpu, &mut out, &x, &weight, 1e-5, n, d);
                out
            });
            check(&expected, 1e-6, 1e-40, |cpu| {
                let mut x = x.clone();
                rms_norm_in_place(cpu, &mut x, &weight, 1e-5, n, d);
                x
            });
        }
    }
}

#[test]
fn softmax_of_rows() {
    for len in LENGTHS {
        for size in [0.0, 1.0, 80.0, 1e4] {
            let mut row = Random::new(9).values(len, size);
            if let Some(x) = row.get_mut(5) {
                *x = f32::NEG_INFINITY;
            }
            let highest = f64s(&row).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = f64s(&row).map(|x| (x - highest).exp()).sum();
            let expected: Vec<f64> = f64s(&row).map(|x| (x - highest).exp() / sum).collect();
            // x − max is rounded: e^(x − max) loses |x − max| · 2⁻²⁴.
            check(&expected, 3e-6 + f64::from(size) * 3e-7, 2e-38, |cpu| {
                let mut row = row.clone();
                softmax(cpu, &mut row);
                row
            });
        }
    }
    for isa in Isa::available() {
        let mut row = [f32::NEG_INFINITY; 20];
        softmax(&Cpu::with_isa(1, isa), &mut row);
        assert_eq!(row, [0.0; 20]);
    }
}

/// x, turned by the exact angle, given the frequency and position in f32 as transformers has them.
fn turned(
    x: &[f32],
    heads: usize,
    head_dim: usize,
    spec: &RopeSpec,
    positions: &[u32],
) -> Vec<f64> {
    let half = spec.rotary_dim / 2;
    let mut out: Vec<f64> = f64s(x).collect();
    for (token, &position) in positions.iter().enumerate() {
        for head in 0..heads {
            for i in 0..half {
                let power = (2 * i) as f32 / spec.rotary_dim as f32;
                let factor = spec.factors.as_ref().map_or(1.0, |factors| factors[i]);
                let power = f64::from(spec.theta).powf(f64::from(power)) as f32;
                let angle = 1.0 / power / factor * position as f32;
                let (sin, cos) = f64::from(angle).sin_cos();
                let scale = f64::from(spec.attention_factor);
                let at = (token * heads + head) * head_dim;
                let (a, b) = match spec.style {
                    RopeStyle::Halves => (at + i, at + i + half),
                    RopeStyle::Interleaved => (at + 2 * i, at + 2 * i + 1),
                };
                let (x, y) = (out[a], out[b]);
                out[a] = scale * (x * cos - y * sin);
                out[b] = scale * (y * cos + x * sin);
            }
        }
    }
    out
}

#[test]
fn rotary_embedding() {
    for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
        for (heads, head_dim, rotary_dim) in
            [(1, 2, 2), (3, 64, 64), (2, 80, 32), (2, 10, 6), (9, 128, 128), (2, 8, 0)]
        {
            for (factor, attention_factor) in [(None, 1.0), (Some(8.0), 1.2)] {
                let factors = factor.map(|factor| vec![factor; rotary_dim / 2]);
                let spec =
                    RopeSpec { rotary_dim, theta: 500_000.0, factors, style, attention_factor };
                for n in [0, 1, 5, 40] {
                    let mut random = Random::new(10);
                    let x = random.values(n * heads * head_dim, 2.0);
                    let positions: Vec<u32> =
                        (0..n).map(|_| random.below(100_000) as u32).collect();
                    let expected = turned(&x, heads, head_dim, &spec, &positions);
                    check(&expected, 0.0, 2e-6, |cpu| {
                        let mut x = x.clone();
                        let mut table = RopeTable::new(&spec);
                        table.prepare(cpu, &positions);
                        rope(cpu, &mut x, heads, head_dim, &table);
                        x
                    });
                }
            }
        }
    }
}

/// Cosine and sine of `LlamaRotaryEmbedding` (theta 10,000, head_dim 8) at position 4,095, from
/// transformers on torch in f32.
#[test]
fn rotary_embedding_of_transformers() {
    let spec = RopeSpec {
        rotary_dim: 8,
        theta: 10_000.0,
        factors: None,
        style: RopeStyle::Halves,
        attention_factor: 1.0,
    };
    let cos = [
        -0.065_975_993_871_688_84,
        0.459_863_334_894_180_3,
        -0.994_033_098_220_825_2,
        -0.578_907_907_009_124_8,
    ];
    let sin = [
        -0.997_821_211_814_880_4,
        0.887_989_699_840_545_7,
        -0.109_078_794_717_788_7,
        -0.815_392_911_434_173_6,
    ];
    let expected = [cos, sin].concat();
    check(&expected, 0.0, 1e-7, |cpu| {
        let mut table = RopeTable::new(&spec);
        table.prepare(cpu, &[4095]);
        let mut x = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        rope(cpu, &mut x, 1, 8, &table);
        x.to_vec()
    });
}

#[test]
fn a_table_is_prepared_anew_for_every_batch() {
    let spec = RopeSpec {
        rotary_dim: 4,
        theta: 100.0,
        factors: None,
        style: RopeStyle::Halves,
        attention_factor: 1.0,
    };
    let cpu = Cpu::new(1).unwrap();
    let mut table = RopeTable::new(&spec);
    let mut turned = |positions: &[u32]| {
        table.prepare(&cpu, positions);
        assert_eq!(table.tokens(), positions.len());
        let mut x = vec![1.0; positions.len() * 4];
        rope(&cpu, &mut x, 1, 4, &table);
        x
    };
    let long = turned(&[9, 8, 7]);
    assert_eq!(turned(&[9, 8, 7]), long);
    assert_eq!(turned(&[7]), long[8..]);
    assert_eq!(turned(&[0]), [1.0; 4]);
}
