use std::collections::{BTreeMap, BTreeSet, HashMap};

use bevel_engine::scheduler::{Chunk, Limits, Schedule, Scheduler, SequenceId};
use bevel_kernels::BLOCK_TOKENS;
use proptest::prelude::*;

use crate::memory::Memory;

fn limits(sequences: usize, step_tokens: usize) -> Limits {
    Limits {
        sequences,
        step_tokens,
        mixed_step_tokens: step_tokens,
        reserve: 0,
        prefix_cache: true,
    }
}

fn id(request: u64) -> SequenceId {
    SequenceId { request, index: 0 }
}

/// The scheduler with memory, a swap file, and answers of a given length.
struct Simulation {
    scheduler: Scheduler,
    memory: Memory,
    swapped: HashMap<SequenceId, Vec<[u64; BLOCK_TOKENS]>>,
    /// Tokens still to be generated, and answers to fork when the prompt was read.
    wanted: BTreeMap<SequenceId, (usize, u32)>,
    /// Requests that go on only when all of their sequences were computed, those that were, and the next
    /// sequence's number.
    groups: BTreeMap<u64, (BTreeSet<SequenceId>, u32)>,
    /// The swap file takes so many blocks.
    swap_blocks: usize,
    done: Vec<SequenceId>,
}

impl Simulation {
    fn new(limits: Limits, blocks: usize, swap_blocks: usize) -> Self {
        Self {
            scheduler: Scheduler::new(limits, blocks),
            memory: Memory::new(blocks),
            swapped: HashMap::new(),
            wanted: BTreeMap::new(),
            groups: BTreeMap::new(),
            swap_blocks,
            done: Vec::new(),
        }
    }

    fn add(&mut self, id: SequenceId, prompt: Vec<u32>, priority: i32, answer: usize, forks: u32) {
        self.scheduler.add(id, prompt, priority);
        self.wanted.insert(id, (answer, forks));
    }

    fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.wanted.remove(&id);
        self.swapped.remove(&id);
    }

    #[track_caller]
    fn step(&mut self) -> Schedule {
        let mut schedule = self.scheduler.schedule();
        if schedule.chunks.is_empty() {
            self.scheduler.make_way(&mut schedule);
        }
        self.scheduler.check();
        for save in &schedule.saves {
            let in_use: usize = self.swapped.values().map(Vec::len).sum();
            if in_use + save.blocks.len() <= self.swap_blocks {
                let blocks = save.blocks.iter().map(|&block| self.memory.get(block)).collect();
                self.swapped.insert(save.id, blocks);
                self.scheduler.saved(save.id, save.tokens);
            }
        }
        for &copy in &schedule.copies {
            self.memory.copy(copy);
        }
        for load in &schedule.loads {
            let blocks = self.swapped.remove(&load.id).expect("it was saved");
            for (&content, &block) in blocks[load.skip..].iter().zip(&load.blocks) {
                self.memory.set(block, content);
            }
        }
        for &Chunk { id, start, len, wants_next } in &schedule.chunks {
            let tokens = self.scheduler.tokens(id);
            assert_eq!(wants_next, start + len == tokens.len(), "{id:?}");
            let blocks = self.scheduler.table(id);
            self.memory.compute(blocks, &tokens[..start + len], start);
        }
        self.scheduler.computed(&schedule.chunks);
        self.scheduler.check();
        for chunk in &schedule.chunks {
            if chunk.wants_next && self.groups.contains_key(&chunk.id.request) {
                self.accept_in_group(chunk.id);
            } else if chunk.wants_next {
                self.accept(chunk.id);
            }
        }
        self.scheduler.check();
        schedule
    }

    /// As beam search goes on: some sequences become several, others none.
    fn accept_in_group(&mut self, id: SequenceId) {
        let (left, width) = self.wanted[&id];
        let all = self.wanted.keys().filter(|other| other.request == id.request).count();
        let (ready, next) = self.groups.get_mut(&id.request).unwrap();
        ready.insert(id);
        if ready.len() < all {
            return;
        }
        let (ready, mut next) = (std::mem::take(ready), *next);
        let parents: Vec<SequenceId> = ready.into_iter().collect();
        if left == 1 {
            parents.into_iter().for_each(|id| self.remove(id));
            self.done.push(id);
            return;
        }
        let length = self.scheduler.tokens(id).len();
        let chosen =
            |child: usize| parents[(child * length * 7 + child * 3 + length) % parents.len()];
        let children: Vec<SequenceId> = (0..width as usize).map(chosen).collect();
        for parent in parents.iter().filter(|parent| !children.contains(parent)) {
            self.remove(*parent);
        }
        let mut pushes = Vec::new();
        for (child, &parent) in children.iter().enumerate() {
            let mut id = parent;
            if pushes.iter().any(|&(taken, _)| taken == parent) {
                next += 1;
                id.index = next;
                self.scheduler.fork(parent, id);
            }
            self.wanted.insert(id, (left - 1, width));
            pushes.push((id, (child * 31 + length) as u32));
        }
        self.groups.get_mut(&id.request).unwrap().1 = next;
        for (id, token) in pushes {
            self.scheduler.push(id, token);
        }
    }

    fn accept(&mut self, id: SequenceId) {
        let forks = std::mem::take(&mut self.wanted.get_mut(&id).unwrap().1);
        let left = self.wanted[&id].0;
        let forks = (1..=forks).map(|index| SequenceId { index, ..id });
        let all: Vec<SequenceId> = std::iter::once(id).chain(forks).collect();
        for &fork in &all[1..] {
            self.scheduler.fork(id, fork);
            self.wanted.insert(fork, (left, 0));
        }
        for id in all {
            let left = &mut self.wanted.get_mut(&id).unwrap().0;
            *left -= 1;
            if *left == 0 {
                self.done.push(id);
                self.remove(id);
            } else {
                let next = self.scheduler.tokens(id).len() as u32 * 31 + id.index + 7;
                self.scheduler.push(id, next);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Action {
    Add { kind: u32, prompt: usize, answer: usize, priority: i32, forks: u32, group: bool },
    Cancel(usize),
    Steps(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        5 => (
            (0u32..3, 1usize..120, 1usize..60, -1i32..2),
            prop_oneof![3 => Just(0u32), 1 => 1u32..4],
            any::<bool>(),
        ).prop_map(|((kind, prompt, answer, priority), forks, group)| {
            Action::Add { kind, prompt, answer, priority, forks, group: group && forks > 0 }
        }),
        1 => any::<usize>().prop_map(Action::Cancel),
        5 => (1usize..12).prop_map(Action::Steps),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Over random histories: whatever is computed stands on what was computed before, no step exceeds its
    /// budget, no block is lost, and everything ends.
    #[test]
    fn everything_is_computed_once_and_ends(
        blocks in 12usize..40,
        sequences in 1usize..8,
        step_tokens in 32usize..200,
        reserve in 0usize..3,
        prefix_cache in any::<bool>(),
        swap_blocks in prop_oneof![Just(0usize), 1usize..60],
        actions in prop::collection::vec(action(), 1..40),
    ) {
        let limits = Limits { reserve, prefix_cache, ..limits(sequences, step_tokens) };
        let mut simulation = Simulation::new(limits, blocks, swap_blocks);
        let (mut added, mut cancelled) = (0u64, 0);
        let mut most_forks = 0;
        for action in actions {
            match action {
                Action::Add { kind, prompt, answer, priority, forks, group } => {
                    let tokens = (0..prompt as u32).map(|i| if i < 50 { i } else { i + kind * 999 });
                    // Alone in memory an answer has to fit.
                    let answer = answer.min(blocks * BLOCK_TOKENS - prompt);
                    most_forks = most_forks.max(forks as usize);
                    simulation.add(id(added), tokens.collect(), priority, answer, forks);
                    if group {
                        simulation.groups.insert(added, Default::default());
                    }
                    added += 1;
                }
                Action::Cancel(who) => {
                    let ids: Vec<SequenceId> = simulation.wanted.keys().copied().collect();
                    if !ids.is_empty() {
                        let id = ids[who % ids.len()];
                        let group = simulation.groups.contains_key(&id.request);
                        let of_group = |other: &&SequenceId| group && other.request == id.request;
                        ids.iter().filter(of_group).for_each(|&id| simulation.remove(id));
                        simulation.remove(id);
                        cancelled += 1;
                    }
                }
                Action::Steps(count) => for _ in 0..count {
                    let schedule = simulation.step();
                    let tokens: usize = schedule.chunks.iter().map(|chunk| chunk.len).sum();
                    let most = step_tokens.max((sequences + most_forks * sequences) + 32);
                    prop_assert!(tokens <= most, "{} tokens", tokens);
                }
            }
        }
        let mut idle = 0;
        while !simulation.wanted.is_empty() {
            let schedule = simulation.step();
            idle = if schedule.chunks.is_empty() { idle + 1 } else { 0 };
            // One of a group after the other may make way.
            let most = 2 + simulation.wanted.len();
            prop_assert!(idle < most, "nothing runs while sequences wait");
        }
        prop_assert!(simulation.done.len() as u64 + cancelled >= added);
        let (manager, (waiting, running)) =
            (simulation.scheduler.blocks(), simulation.scheduler.waiting_running());
        prop_assert_eq!((manager.unused(), waiting, running), (blocks, 0, 0));
    }
}

#[test]
fn prompts_are_read_beside_those_that_generate() {
    let mut simulation = Simulation::new(limits(8, 64), 100, 0);
    simulation.add(id(0), (0..10).collect(), 0, 50, 0);
    simulation.step();
    simulation.add(id(1), (1000..1200).collect(), 0, 5, 0);
    let schedule = simulation.step();
    let lens: Vec<usize> = schedule.chunks.iter().map(|chunk| chunk.len).collect();
    assert_eq!(lens, [1, 63], "one token of the first, and what the budget leaves");
}

#[test]
fn a_long_prompt_does_not_hold_up_a_short_one() {
    let mut simulation = Simulation::new(limits(8, 64), 200, 0);
    simulation.add(id(0), (0..2000).collect(), 0, 1, 0);
    simulation.add(id(1), (5000..5010).collect(), 0, 1, 0);
    let chunks = simulation.step().chunks;
    assert_eq!(chunks.len(), 2);
    assert_eq!((chunks[0].len, chunks[1].len, chunks[1].wants_next), (54, 10, true));
}

#[test]
fn a_common_beginning_is_read_once() {
    let mut simulation = Simulation::new(limits(8, 64), 200, 0);
    for request in 0..4 {
        let own = 1000 * (request as u32 + 1);
        simulation.add(id(request), (0..96).chain(own..own + 10).collect(), 0, 1, 0);
    }
    let mut computed = 0;
    while !simulation.wanted.is_empty() {
        computed += simulation.step().chunks.iter().map(|chunk| chunk.len).sum::<usize>();
    }
    assert_eq!(computed, 96 + 4 * 10);
}

#[test]
fn smaller_numbers_go_first() {
    let mut simulation = Simulation::new(limits(1, 64), 100, 0);
    simulation.add(id(0), vec![1], 5, 2, 0);
    simulation.add(id(1), vec![2], 0, 2, 0);
    simulation.add(id(2), vec![3], -5, 2, 0);
    while !simulation.wanted.is_empty() {
        simulation.step();
    }
    assert_eq!(simulation.done, [id(2), id(1), id(0)]);
}

#[test]
fn who_came_last_is_preempted_and_comes_back_from_the_file() {
    for swap_blocks in [0, 100] {
        let mut simulation = Simulation::new(limits(4, 64), 8, swap_blocks);
        simulation.add(id(0), (0..40).collect(), 0, 60, 0);
        simulation.add(id(1), (100..140).collect(), 0, 60, 0);
        let (mut saves, mut loads) = (0, 0);
        while !simulation.wanted.is_empty() {
            let schedule = simulation.step();
            assert!(schedule.saves.iter().all(|save| save.id == id(1)));
            saves += schedule.saves.len();
            loads += schedule.loads.len();
        }
        assert_eq!(simulation.done, [id(0), id(1)]);
        assert_eq!(saves, 1);
        // Its first blocks may still be in memory, but not all of them.
        assert_eq!(loads, usize::from(swap_blocks > 0));
    }
}
