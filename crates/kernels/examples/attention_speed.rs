//! Times attention and stores to the cache for one layer: a prompt of 512 tokens, and decoding one
//! token at contexts of 512 and 4,096; and the gradients of 256 and 2,048 tokens.
//!
//! ```text
//! cargo run --release -p bevel-kernels --example attention_speed -- [threads [backward]]
//! ```

use std::time::Instant;

use bevel_kernels::linalg::Precision;
use bevel_kernels::{
    Attended, AttentionGradients, AttentionScratch, AttentionSpec, BLOCK_TOKENS, Cpu, KvPool,
    KvShape, KvType, SequenceSpan, Slot, attention, attention_backward,
};

fn main() {
    let threads =
        std::env::args().nth(1).map_or(0, |text| text.parse().expect("a number of threads"));
    let cpu = Cpu::new(threads).expect("BEVEL_ISA");
    // Gradients alone, where that is asked for.
    let forward = std::env::args().nth(2).is_none();
    println!("{}, {} threads; time of one layer, best and median", cpu.isa(), cpu.pool().threads());
    println!(
        "{:<22} {:<12} {:>8} {:>8} {:>10} {:>10}",
        "shape", "cache", "queries", "context", "best", "median"
    );
    for (name, heads, kv_heads, head_dim) in
        [("SmolLM2-135M 9/3x64", 9, 3, 64), ("Llama 8B 32/8x128", 32, 8, 128)]
    {
        for kv_type in [
            KvType::F32,
            KvType::F16,
            KvType::BF16,
            KvType::Q8_0 { rotated: false },
            KvType::Q4_0 { rotated: false },
            KvType::Q4_0 { rotated: true },
        ]
        .into_iter()
        .filter(|_| forward)
        {
            let spec = AttentionSpec {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                softcap: None,
                window: None,
            };
            for (queries, context) in [(512, 512), (1, 512), (1, 4096)] {
                let (best, median) = time(&cpu, &spec, kv_type, queries, context);
                let cache = match kv_type {
                    KvType::Q4_0 { rotated: true } => "Q4_0 rotated".to_owned(),
                    KvType::Q4_0 { .. } => "Q4_0".to_owned(),
                    KvType::Q8_0 { .. } => "Q8_0".to_owned(),
                    _ => format!("{kv_type:?}"),
                };
                println!(
                    "{name:<22} {cache:<12} {queries:>8} {context:>8} {best:>7.1} µs {median:>7.1} µs"
                );
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec { heads, kv_heads, head_dim, scale, softcap: None, window: None };
        for n in [256, 2048] {
            let (best, median) = time_backward(&cpu, &spec, n);
            println!("{name:<22} {:<12} {n:>8} {n:>8} {best:>7.1} µs {median:>7.1} µs", "backward");
        }
    }
}

/// Best and median time in microseconds of the gradients of `n` tokens.
fn time_backward(cpu: &Cpu, spec: &AttentionSpec, n: usize) -> (f64, f64) {
    let (wide, narrow) = (n * spec.heads * spec.head_dim, n * spec.kv_heads * spec.head_dim);
    let values = |len: usize| (0..len).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
    let (q, k) = (values(wide), values(narrow));
    let (mut d_q, mut d_k, mut d_v) = (vec![0.0; wide], vec![0.0; narrow], vec![0.0; narrow]);
    let sequences = [std::ops::Range { start: 0, end: n }];
    let mut room = Vec::new();
    let mut times: Vec<f64> = (0..20)
        .map(|_| {
            let gradients = AttentionGradients { q: &mut d_q, k: &mut d_k, v: &mut d_v };
            let attended = Attended { sequences: &sequences, q: &q, k: &k, v: &k, out: &q };
            let start = Instant::now();
            attention_backward(cpu, gradients, &q, &attended, spec, Precision::Bf16, &mut room);
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}

/// Best and median time in microseconds of storing `queries` tokens and attending to `context`. Layers
/// take turns, as in a model, so that the cache is as warm as it would be.
fn time(
    cpu: &Cpu,
    spec: &AttentionSpec,
    kv_type: KvType,
    queries: usize,
    context: usize,
) -> (f64, f64) {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
    let layers = 30;
    let shape = KvShape { layers, kv_heads, head_dim, kv_type };
    let mut pool = KvPool::new(shape, context.div_ceil(BLOCK_TOKENS)).expect("memory");
    let blocks: Vec<u32> = (0..pool.blocks() as u32).rev().collect();
    let slots: Vec<Slot> = (0..context)
        .map(|p| Slot { block: blocks[p / BLOCK_TOKENS], offset: (p % BLOCK_TOKENS) as u32 })
        .collect();
    let values = |len: usize| (0..len).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<f32>>();
    let kv = values(context * kv_heads * head_dim);
    for layer in 0..layers {
        pool.write(cpu, layer, &kv, &kv, &slots);
    }
    let q = values(queries * heads * head_dim);
    let new = &kv[..queries * kv_heads * head_dim];
    let mut out = vec![0.0; q.len()];
    let mut scratch = AttentionScratch::new();
    let span = SequenceSpan { first_query: 0, queries, context, blocks: &blocks, tree: &[] };
    let mut times: Vec<f64> = (0..10 * layers)
        .map(|i| {
            let start = Instant::now();
            pool.write(cpu, i % layers, new, new, &slots[context - queries..]);
            attention(cpu, &mut out, &q, &pool, i % layers, &[span], spec, &mut scratch);
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}
