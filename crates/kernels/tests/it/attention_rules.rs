//! What does not change a bit of attention's result, and what it may not touch.

use bevel_kernels::{
    AttentionScratch, AttentionSpec, BLOCK_TOKENS, Cpu, Error, Isa, KvPool, KvShape, KvType,
    SequenceSpan, Slot, attention,
};

use crate::attention::{Case, KV_TYPES, SPEC};
use crate::random::Random;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn mixed() -> Case {
    Case::new(SPEC, &[(1, 700), (130, 300), (1, 17), (9, 520), (1, 2000)])
}

#[test]
fn threads_change_no_bit() {
    for kv_type in KV_TYPES {
        let case = Case { kv_type, ..mixed() };
        let batch = case.batch(true);
        for isa in Isa::available() {
            let one = case.run(&Cpu::with_isa(1, isa), &batch);
            for threads in [2, 3, 8] {
                let many = case.run(&Cpu::with_isa(threads, isa), &batch);
                assert_eq!(bits(&one), bits(&many), "{isa}, {threads} threads, {kv_type:?}");
            }
        }
    }
}

/// Attention over packed keys and values is attention over the numbers they stand for.
#[test]
fn packing_changes_no_bit_of_the_arithmetic() {
    for kv_type in KV_TYPES {
        if matches!(kv_type, KvType::Q8_0 { rotated: true } | KvType::Q4_0 { rotated: true }) {
            continue; // attended to in rotated coordinates
        }
        for head_dim in [24, 33, 64] {
            let spec = AttentionSpec { head_dim, window: Some(300), ..SPEC };
            let case = Case { kv_type, ..Case::new(spec, &[(1, 700), (40, 90), (3, 520)]) };
            let packed = case.batch(true);
            let mut plain =
                Case { kv_type: KvType::F32, ..Case::new(spec, &case.sequences) }.batch(true);
            let cpu = Cpu::with_isa(1, Isa::Scalar);
            for (i, table) in plain.tables.iter().enumerate() {
                let slots: Vec<Slot> = (0..case.sequences[i].1)
                    .map(|p| Slot {
                        block: table[p / BLOCK_TOKENS],
                        offset: (p % BLOCK_TOKENS) as u32,
                    })
                    .collect();
                plain.pool.write(&cpu, 1, &packed.k[i], &packed.v[i], &slots);
            }
            for isa in Isa::available() {
                let cpu = Cpu::with_isa(2, isa);
                let (a, b) = (case.run(&cpu, &packed), case.run(&cpu, &plain));
                assert_eq!(bits(&a), bits(&b), "{isa} {kv_type:?} {head_dim}");
            }
        }
    }
}

#[test]
fn the_order_of_blocks_changes_no_bit() {
    for kv_type in KV_TYPES {
        let case = Case { kv_type, ..mixed() };
        // Both draw the same queries, keys and values; only the tables differ.
        let (paged, contiguous) = (case.batch(true), case.batch(false));
        assert_ne!(paged.tables, contiguous.tables);
        assert_eq!(bits(&paged.q), bits(&contiguous.q));
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let (a, b) = (case.run(&cpu, &paged), case.run(&cpu, &contiguous));
            assert_eq!(bits(&a), bits(&b), "{isa} {kv_type:?}");
        }
    }
}

/// A prompt in one piece, in pieces, and token by token: the same bits for every token.
#[test]
fn the_size_of_pieces_changes_no_bit() {
    for (i, kv_type) in KV_TYPES.into_iter().enumerate() {
        let window = (i % 2 == 1).then_some(70);
        let spec = AttentionSpec { window, ..SPEC };
        let case = Case { kv_type, ..Case::new(spec, &[(600, 600)]) };
        let batch = case.batch(true);
        let row = spec.heads * spec.head_dim;
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let whole = case.run(&cpu, &batch);
            for piece in [1, 2, 7, 33, 256] {
                let mut out = vec![f32::NAN; whole.len()];
                let mut scratch = AttentionScratch::new();
                for start in (0..600).step_by(piece) {
                    let end = 600.min(start + piece);
                    let span = SequenceSpan {
                        first_query: 0,
                        queries: end - start,
                        context: end,
                        blocks: &batch.tables[0],
                        tree: &[],
                    };
                    let part = start * row..end * row;
                    let (out, q) = (&mut out[part.clone()], &batch.q[part]);
                    attention(&cpu, out, q, &batch.pool, 1, &[span], &spec, &mut scratch);
                }
                assert_eq!(bits(&whole), bits(&out), "{isa} in pieces of {piece}, {kv_type:?}");
            }
        }
    }
}

/// Blocks before the window may have been given back and hold anything, or not exist at all.
#[test]
fn blocks_before_the_window_are_not_read() {
    let spec = AttentionSpec { window: Some(40), ..SPEC };
    let case = Case::new(spec, &[(5, 400)]);
    let mut batch = case.batch(true);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let before = case.run(&cpu, &batch);
        // The first query stands at 395 and sees 356 …: block 22 is the first in use.
        let kept = std::mem::take(&mut batch.tables[0]);
        batch.tables[0] =
            kept.iter().enumerate().map(|(i, &b)| if i < 22 { u32::MAX } else { b }).collect();
        let after = case.run(&cpu, &batch);
        batch.tables[0] = kept;
        assert_eq!(bits(&before), bits(&after), "{isa}");
    }
}

#[test]
fn rows_outside_all_spans_stay() {
    let case = Case::new(SPEC, &[(4, 40)]);
    let batch = case.batch(true);
    let row = SPEC.heads * SPEC.head_dim;
    let q = Random::new(5).values(10 * row, 1.0);
    let span = SequenceSpan {
        first_query: 3,
        queries: 4,
        context: 40,
        blocks: &batch.tables[0],
        tree: &[],
    };
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        let mut out = vec![7.0; q.len()];
        let mut scratch = AttentionScratch::new();
        attention(&cpu, &mut out, &q, &batch.pool, 1, &[span], &SPEC, &mut scratch);
        for (i, row) in out.chunks_exact(row).enumerate() {
            assert_eq!(row.contains(&7.0), !(3..7).contains(&i), "{isa} row {i}");
        }
    }
}

/// Scores that overflow to −∞ everywhere leave zeros, not NaN.
#[test]
fn a_row_that_sees_only_minus_infinity_is_zero() {
    let spec = AttentionSpec { heads: 1, kv_heads: 1, head_dim: 16, scale: 1.0, ..SPEC };
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16, kv_type: KvType::F32 };
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(1, isa);
        let mut pool = KvPool::new(shape, 1).unwrap();
        pool.write(&cpu, 0, &[-1e30; 16], &[1.0; 16], &[Slot { block: 0, offset: 0 }]);
        let mut out = [f32::NAN; 16];
        let span = SequenceSpan { first_query: 0, queries: 1, context: 1, blocks: &[0], tree: &[] };
        let mut scratch = AttentionScratch::new();
        attention(&cpu, &mut out, &[1e30; 16], &pool, 0, &[span], &spec, &mut scratch);
        assert_eq!(out, [0.0; 16], "{isa}");
    }
}

/// Scratch grows by partial results of decoding, a few hundred bytes for 256 positions and head,
/// never with the square of the context.
#[test]
fn scratch_is_linear_in_the_context() {
    let spec = AttentionSpec { heads: 2, kv_heads: 1, head_dim: 16, ..SPEC };
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 16, kv_type: KvType::F16 };
    let context = 32 * 1024;
    let pool = KvPool::new(shape, context / BLOCK_TOKENS).unwrap();
    let blocks: Vec<u32> = (0..pool.blocks() as u32).collect();
    let cpu = Cpu::new(2).unwrap();
    let bytes = |queries: usize, context: usize| {
        let mut scratch = AttentionScratch::new();
        let q = vec![0.5; queries * 32];
        let mut out = q.clone();
        let span = SequenceSpan { first_query: 0, queries, context, blocks: &blocks, tree: &[] };
        attention(&cpu, &mut out, &q, &pool, 0, &[span], &spec, &mut scratch);
        scratch.bytes()
    };
    let small = bytes(1, 16);
    let (decode, decode_half) = (bytes(1, context), bytes(1, context / 2));
    assert!(decode - small <= 2 * (decode_half - small) + 1024, "{small} {decode_half} {decode}");
    assert!(decode - small <= context / 256 * 512, "{small} {decode}");
    let (prompt, prompt_half) = (bytes(2048, context), bytes(1024, context));
    assert!(prompt - small <= 2 * (prompt_half - small) + 1024, "{small} {prompt_half} {prompt}");
    assert!(prompt <= 1 << 20, "{prompt}");
}

#[test]
fn once_grown_scratch_stays() {
    let case = mixed();
    let batch = case.batch(true);
    let cpu = Cpu::new(2).unwrap();
    let span = |queries, context| SequenceSpan {
        first_query: 0,
        queries,
        context,
        blocks: &batch.tables[4],
        tree: &[],
    };
    let mut scratch = AttentionScratch::new();
    let mut out = vec![0.0; batch.q.len()];
    let mut run = |span| {
        attention(&cpu, &mut out, &batch.q, &batch.pool, 1, &[span], &SPEC, &mut scratch);
        scratch.bytes()
    };
    run(span(100, 2000));
    let grown = run(span(1, 2000));
    for context in [1, 300, 1999] {
        assert_eq!(run(span(1, context)), grown);
    }
}

#[test]
fn a_copied_block_holds_the_same_tokens() {
    for kv_type in KV_TYPES {
        let case = Case { kv_type, ..Case::new(SPEC, &[(1, 40)]) };
        let mut batch = case.batch(true);
        let cpu = Cpu::new(1).unwrap();
        let before = case.run(&cpu, &batch);
        let free = (0..batch.pool.blocks() as u32).find(|b| !batch.tables[0].contains(b)).unwrap();
        batch.pool.copy_block(batch.tables[0][1], free);
        batch.tables[0][1] = free;
        assert_eq!(bits(&before), bits(&case.run(&cpu, &batch)), "{kv_type:?}");
    }
}

#[test]
fn a_pool_that_cannot_be_is_an_error() {
    let shape =
        |layers, kv_heads, head_dim| KvShape { layers, kv_heads, head_dim, kv_type: KvType::F32 };
    for (shape, blocks) in [
        (shape(30, 3, 64), usize::MAX),
        (shape(usize::MAX, 3, 64), 2),
        (shape(1, usize::MAX, 64), 1),
        (shape(1, 1, usize::MAX), 1),
        (shape(30, 3, 64), 1 << 50),
    ] {
        let error = KvPool::new(shape, blocks).unwrap_err();
        assert!(matches!(error, Error::KvTooLarge { .. }));
        assert!(error.to_string().contains(&format!("{blocks} blocks")), "{error}");
    }
}

#[test]
fn bytes_are_those_of_the_layout() {
    let shape = KvShape { layers: 30, kv_heads: 3, head_dim: 64, kv_type: KvType::F16 };
    assert_eq!(KvPool::bytes_per_block(&shape), 30 * 2 * 3 * 64 * 16 * 2);
    let pool = KvPool::new(shape, 5).unwrap();
    assert_eq!(pool.bytes(), 5 * KvPool::bytes_per_block(&shape));
    // A row of V is padded to 16 values.
    let odd = KvShape { layers: 1, kv_heads: 1, head_dim: 24, kv_type: KvType::F32 };
    assert_eq!(KvPool::bytes_per_block(&odd), (24 + 32) * 16 * 4);
    // 8.5 and 4.5 bits a value; heads are padded to 32 values.
    for (kv_type, group) in [
        (KvType::Q8_0 { rotated: false }, 34),
        (KvType::Q8_0 { rotated: true }, 34),
        (KvType::Q4_0 { rotated: true }, 18),
    ] {
        for (head_dim, groups) in [(64, 2), (80, 3), (96, 3), (7, 1)] {
            let shape = KvShape { layers: 30, kv_heads: 3, head_dim, kv_type };
            let bytes = 30 * 2 * 3 * groups * group * 16;
            assert_eq!(KvPool::bytes_per_block(&shape), bytes, "{kv_type:?} {head_dim}");
            assert_eq!(KvPool::new(shape, 5).unwrap().bytes(), 5 * bytes);
        }
    }
}
