//! Gradients against finite differences of the same functions in f64; the same bits on every instruction set and
//! number of threads.

use std::ops::Range;

use bevel_kernels::linalg::Precision;
use bevel_kernels::{
    Attended, AttentionGradients, AttentionSpec, Cpu, Isa, RopeSpec, RopeStyle, RopeTable,
    attention_backward, cross_entropy, gelu_erf_mul_backward, gelu_tanh_mul_backward,
    rms_norm_backward, rope, rope_backward, silu_mul_backward, softcap, softcap_backward,
};

use crate::random::Random;

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The gradient of `loss` at `x`, by central differences.
fn differences(x: &[f32], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = f64s(x);
    (0..x.len())
        .map(|i| {
            let (at, step) = (x[i], 1e-5);
            x[i] = at + step;
            let above = loss(&x);
            x[i] = at - step;
            let below = loss(&x);
            x[i] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// Runs `op`, which gives gradients one after the other, on every instruction set and on one and three threads.
#[track_caller]
fn check(what: &str, expected: &[f64], op: impl Fn(&Cpu) -> Vec<f32>) {
    let scalar = op(&Cpu::with_isa(1, Isa::Scalar));
    assert_eq!(scalar.len(), expected.len(), "{what}");
    let size = expected.iter().map(|e| e.abs()).fold(0.0, f64::max);
    for (i, (&value, &expected)) in scalar.iter().zip(expected).enumerate() {
        let error = (f64::from(value) - expected).abs();
        assert!(
            error <= 4e-6 * size + 1e-8,
            "{what}: value {i} is {value:e}, expected {expected:e}"
        );
    }
    for isa in Isa::available() {
        for threads in [1, 3] {
            let other = op(&Cpu::with_isa(threads, isa));
            let same = scalar.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && other.len() == scalar.len(), "{what}: {isa}, {threads} threads");
        }
    }
}

fn weighted(out: &[f64], weights: &[f32]) -> f64 {
    out.iter().zip(weights).map(|(out, &weight)| out * f64::from(weight)).sum()
}

#[test]
fn norms() {
    for (n, d) in [(1, 1), (3, 7), (5, 16), (2, 33), (40, 65)] {
        let mut random = Random::new(d as u64);
        let (x, d_out) = (random.values(n * d, 2.0), random.values(n * d, 1.0));
        let weight = random.values(d, 1.5);
        let eps = 1e-5;
        let norm = |x: &[f64], weight: &[f64]| -> Vec<f64> {
            let row = |x: &[f64]| {
                let scale = (x.iter().map(|x| x * x).sum::<f64>() / d as f64 + eps).sqrt();
                x.iter().zip(weight).map(|(x, w)| x * w / scale).collect::<Vec<f64>>()
            };
            x.chunks(d).flat_map(row).collect()
        };
        let w = f64s(&weight);
        let mut expected = differences(&x, |x| weighted(&norm(x, &w), &d_out));
        let inputs = f64s(&x);
        expected.extend(differences(&weight, |w| weighted(&norm(&inputs, w), &d_out)));
        // Both are added to what is there.
        expected.iter_mut().for_each(|e| *e += 0.5);
        check(&format!("norm [{n}, {d}]"), &expected, |cpu| {
            let (mut d_x, mut d_weight) = (vec![0.5; n * d], vec![0.5; d]);
            let into = Some(&mut d_weight[..]);
            rms_norm_backward(cpu, &mut d_x, into, &d_out, &x, &weight, eps as f32, n, d);
            [d_x, d_weight].concat()
        });
    }
}

#[test]
fn activations() {
    type Op = fn(&Cpu, &mut [f32], &mut [f32], &[f32], &[f32], &[f32]);
    type Exact = fn(f64) -> f64;
    let silu: Exact = |x| x / (1.0 + (-x).exp());
    let tanh: Exact = |x| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        x / 2.0 * (1.0 + u.tanh())
    };
    // x Φ(x), with Φ by the trapezoidal rule from where its tail is nothing.
    let erf: Exact = |x| {
        let (steps, from) = (4000, -12.0);
        let h = (x - from) / f64::from(steps);
        let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let inner: f64 = (1..steps).map(|i| density(from + f64::from(i) * h)).sum();
        x * h * (inner + density(x) / 2.0)
    };
    let ops: [(&str, Op, Exact); 3] = [
        ("silu", silu_mul_backward, silu),
        ("gelu, tanh", gelu_tanh_mul_backward, tanh),
        ("gelu, erf", gelu_erf_mul_backward, erf),
    ];
    for (name, op, exact) in ops {
        for len in [1, 17, 40] {
            let mut random = Random::new(len as u64);
            let (gate, up) = (random.values(len, 6.0), random.values(len, 2.0));
            let d_out = random.values(len, 1.0);
            let product = |gate: &[f64], up: &[f64]| -> Vec<f64> {
                gate.iter().zip(up).map(|(&gate, up)| exact(gate) * up).collect()
            };
            let (g, u) = (f64s(&gate), f64s(&up));
            let mut expected = differences(&gate, |gate| weighted(&product(gate, &u), &d_out));
            expected.extend(differences(&up, |up| weighted(&product(&g, up), &d_out)));
            check(name, &expected, |cpu| {
                let (mut d_gate, mut d_up) = (vec![9.0; len], vec![9.0; len]);
                op(cpu, &mut d_gate, &mut d_up, &d_out, &gate, &up);
                [d_gate, d_up].concat()
            });
        }
    }
}

#[test]
fn softcaps() {
    let mut random = Random::new(3);
    let (x, d_out, cap) = (random.values(37, 60.0), random.values(37, 1.0), 30.0);
    let capped = |x: &[f64]| -> Vec<f64> { x.iter().map(|x| 30.0 * (x / 30.0).tanh()).collect() };
    let expected = differences(&x, |x| weighted(&capped(x), &d_out));
    check("softcap", &expected, |cpu| {
        let (mut y, mut d_x) = (x.clone(), d_out.clone());
        softcap(cpu, &mut y, cap);
        softcap_backward(cpu, &mut d_x, &y, cap);
        d_x
    });
}

/// Turning is linear: ⟨turned x, y⟩ = ⟨x, y turned back⟩ for all x and y.
#[test]
fn rope_is_turned_back() {
    let cpu = Cpu::with_isa(1, Isa::Scalar);
    for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
        let (heads, head_dim) = (3, 20);
        let mut table = RopeTable::new(&RopeSpec {
            rotary_dim: 16,
            theta: 100.0,
            factors: None,
            style,
            attention_factor: 1.25,
        });
        table.prepare(&cpu, &[0, 5, 9]);
        let mut random = Random::new(8);
        let [x, d_out] = [0; 2].map(|_| random.values(3 * heads * head_dim, 1.0));
        let dot =
            |a: &[f32], b: &[f32]| -> f64 { f64s(a).iter().zip(f64s(b)).map(|(a, b)| a * b).sum() };
        let mut turned = x.clone();
        rope(&cpu, &mut turned, heads, head_dim, &table);
        let mut back = d_out.clone();
        rope_backward(&cpu, &mut back, heads, head_dim, &table);
        assert!((dot(&turned, &d_out) - dot(&x, &back)).abs() < 1e-5, "{style:?}");
        check("rope", &f64s(&back), |cpu| {
            let mut back = d_out.clone();
            rope_backward(cpu, &mut back, heads, head_dim, &table);
            back
        });
    }
}

#[test]
fn cross_entropies() {
    let (n, vocab) = (4, 37);
    let mut random = Random::new(1);
    let logits = random.values(n * vocab, 8.0);
    let (targets, weights) = ([3u32, 36, 0, 5], [0.25f32, 0.0, 1.0, 0.5]);
    let losses = |logits: &[f64]| -> Vec<f64> {
        let row = |(row, &target): (&[f64], &u32)| {
            row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[target as usize]
        };
        logits.chunks(vocab).zip(&targets).map(row).collect()
    };
    let expected = differences(&logits, |logits| weighted(&losses(logits), &weights));
    check("cross entropy", &expected, |cpu| {
        let mut gradient = logits.clone();
        let found = cross_entropy(cpu, &mut gradient, &targets, &weights);
        for (i, (found, expected)) in found.iter().zip(losses(&f64s(&logits))).enumerate() {
            let expected = if weights[i] == 0.0 { 0.0 } else { expected };
            assert!((found - expected).abs() < 2e-6, "{found} and not {expected}");
        }
        gradient
    });
}

/// Attention as it is written.
fn attend(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    sequences: &[Range<usize>],
    spec: &AttentionSpec,
) -> Vec<f64> {
    let AttentionSpec { heads, kv_heads, head_dim: d, .. } = *spec;
    let mut out = vec![0.0; q.len()];
    for rows in sequences {
        for (i, head) in rows.clone().flat_map(|i| (0..heads).map(move |head| (i, head))) {
            let first = spec
                .window
                .map_or(rows.start, |window| rows.start.max((i + 1).saturating_sub(window)));
            let kv = |j: usize| (j * kv_heads + head / (heads / kv_heads)) * d;
            let query = &q[(i * heads + head) * d..][..d];
            let scores: Vec<f64> = (first..=i)
                .map(|j| {
                    let dot: f64 = query.iter().zip(&k[kv(j)..]).map(|(q, k)| q * k).sum();
                    let score = dot * f64::from(spec.scale);
                    spec.softcap
                        .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let sum: f64 = scores.iter().map(|score| score.exp()).sum();
            for (j, score) in (first..=i).zip(scores) {
                for x in 0..d {
                    out[(i * heads + head) * d + x] += score.exp() / sum * v[kv(j) + x];
                }
            }
        }
    }
    out
}

#[track_caller]
fn check_attention(lengths: &[usize], spec: &AttentionSpec) {
    let AttentionSpec { heads, kv_heads, head_dim: d, .. } = *spec;
    let mut sequences: Vec<Range<usize>> = Vec::new();
    for &length in lengths {
        let start = sequences.last().map_or(0, |last| last.end);
        sequences.push(start..start + length);
    }
    let n = sequences.last().unwrap().end;
    let mut random = Random::new((n * d) as u64);
    let q = random.values(n * heads * d, 2.0);
    let [k, v] = [0; 2].map(|_| random.values(n * kv_heads * d, 2.0));
    let d_out = random.values(n * heads * d, 1.0);
    let [q64, k64, v64] = [&q, &k, &v].map(|x| f64s(x));
    let out: Vec<f32> =
        attend(&q64, &k64, &v64, &sequences, spec).into_iter().map(|x| x as f32).collect();
    let loss =
        |q: &[f64], k: &[f64], v: &[f64]| weighted(&attend(q, k, v, &sequences, spec), &d_out);
    // Differences in each direction take long: some suffice.
    let some = |len: usize| -> Vec<usize> { (0..len).step_by(1 + len / 40).collect() };
    let gradient = |x: &[f32], of: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
        let places = some(x.len());
        let at: Vec<f32> = places.iter().map(|&i| x[i]).collect();
        let whole = f64s(x);
        differences(&at, |changed| {
            let mut whole = whole.clone();
            places.iter().zip(changed).for_each(|(&i, &x)| whole[i] = x);
            of(&whole)
        })
    };
    let mut expected = gradient(&q, &|q| loss(q, &k64, &v64));
    expected.extend(gradient(&k, &|k| loss(&q64, k, &v64)));
    expected.extend(gradient(&v, &|v| loss(&q64, &k64, v)));
    let found = |cpu: &Cpu, precision: Precision| {
        let mut d_q = vec![9.0; q.len()];
        let (mut d_k, mut d_v) = (vec![9.0; k.len()], vec![9.0; v.len()]);
        let gradients = AttentionGradients { q: &mut d_q, k: &mut d_k, v: &mut d_v };
        let attended = Attended { sequences: &sequences, q: &q, k: &k, v: &v, out: &out };
        let mut room = vec![5.0; 7];
        attention_backward(cpu, gradients, &d_out, &attended, spec, precision, &mut room);
        let pick = |x: &[f32]| some(x.len()).iter().map(|&i| x[i]).collect::<Vec<f32>>();
        [pick(&d_q), pick(&d_k), pick(&d_v)].concat()
    };
    check(&format!("{lengths:?} {spec:?}"), &expected, |cpu| found(cpu, Precision::Single));
    // In bf16 factors have eight bits.
    let size = (expected.iter().map(|d| d * d).sum::<f64>() / expected.len() as f64).sqrt();
    for isa in Isa::available() {
        let rounded = found(&Cpu::with_isa(2, isa), Precision::Bf16);
        for (at, (&found, &expected)) in rounded.iter().zip(&expected).enumerate() {
            let off = (f64::from(found) - expected).abs();
            assert!(off < 0.05 * (size + expected.abs()), "{isa}, {at}: {found}, not {expected}");
        }
    }
}

#[test]
fn attentions() {
    let spec = |heads, kv_heads, head_dim| AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        softcap: None,
        window: None,
    };
    check_attention(&[1], &spec(1, 1, 4));
    check_attention(&[7], &spec(2, 1, 8));
    check_attention(&[64, 1, 65], &spec(3, 1, 32));
    check_attention(&[130, 20], &spec(4, 2, 20));
    check_attention(&[150], &AttentionSpec { window: Some(33), ..spec(2, 2, 16) });
    check_attention(&[3, 200], &AttentionSpec { window: Some(64), ..spec(2, 1, 16) });
    check_attention(&[90], &AttentionSpec { softcap: Some(1.5), ..spec(2, 1, 16) });
    let all = AttentionSpec { softcap: Some(2.0), window: Some(1), scale: 0.3, ..spec(2, 1, 64) };
    check_attention(&[70, 2], &all);
}
