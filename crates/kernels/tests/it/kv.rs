//! What a cache holds of what was written to it.

use bevel_kernels::{BLOCK_TOKENS, Cpu, Isa, KvPool, KvShape, KvType, Slot};
use half::{bf16, f16};

use crate::attention::KV_TYPES;
use crate::random::Random;

const KV_HEADS: usize = 2;

/// Writes tokens (`[n, 2, head_dim]` keys and values) to one layer and reads them back.
fn stored(cpu: &Cpu, kv_type: KvType, head_dim: usize, k: &[f32], v: &[f32]) -> [Vec<f32>; 2] {
    let shape = KvShape { layers: 2, kv_heads: KV_HEADS, head_dim, kv_type };
    let token = KV_HEADS * head_dim;
    let n = k.len() / token;
    let mut pool = KvPool::new(shape, n.div_ceil(BLOCK_TOKENS) + 1).unwrap();
    // Blocks and tokens in an order that is not that of memory.
    let slots: Vec<Slot> = (0..n)
        .map(|i| Slot {
            block: (n.div_ceil(BLOCK_TOKENS) - i / BLOCK_TOKENS) as u32,
            offset: ((i + 5) % BLOCK_TOKENS) as u32,
        })
        .collect();
    pool.write(cpu, 1, k, v, &slots);
    let mut read = [vec![0.0; n * token], vec![0.0; n * token]];
    let [keys, values] = &mut read;
    let rows = keys.chunks_exact_mut(token).zip(values.chunks_exact_mut(token));
    for (&slot, (k, v)) in slots.iter().zip(rows) {
        pool.read(1, slot, k, v);
    }
    read
}

/// Groups of 32 values that share a scale, each with what became of it.
fn groups<'a>(
    head_dim: usize,
    x: &'a [f32],
    read: &'a [f32],
) -> impl Iterator<Item = (&'a [f32], &'a [f32])> {
    let heads = x.chunks_exact(head_dim).zip(read.chunks_exact(head_dim));
    heads.flat_map(|(x, read)| x.chunks(32).zip(read.chunks(32)))
}

#[test]
fn elements_are_rounded_to_their_type() {
    for head_dim in [1, 24, 64] {
        let x = Random::new(3).values(40 * KV_HEADS * head_dim, 4.0);
        let y = Random::new(4).values(40 * KV_HEADS * head_dim, 4.0);
        for (kv_type, round) in [
            (KvType::F32, (|x| x) as fn(f32) -> f32),
            (KvType::F16, |x| f16::from_f32(x).to_f32()),
            (KvType::BF16, |x| bf16::from_f32(x).to_f32()),
        ] {
            let [k, v] = stored(&Cpu::new(1).unwrap(), kv_type, head_dim, &x, &y);
            assert!(k.iter().zip(&x).all(|(&k, &x)| k == round(x)), "{kv_type:?} {head_dim}");
            assert!(v.iter().zip(&y).all(|(&v, &y)| v == round(y)), "{kv_type:?} {head_dim}");
        }
    }
}

/// Q8_0 is GGML's: the scale is the largest magnitude / 127 as a half.
#[test]
fn eight_bits_are_ggmls() {
    let kv_type = KvType::Q8_0 { rotated: false };
    for head_dim in [7, 32, 64, 80, 96, 128] {
        for size in [1e-4, 1.0, 3e4] {
            let x = Random::new(5).values(40 * KV_HEADS * head_dim, size);
            let y = Random::new(6).values(40 * KV_HEADS * head_dim, size);
            let [k, v] = stored(&Cpu::new(1).unwrap(), kv_type, head_dim, &x, &y);
            for (x, read) in groups(head_dim, &x, &k).chain(groups(head_dim, &y, &v)) {
                let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let mut scale = f16::from_f32(largest / 127.0);
                if scale.to_f32() * 127.5 < largest {
                    scale = f16::from_bits(scale.to_bits() + 1);
                }
                let scale = scale.to_f32();
                for (&x, &read) in x.iter().zip(read) {
                    let code = (x / scale).round().clamp(-127.0, 127.0);
                    let close = (read - code * scale).abs() <= 1e-6 * largest;
                    let tie = ((x / scale).abs().fract() - 0.5).abs() < 1e-3;
                    assert!(close || tie, "{x} became {read}, scale {scale}");
                }
            }
        }
    }
}

/// The mean squared error of 4 bits, and that of GGML's rule, relative to the values'.
fn four_bit_errors(x: &[f32], head_dim: usize) -> (f64, f64) {
    let kv_type = KvType::Q4_0 { rotated: false };
    let [k, v] = stored(&Cpu::new(1).unwrap(), kv_type, head_dim, x, x);
    assert_eq!(k, v);
    let (mut ours, mut ggml, mut all) = (0.0, 0.0, 0.0);
    for (x, read) in groups(head_dim, x, &k) {
        let extreme = x.iter().fold(0.0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
        let scale = f16::from_f32(extreme / -8.0).to_f32();
        for (&x, &read) in x.iter().zip(read) {
            let q = (x / scale).round().clamp(-8.0, 7.0);
            ours += f64::from(x - read).powi(2);
            ggml += f64::from(x - q * scale).powi(2);
            all += f64::from(x).powi(2);
        }
    }
    (ours / all, ggml / all)
}

#[test]
fn four_bits_lose_less_than_ggmls() {
    let mut random = Random::new(7);
    let normal = |random: &mut Random, n: usize| -> Vec<f32> {
        // The sum of twelve uniform numbers is nearly normally distributed.
        (0..n).map(|_| random.values(12, 1.0).iter().sum::<f32>() / 2.0).collect()
    };
    for head_dim in [64, 80, 128] {
        let x = normal(&mut random, 256 * KV_HEADS * head_dim);
        let (ours, ggml) = four_bit_errors(&x, head_dim);
        assert!(ours < 0.93 * ggml, "{head_dim}: {ours} against {ggml}");
        assert!(ours < 0.0075, "{head_dim}: {ours}");
    }
}

#[test]
fn four_bits_are_sixteen_levels() {
    let kv_type = KvType::Q4_0 { rotated: false };
    let x = Random::new(8).values(64 * KV_HEADS * 32, 2.0);
    let [k, _] = stored(&Cpu::new(1).unwrap(), kv_type, 32, &x, &x);
    for (x, read) in groups(32, &x, &k) {
        let mut levels = read.to_vec();
        levels.sort_by(f32::total_cmp);
        levels.dedup();
        assert!(levels.len() <= 16, "{levels:?}");
        let (low, high) = (levels[0], levels[levels.len() - 1]);
        let step = (high - low) / 15.0;
        for (x, read) in x.iter().zip(read) {
            assert!((x - read).abs() < 1.2 * step, "{x} became {read} with steps of {step}");
        }
    }
}

#[test]
fn neither_threads_nor_the_instruction_set_nor_batching_change_what_is_stored() {
    for kv_type in KV_TYPES {
        for head_dim in [24, 80, 128] {
            let x = Random::new(9).values(70 * KV_HEADS * head_dim, 3.0);
            let y = Random::new(10).values(70 * KV_HEADS * head_dim, 1.0);
            let expected = stored(&Cpu::with_isa(1, Isa::Scalar), kv_type, head_dim, &x, &y);
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let cpu = Cpu::with_isa(threads, isa);
                    let found = stored(&cpu, kv_type, head_dim, &x, &y);
                    assert!(found == expected, "{isa} {kv_type:?} {head_dim}");
                }
            }
            let one = KV_HEADS * head_dim;
            let cpu = Cpu::new(1).unwrap();
            let alone = stored(&cpu, kv_type, head_dim, &x[3 * one..4 * one], &y[3 * one..4 * one]);
            assert!(alone[0] == expected[0][3 * one..4 * one], "{kv_type:?} {head_dim}");
            assert!(alone[1] == expected[1][3 * one..4 * one], "{kv_type:?} {head_dim}");
        }
    }
}

/// A Hadamard matrix takes the outliers from keys: with 4 bits the others are no longer lost.
#[test]
fn rotation_keeps_what_outliers_would_hide() {
    for (head_dim, gain) in [(64, 3.0), (128, 3.0), (96, 3.0), (80, 1.5)] {
        let mut x = Random::new(11).values(64 * KV_HEADS * head_dim, 1.0);
        x.iter_mut().step_by(32).for_each(|x| *x *= 30.0);
        let error = |rotated| {
            let kv_type = KvType::Q4_0 { rotated };
            let [k, v] = stored(&Cpu::new(1).unwrap(), kv_type, head_dim, &x, &x);
            assert_eq!(k, v);
            x.iter().zip(&k).map(|(x, k)| f64::from(x - k).powi(2)).sum::<f64>()
        };
        let (plain, rotated) = (error(false), error(true));
        assert!(rotated * gain < plain, "{head_dim}: {rotated} against {plain}");
    }
}

#[test]
fn extreme_values() {
    let cpu = Cpu::new(1).unwrap();
    for kv_type in KV_TYPES {
        let zeros = vec![0.0; KV_HEADS * 64];
        let [k, v] = stored(&cpu, kv_type, 64, &zeros, &zeros);
        assert!(k.iter().chain(&v).all(|&x| x == 0.0), "{kv_type:?}");
        // Too small for any scale.
        let tiny = vec![1e-12; KV_HEADS * 64];
        let [k, _] = stored(&cpu, kv_type, 64, &tiny, &tiny);
        assert!(k.iter().all(|&x| x.abs() <= 1e-10), "{kv_type:?}");
    }
    for kv_type in [KvType::Q8_0 { rotated: false }, KvType::Q4_0 { rotated: false }] {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e20, -3e38] {
            let mut x = vec![1.0; KV_HEADS * 64];
            x[40] = bad;
            let [k, v] = stored(&cpu, kv_type, 64, &x, &x);
            for x in [k, v] {
                for (i, x) in x.into_iter().enumerate() {
                    if (32..64).contains(&i) {
                        assert!(x.is_nan(), "{kv_type:?} {bad}: value {i} is {x}");
                    } else {
                        assert!((x - 1.0).abs() < 1e-3, "{kv_type:?} {bad}: value {i} is {x}");
                    }
                }
            }
        }
    }
}

/// Tokens lie in a block side by side: writing one leaves the others as they were.
#[test]
fn a_token_is_written_alone() {
    for kv_type in KV_TYPES {
        let shape = KvShape { layers: 1, kv_heads: KV_HEADS, head_dim: 40, kv_type };
        let cpu = Cpu::new(1).unwrap();
        let mut pool = KvPool::new(shape, 1).unwrap();
        let token = KV_HEADS * 40;
        let x = Random::new(12).values(BLOCK_TOKENS * token, 1.0);
        let slot = |i: usize| Slot { block: 0, offset: i as u32 };
        let slots: Vec<Slot> = (0..BLOCK_TOKENS).map(slot).collect();
        pool.write(&cpu, 0, &x, &x, &slots);
        let read = |pool: &KvPool, i| {
            let (mut k, mut v) = (vec![0.0; token], vec![0.0; token]);
            pool.read(0, slot(i), &mut k, &mut v);
            (k, v)
        };
        let before: Vec<_> = (0..BLOCK_TOKENS).map(|i| read(&pool, i)).collect();
        pool.write(&cpu, 0, &x[..token], &x[..token], &[slot(7)]);
        for (i, before) in before.iter().enumerate() {
            let expected = if i == 7 { &read(&pool, 0) } else { before };
            assert_eq!(&read(&pool, i), expected, "{kv_type:?} token {i}");
        }
    }
}
