//! Attention against a naive one in f64 over the values as they are cached.

use bevel_kernels::{
    AttentionScratch, AttentionSpec, BLOCK_TOKENS, Cpu, Isa, KvPool, KvShape, KvType, SequenceSpan,
    Slot, attention, depth_in_tree,
};
use proptest::prelude::*;

use crate::random::Random;

/// Sequences with random queries, keys and values, cached in shuffled blocks between blocks of NaN.
pub(crate) struct Case {
    pub(crate) spec: AttentionSpec,
    pub(crate) kv_type: KvType,
    /// (queries, context) of each sequence.
    pub(crate) sequences: Vec<(usize, usize)>,
    /// Trees of the sequences' queries; chains where there is none.
    pub(crate) trees: Vec<Vec<u64>>,
    /// Scores are of this size.
    pub(crate) size: f32,
    pub(crate) seed: u64,
}

pub(crate) struct Batch {
    pub(crate) pool: KvPool,
    pub(crate) tables: Vec<Vec<u32>>,
    /// `[n, heads, head_dim]`.
    pub(crate) q: Vec<f32>,
    /// For each sequence `[context, kv_heads, head_dim]`, as the cache holds them.
    pub(crate) k: Vec<Vec<f32>>,
    pub(crate) v: Vec<Vec<f32>>,
    /// The same before the cache rounded them.
    pub(crate) unrounded: Vec<[Vec<f32>; 2]>,
}

/// Every type of cache.
pub(crate) const KV_TYPES: [KvType; 7] = [
    KvType::F32,
    KvType::F16,
    KvType::BF16,
    KvType::Q8_0 { rotated: false },
    KvType::Q8_0 { rotated: true },
    KvType::Q4_0 { rotated: false },
    KvType::Q4_0 { rotated: true },
];

pub(crate) const SPEC: AttentionSpec = AttentionSpec {
    heads: 6,
    kv_heads: 2,
    head_dim: 32,
    scale: 0.176_776_7,
    softcap: None,
    window: None,
};

impl Case {
    pub(crate) fn new(spec: AttentionSpec, sequences: &[(usize, usize)]) -> Self {
        let (kv_type, sequences) = (KvType::F32, sequences.to_vec());
        Self { spec, kv_type, sequences, trees: Vec::new(), size: 3.0, seed: 1 }
    }

    fn tree(&self, sequence: usize) -> &[u64] {
        self.trees.get(sequence).map_or(&[], |tree| tree)
    }

    /// Fills a pool of two layers; the other layer and all places without a token hold NaN.
    pub(crate) fn batch(&self, shuffled: bool) -> Batch {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let mut random = Random::new(self.seed);
        let shape = KvShape { layers: 2, kv_heads, head_dim, kv_type: self.kv_type };
        let needed: usize = self.sequences.iter().map(|s| s.1.div_ceil(BLOCK_TOKENS)).sum();
        let blocks = needed + 3;
        let mut pool = KvPool::new(shape, blocks).unwrap();
        let cpu = Cpu::with_isa(1, Isa::Scalar);
        let token = kv_heads * head_dim;
        let nan = vec![f32::NAN; BLOCK_TOKENS * token];
        for block in 0..blocks as u32 {
            let slots: Vec<Slot> =
                (0..BLOCK_TOKENS as u32).map(|offset| Slot { block, offset }).collect();
            pool.write(&cpu, 0, &nan, &nan, &slots);
            pool.write(&cpu, 1, &nan, &nan, &slots);
        }
        let queries: usize = self.sequences.iter().map(|s| s.0).sum();
        // |q·k| · scale is about `size`.
        let spread = (self.size / self.spec.scale / head_dim as f32).sqrt() * 3.0f32.sqrt();
        let q = random.values(queries * heads * head_dim, spread);
        let (mut k, mut v, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for &(_, context) in &self.sequences {
            k.push(random.values(context * token, spread));
            v.push(random.values(context * token, 1.0));
        }
        let unrounded = k.iter().cloned().zip(v.iter().cloned()).map(|(k, v)| [k, v]).collect();
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        if shuffled {
            random.shuffle(&mut free);
        }
        for (i, &(_, context)) in self.sequences.iter().enumerate() {
            let table: Vec<u32> = free.drain(..context.div_ceil(BLOCK_TOKENS)).collect();
            let slots: Vec<Slot> = (0..context)
                .map(|p| Slot { block: table[p / BLOCK_TOKENS], offset: (p % BLOCK_TOKENS) as u32 })
                .collect();
            pool.write(&cpu, 1, &k[i], &v[i], &slots);
            let rows = k[i].chunks_exact_mut(token).zip(v[i].chunks_exact_mut(token));
            for (&slot, (k, v)) in slots.iter().zip(rows) {
                pool.read(1, slot, k, v);
            }
            tables.push(table);
        }
        Batch { pool, tables, q, k, v, unrounded }
    }

    pub(crate) fn run(&self, cpu: &Cpu, batch: &Batch) -> Vec<f32> {
        let mut spans = Vec::new();
        let mut first_query = 0;
        for (i, (&(queries, context), table)) in
            self.sequences.iter().zip(&batch.tables).enumerate()
        {
            let tree = self.tree(i);
            spans.push(SequenceSpan { first_query, queries, context, blocks: table, tree });
            first_query += queries;
        }
        let mut out = vec![f32::NAN; batch.q.len()];
        let mut scratch = AttentionScratch::new();
        attention(cpu, &mut out, &batch.q, &batch.pool, 1, &spans, &self.spec, &mut scratch);
        out
    }

    /// The definition, in f64.
    fn naive(&self, batch: &Batch) -> Vec<f64> {
        let AttentionSpec { heads, kv_heads, head_dim, scale, softcap, window } = self.spec;
        let mut out = Vec::new();
        let mut rows = batch.q.chunks_exact(head_dim);
        for (i, &(queries, context)) in self.sequences.iter().enumerate() {
            for query in 0..queries {
                let base = context - queries;
                let position = base + depth_in_tree(self.tree(i), query);
                // What is seen of the queries' own tokens, with positions.
                let sees = |&node: &usize| match self.tree(i).get(query) {
                    Some(mask) => mask >> node & 1 == 1,
                    None => node <= query,
                };
                let own = (0..queries).filter(sees);
                let own = own.map(|node| (base + node, base + depth_in_tree(self.tree(i), node)));
                let all: Vec<(usize, usize)> = (0..base).map(|j| (j, j)).chain(own).collect();
                for head in 0..heads {
                    let q = rows.next().unwrap();
                    let at = |j: usize| (j * kv_heads + head / (heads / kv_heads)) * head_dim;
                    let seen = |at: usize| window.is_none_or(|w| position - at < w);
                    let keys: Vec<usize> =
                        all.iter().filter(|&&(_, at)| seen(at)).map(|&(j, _)| j).collect();
                    let scores = keys.iter().map(|&j| {
                        let k = &batch.k[i][at(j)..][..head_dim];
                        let dot: f64 =
                            q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                        let score = dot * f64::from(scale);
                        softcap
                            .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    });
                    let scores: Vec<f64> = scores.collect();
                    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for d in 0..head_dim {
                        let value = |j: usize| f64::from(batch.v[i][at(j) + d]);
                        out.push(
                            keys.iter().zip(&weights).map(|(&j, w)| w * value(j)).sum::<f64>()
                                / sum,
                        );
                    }
                }
            }
        }
        out
    }
}

/// Every instruction set is within 1e-5 of the definition; values are of size 1.
#[track_caller]
pub(crate) fn check(case: &Case) {
    check_within(case, 1e-5);
}

#[track_caller]
fn check_within(case: &Case, bound: f64) {
    let batch = case.batch(true);
    let expected = case.naive(&batch);
    for isa in Isa::available() {
        let out = case.run(&Cpu::with_isa(2, isa), &batch);
        assert_eq!(out.len(), expected.len());
        for (i, (&out, expected)) in out.iter().zip(&expected).enumerate() {
            let error = (f64::from(out) - expected).abs();
            assert!(error <= bound, "{isa}: value {i} is {out}, expected {expected}");
        }
    }
}

#[test]
fn one_token_sees_itself() {
    check(&Case::new(SPEC, &[(1, 1)]));
}

#[test]
fn prompts_of_all_lengths_around_blocks_and_tiles() {
    for context in [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 256, 257, 300] {
        check(&Case::new(SPEC, &[(context, context)]));
    }
}

#[test]
fn decoding_at_all_lengths_around_blocks_tiles_and_chunks() {
    for context in [2, 16, 17, 64, 65, 255, 256, 257, 511, 512, 513, 1100] {
        check(&Case::new(SPEC, &[(1, context)]));
    }
}

#[test]
fn a_prompt_continues_a_cached_one() {
    check(&Case::new(SPEC, &[(70, 300)]));
    check(&Case::new(SPEC, &[(3, 600)]));
}

#[test]
fn decoding_and_prompts_in_one_batch() {
    check(&Case::new(SPEC, &[(1, 300), (40, 40), (1, 1), (0, 20), (17, 90), (1, 513)]));
}

#[test]
fn groups_of_every_size() {
    for (heads, kv_heads) in [
        (1, 1),
        (2, 2),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 1),
        (14, 2),
        (8, 1),
        (9, 3),
        (24, 2),
        (100, 1),
    ] {
        let spec = AttentionSpec { heads, kv_heads, ..SPEC };
        check(&Case::new(spec, &[(1, 300), (20, 45)]));
    }
}

#[test]
fn heads_of_every_width() {
    for head_dim in [1, 7, 8, 24, 40, 64, 72, 80, 96, 100, 112, 128, 192, 256, 320] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec { heads: 4, kv_heads: 2, head_dim, scale, ..SPEC };
        check(&Case::new(spec, &[(1, 100), (30, 30)]));
    }
}

#[test]
fn caches_of_every_type() {
    for kv_type in KV_TYPES {
        for head_dim in [1, 7, 24, 33, 64, 80, 96, 128, 256] {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let spec = AttentionSpec { head_dim, scale, ..SPEC };
            check(&Case { kv_type, ..Case::new(spec, &[(1, 300), (50, 130), (5, 40)]) });
        }
    }
}

#[test]
fn windows_shorter_and_longer_than_the_context() {
    for window in [1, 2, 15, 16, 17, 64, 100, 256, 1000] {
        let spec = AttentionSpec { window: Some(window), ..SPEC };
        check(&Case::new(spec, &[(1, 700), (150, 150), (60, 400), (2, 17)]));
    }
}

#[test]
fn soft_capped_scores() {
    for cap in [1.0, 20.0, 50.0] {
        let spec = AttentionSpec { softcap: Some(cap), ..SPEC };
        check(&Case::new(spec, &[(1, 300), (50, 50)]));
    }
}

/// Rounding a score s moves p by s · 2⁻²⁴ and more, so the bound grows with the scores.
#[test]
fn sharp_scores() {
    for (size, bound) in [(0.0, 1e-6), (30.0, 3e-5), (3000.0, 3e-3)] {
        check_within(&Case { size, ..Case::new(SPEC, &[(1, 300), (70, 70)]) }, bound);
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let kv_type = proptest::sample::select(&KV_TYPES[..]);
    let shape = (1usize..5, 1usize..6, 1usize..70);
    let rules = (proptest::option::of(1usize..200), proptest::option::of(5f32..60.0));
    let sequences = proptest::collection::vec((0usize..40, 1usize..280), 1..4);
    (shape, rules, sequences, kv_type, any::<u64>()).prop_map(
        |((kv_heads, group, head_dim), (window, softcap), sequences, kv_type, seed)| {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let heads = kv_heads * group;
            let spec = AttentionSpec { heads, kv_heads, head_dim, scale, softcap, window };
            let sequences: Vec<_> = sequences.into_iter().map(|(q, c)| (q.min(c), c)).collect();
            Case { kv_type, seed, ..Case::new(spec, &sequences) }
        },
    )
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case { spec, kv_type, sequences, trees, size, seed } = self;
        write!(f, "{spec:?} {kv_type:?} {sequences:?} {trees:x?} size {size} seed {seed}")
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_batch(case in any_case()) {
        check(&case);
    }
}
