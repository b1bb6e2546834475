//! Queries that form a tree.

use bevel_kernels::{
    AttentionScratch, AttentionSpec, BLOCK_TOKENS, Cpu, Isa, SequenceSpan, Slot, TREE_QUERIES,
    attention, attention_tree, depth_in_tree,
};

use crate::attention::{Case, KV_TYPES, SPEC, check};
use crate::random::Random;

/// A tree of `nodes` nodes, some of which follow the tokens before it.
fn random_tree(nodes: usize, random: &mut Random) -> Vec<u64> {
    let parents: Vec<Option<usize>> = (0..nodes)
        .map(|node| match random.below(5) {
            _ if node == 0 => None,
            0 => None,
            1 | 2 => Some(node - 1),
            _ => Some(random.below(node)),
        })
        .collect();
    attention_tree(&parents)
}

#[test]
fn masks_are_paths() {
    let tree = attention_tree(&[None, Some(0), Some(0), Some(1), Some(2), None]);
    assert_eq!(tree, [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b100000]);
    let depths: Vec<usize> = (0..6).map(|node| depth_in_tree(&tree, node)).collect();
    assert_eq!(depths, [0, 1, 1, 2, 2, 0]);
    assert_eq!(depth_in_tree(&[], 7), 7);
}

#[test]
fn nodes_see_the_tokens_before_the_tree_and_their_path() {
    let mut random = Random::new(1);
    for (i, base) in
        [0, 1, 15, 16, 50, 63, 64, 65, 100, 250, 255, 256, 500, 1000].into_iter().enumerate()
    {
        for nodes in [1, 2, 9, 40, TREE_QUERIES] {
            let window = [None, Some(1), Some(3), Some(20), Some(70), Some(300)][random.below(6)];
            let softcap = [None, Some(20.0)][random.below(2)];
            let (heads, kv_heads) = [(6, 2), (3, 1), (4, 4), (14, 2)][random.below(4)];
            let head_dim = [32, 24, 7, 64][random.below(4)];
            let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 0.2, softcap, window };
            let kv_type = KV_TYPES[(i + nodes) % KV_TYPES.len()];
            let trees =
                vec![random_tree(nodes, &mut random), Vec::new(), random_tree(3, &mut random)];
            let sequences = [(nodes, base + nodes), (4, 70), (3, 90)];
            check(&Case { kv_type, trees, ..Case::new(spec, &sequences) });
        }
    }
}

/// A node's output is that of its path decoded one token after another.
#[test]
fn branches_change_no_bit() {
    let mut random = Random::new(2);
    for (i, base) in [0, 3, 60, 64, 110, 250, 600].into_iter().enumerate() {
        let nodes = [5, TREE_QUERIES, 17, 30][i % 4];
        let spec = AttentionSpec { window: [None, Some(40)][i % 2], ..SPEC };
        let tree = random_tree(nodes, &mut random);
        for kv_type in KV_TYPES {
            let trees = vec![tree.clone()];
            let case = Case { kv_type, trees, ..Case::new(spec, &[(nodes, base + nodes)]) };
            let batch = case.batch(true);
            let outs: Vec<Vec<f32>> = Isa::available()
                .into_iter()
                .map(|isa| case.run(&Cpu::with_isa(2, isa), &batch))
                .collect();
            let row = spec.heads * spec.head_dim;
            let token = spec.kv_heads * spec.head_dim;
            let mut alone = case.batch(true);
            let blocks = &alone.tables[0];
            for node in (0..nodes).step_by(3) {
                let path: Vec<usize> = (0..nodes).filter(|a| tree[node] >> a & 1 == 1).collect();
                let context = base + path.len();
                let slots: Vec<Slot> = (base..context)
                    .map(|p| Slot {
                        block: blocks[p / BLOCK_TOKENS],
                        offset: (p % BLOCK_TOKENS) as u32,
                    })
                    .collect();
                let [k, v] = batch.unrounded[0].each_ref().map(|all| -> Vec<f32> {
                    path.iter().flat_map(|&a| all[(base + a) * token..][..token].to_vec()).collect()
                });
                alone.pool.write(&Cpu::with_isa(1, Isa::Scalar), 1, &k, &v, &slots);
                let span = SequenceSpan { first_query: 0, queries: 1, context, blocks, tree: &[] };
                let q = &batch.q[node * row..][..row];
                for (isa, out) in Isa::available().into_iter().zip(&outs) {
                    let mut found = vec![f32::NAN; row];
                    let (cpu, mut scratch) = (Cpu::with_isa(1, isa), AttentionScratch::new());
                    attention(&cpu, &mut found, q, &alone.pool, 1, &[span], &spec, &mut scratch);
                    let what = format!("{isa} {kv_type:?} base {base}: node {node}");
                    assert_eq!(found, out[node * row..][..row], "{what}");
                }
            }
        }
    }
}

#[test]
fn a_tree_of_one_branch_is_a_chain() {
    let parents: Vec<Option<usize>> = (0..40).map(|node: usize| node.checked_sub(1)).collect();
    for kv_type in KV_TYPES {
        let chain = Case { kv_type, ..Case::new(SPEC, &[(40, 300)]) };
        let tree = Case { trees: vec![attention_tree(&parents)], ..Case::new(SPEC, &[(40, 300)]) };
        let tree = Case { kv_type, ..tree };
        let batch = chain.batch(true);
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            assert_eq!(chain.run(&cpu, &batch), tree.run(&cpu, &batch), "{isa} {kv_type:?}");
        }
    }
}

#[test]
fn masks_that_are_no_tree_are_refused() {
    let case = |tree: &[u64]| Case { trees: vec![tree.to_vec()], ..Case::new(SPEC, &[(3, 40)]) };
    for tree in [
        &[1, 3][..], // too few
        &[1, 2, 0],  // a node that does not see itself
        &[1, 7, 4],  // one that sees a later one
        &[1, 2, 7],  // two parents
        &[1, 3, 6],  // its parent, but not that one's
    ] {
        let case = case(tree);
        let batch = case.batch(false);
        let cpu = Cpu::with_isa(1, Isa::Scalar);
        let run = std::panic::AssertUnwindSafe(|| case.run(&cpu, &batch));
        assert!(std::panic::catch_unwind(run).is_err(), "{tree:?}");
    }
    assert!(std::panic::catch_unwind(|| attention_tree(&[Some(0)])).is_err());
    assert!(std::panic::catch_unwind(|| attention_tree(&[None; TREE_QUERIES + 1])).is_err());
}
