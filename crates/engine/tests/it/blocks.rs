use bevel_engine::blocks::{BlockManager, NoRoom, Root, Table};
use bevel_kernels::BLOCK_TOKENS;
use proptest::prelude::*;

use crate::memory::Memory;

const B: usize = BLOCK_TOKENS;

/// The tokens of a prompt: few different ones, so that beginnings are shared.
fn prompt(kind: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| if i < 40 { i } else { i + kind * 1000 }).collect()
}

/// Makes room for all of `tokens`, computes what is not there, and commits it.
fn read(manager: &mut BlockManager, memory: &mut Memory, tokens: &[u32]) -> Option<Table> {
    let mut table = manager.allocate(Root::PLAIN, tokens, tokens.len() - 1);
    let start = table.len();
    match manager.append(&mut table, tokens.len() - start) {
        Ok(copy) => copy.into_iter().for_each(|copy| memory.copy(copy)),
        Err(NoRoom) => {
            manager.free(table);
            return None;
        }
    }
    memory.compute(table.blocks(), tokens, start);
    manager.commit(&mut table, tokens);
    Some(table)
}

#[derive(Clone, Debug)]
enum Action {
    Start { kind: u32, len: usize },
    Append { who: usize, count: usize },
    Fork { who: usize },
    Truncate { who: usize, len: usize },
    Free { who: usize },
    ClearCache,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0u32..3, 1usize..100).prop_map(|(kind, len)| Action::Start { kind, len }),
        8 => (any::<usize>(), 1usize..40).prop_map(|(who, count)| Action::Append { who, count }),
        3 => any::<usize>().prop_map(|who| Action::Fork { who }),
        3 => (any::<usize>(), 0usize..80).prop_map(|(who, len)| Action::Truncate { who, len }),
        3 => any::<usize>().prop_map(|who| Action::Free { who }),
        1 => Just(Action::ClearCache),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Whatever happens, a sequence finds in its blocks what it wrote there, nobody writes to a block that
    /// others use, and every block is either unused or in a table.
    #[test]
    fn blocks_keep_what_was_written(
        blocks in 1usize..24,
        actions in prop::collection::vec(action(), 1..80),
    ) {
        let (mut manager, mut memory) = (BlockManager::new(blocks), Memory::new(blocks));
        let mut sequences: Vec<(Table, Vec<u32>)> = Vec::new();
        let mut fresh = 1_000_000;
        for action in actions {
            let count = sequences.len();
            match action {
                Action::Start { kind, len } => {
                    let tokens = prompt(kind, len);
                    if let Some(table) = read(&mut manager, &mut memory, &tokens) {
                        sequences.push((table, tokens));
                    }
                }
                Action::Append { who, count: more } if count > 0 => {
                    let (table, tokens) = &mut sequences[who % count];
                    let (before, unused) = (table.len(), manager.unused());
                    match manager.append(table, more) {
                        Ok(copy) => {
                            copy.into_iter().for_each(|copy| memory.copy(copy));
                            tokens.extend((0..more as u32).map(|i| fresh + i));
                            fresh += more as u32;
                            memory.compute(table.blocks(), tokens, before);
                            manager.commit(table, tokens);
                        }
                        Err(NoRoom) => {
                            prop_assert_eq!((table.len(), manager.unused()), (before, unused));
                            prop_assert!((before + more).div_ceil(B) - before.div_ceil(B) + 1 > unused);
                        }
                    }
                }
                Action::Fork { who } if count > 0 => {
                    let (table, tokens) = &sequences[who % count];
                    let fork = manager.fork(table);
                    sequences.push((fork, tokens.clone()));
                }
                Action::Truncate { who, len } if count > 0 => {
                    let (table, tokens) = &mut sequences[who % count];
                    manager.truncate(table, len);
                    tokens.truncate(len);
                }
                Action::Free { who } if count > 0 => {
                    manager.free(sequences.swap_remove(who % count).0);
                }
                Action::ClearCache => manager.clear_cache(),
                _ => {}
            }
            manager.check(&sequences.iter().map(|s| &s.0).collect::<Vec<_>>());
            for (table, tokens) in &sequences {
                prop_assert_eq!(table.len(), tokens.len());
                memory.check(table.blocks(), tokens);
            }
        }
        for (table, _) in sequences.drain(..) {
            manager.free(table);
        }
        prop_assert_eq!(manager.unused(), blocks, "all blocks came back");
    }
}

#[test]
fn a_prompt_is_found_again_after_its_end() {
    let (mut manager, mut memory) = (BlockManager::new(16), Memory::new(16));
    let first = prompt(0, 70);
    let table = read(&mut manager, &mut memory, &first).unwrap();
    manager.free(table);
    assert_eq!(manager.unused(), 16);

    // 40 tokens are the same: two whole blocks.
    let table = manager.allocate(Root::PLAIN, &prompt(1, 70), 69);
    assert_eq!(table.len(), 2 * B);
    manager.free(table);
    // Of the same prompt all whole blocks, but the last token is computed.
    let table = manager.allocate(Root::PLAIN, &first, 69);
    assert_eq!(table.len(), 4 * B);
    manager.free(table);
    let table = manager.allocate(Root::PLAIN, &first[..64], 63);
    assert_eq!(table.len(), 3 * B);
    manager.free(table);
    assert_eq!(manager.stats().found, 9 * B as u64);
    // With an adapter the same tokens have other keys and values.
    let [one, other] = [[1, 2], [1, 3]].map(Root::of);
    for (root, found) in [(one, 0), (one, 4), (other, 0), (Root::PLAIN, 4)] {
        assert_eq!(manager.would_take(root, &first, 69), 5);
        let mut table = manager.allocate(root, &first, 69);
        assert_eq!(table.len(), found * B, "{root:?}");
        let more = 70 - table.len();
        manager.append(&mut table, more).unwrap();
        manager.commit(&mut table, &first);
        let fork = manager.fork(&table);
        manager.free(table);
        manager.free(fork);
    }
}

#[test]
fn what_was_used_longest_ago_makes_way_first_and_ends_before_beginnings() {
    let (mut manager, mut memory) = (BlockManager::new(6), Memory::new(6));
    let (old, new): (Vec<u32>, Vec<u32>) = ((0..48).collect(), (100..148).collect());
    for tokens in [&old, &new] {
        let table = read(&mut manager, &mut memory, tokens).unwrap();
        manager.free(table);
    }
    let other: Vec<u32> = (200..216).collect();
    let other = read(&mut manager, &mut memory, &other).unwrap();
    let cached = |manager: &mut BlockManager, tokens: &[u32]| {
        let table = manager.allocate(Root::PLAIN, tokens, tokens.len());
        let len = table.len();
        manager.free(table);
        len
    };
    assert_eq!(cached(&mut manager, &new), 48);
    assert_eq!(cached(&mut manager, &old), 32, "its end made way");
    assert_eq!(manager.stats().evicted, 1);
    manager.free(other);
}

#[test]
fn answers_share_a_prompt_until_they_part() {
    let (mut manager, mut memory) = (BlockManager::new(8), Memory::new(8));
    let tokens = prompt(0, 20);
    let mut first = read(&mut manager, &mut memory, &tokens).unwrap();
    let mut second = manager.fork(&first);
    let third = manager.fork(&first);
    assert_eq!(manager.unused(), 6, "three answers, one prompt");
    let copy = manager.append(&mut first, 1).unwrap().expect("others use the block");
    assert_eq!((copy.from, copy.to), (second.blocks()[1], first.blocks()[1]));
    assert_eq!(first.blocks()[0], second.blocks()[0]);
    manager.free(third);
    assert_eq!(manager.append(&mut second, 1), Ok(None), "nobody else is left");
    manager.check(&[&first, &second]);
    manager.free(first);
    manager.free(second);
}

#[test]
fn two_that_compute_the_same_do_not_get_into_each_others_way() {
    let (mut manager, mut memory) = (BlockManager::new(8), Memory::new(8));
    let tokens = prompt(0, 33);
    let mut tables =
        [manager.allocate(Root::PLAIN, &tokens, 32), manager.allocate(Root::PLAIN, &tokens, 32)];
    for table in &mut tables {
        assert!(table.is_empty(), "nothing is known yet");
        manager.append(table, 33).unwrap();
        memory.compute(table.blocks(), &tokens, 0);
        manager.commit(table, &tokens);
    }
    let [first, second] = tables;
    let known = first.blocks()[0];
    manager.check(&[&first, &second]);
    manager.free(second);
    manager.free(first);
    let table = manager.allocate(Root::PLAIN, &tokens, 32);
    assert_eq!((table.len(), table.blocks()[0]), (32, known));
    manager.free(table);
}
