//! Continuous batching (Orca, OSDI 2022; chunked prefill: Sarathi-Serve, arXiv 2403.02310): what runs in the
//! next step. A state machine without data, clock or threads.
//!
//! 1. Every sequence that generates gets the place for its next token. Where memory runs out, the
//!    sequence that comes last is preempted: it gives up its blocks and waits again.
//! 2. Waiting sequences are admitted in their order, while memory holds their prompts. One that begins as
//!    another that is being read waits until it can take the common part from the prefix cache.
//! 3. What is left of the step's budget of tokens is shared out among those that still read their prompts,
//!    so that a long prompt delays neither the short ones nor the sequences that generate.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use bevel_kernels::BLOCK_TOKENS;

use crate::blocks::{BlockCopy, BlockManager, NoRoom, Root, Table};

/// One of the answers to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request, by when it came.
    pub request: u64,
    /// Which of its answers.
    pub index: u32,
}

/// How much runs at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run together.
    pub sequences: usize,
    /// Tokens of a step.
    pub step_tokens: usize,
    /// Tokens of a step in which sequences generate: they wait for all of it.
    pub mixed_step_tokens: usize,
    /// Blocks that stay unused when a sequence is admitted, so that those that run can grow.
    pub reserve: usize,
    /// What sequences begin alike with is computed once.
    pub prefix_cache: bool,
}

/// Fewest tokens of a prompt that are worth a place in a step.
const LEAST_CHUNK: usize = 2 * BLOCK_TOKENS;

/// What runs in a step. `saves`, `copies` and `loads` come first, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Sequences that were preempted, with what they held: it is there until the step writes.
    pub saves: Vec<Save>,
    /// Blocks to copy.
    pub copies: Vec<BlockCopy>,
    /// Sequences whose saved blocks are wanted again.
    pub loads: Vec<Load>,
    /// Tokens to compute.
    pub chunks: Vec<Chunk>,
}

/// What a preempted sequence held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Save {
    /// Whose.
    pub id: SequenceId,
    /// Its blocks.
    pub blocks: Vec<u32>,
    /// Tokens in them.
    pub tokens: usize,
}

/// Saved blocks that are wanted again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Whose.
    pub id: SequenceId,
    /// Its first blocks are still in memory: so many.
    pub skip: usize,
    /// Where the others go.
    pub blocks: Vec<u32>,
}

/// Consecutive tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub id: SequenceId,
    /// The first one's position.
    pub start: usize,
    /// How many.
    pub len: usize,
    /// They are the last ones: what follows them is wanted.
    pub wants_next: bool,
}

/// Decides what runs.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    sequences: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    preemptions: u64,
}

/// The order in which sequences are served: by priority, then by when their request came.
type Rank = (i32, SequenceId);

#[derive(Debug)]
struct Sequence {
    priority: i32,
    root: Root,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    /// Room for what has been computed.
    table: Table,
    /// Tokens whose keys and values were saved when it was preempted.
    saved: usize,
    /// All of its tokens are computed for it, whatever the prefix cache has.
    whole: bool,
    /// Sequences that it will be once its prompt was read.
    answers: usize,
    /// What follows its last token was computed: there is nothing to do until that token is chosen.
    ready: bool,
}

impl Sequence {
    fn new(priority: i32, tokens: Vec<u32>) -> Self {
        let (table, whole, ready) = (Table::default(), false, false);
        let root = Root::PLAIN;
        Self { priority, root, tokens, table, saved: 0, whole, answers: 1, ready }
    }

    /// Tokens that are still to be computed.
    fn left(&self) -> usize {
        if self.ready { 0 } else { self.tokens.len() - self.table.len() }
    }
}

impl Scheduler {
    /// A scheduler over `blocks` blocks of memory.
    pub fn new(limits: Limits, blocks: usize) -> Self {
        Self {
            limits,
            blocks: BlockManager::new(blocks),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            preemptions: 0,
        }
    }

    /// Takes in a sequence; those of smaller `priority` go first.
    ///
    /// # Panics
    /// Where it has no tokens, or more than all memory holds.
    pub fn add(&mut self, id: SequenceId, tokens: Vec<u32>, priority: i32) {
        assert!(!tokens.is_empty(), "something has to be computed");
        assert!(tokens.len() <= self.blocks.blocks() * BLOCK_TOKENS, "memory holds the prompt");
        self.sequences.insert(id, Sequence::new(priority, tokens));
        self.waiting.insert((priority, id));
    }

    /// `id` will be forked, to be so many sequences.
    pub fn expect(&mut self, id: SequenceId, answers: usize) {
        self.get(id).answers = answers;
    }

    /// What keys and values of `id` depend on beside its tokens. It has none so far.
    pub fn begin_at(&mut self, id: SequenceId, root: Root) {
        self.get(id).root = root;
    }

    /// Sequences that run or wait, those counted that will be forked.
    pub fn expected(&self) -> usize {
        self.sequences.values().map(|sequence| sequence.answers).sum()
    }

    /// All tokens of `id` are to be computed for it, because what they give is wanted and not only what follows.
    pub fn compute_whole(&mut self, id: SequenceId) {
        self.get(id).whole = true;
    }

    /// A second answer, that shares what `id` has so far: what follows that has just been computed.
    pub fn fork(&mut self, id: SequenceId, new: SequenceId) {
        let parent = self.get(id);
        parent.answers = parent.answers.saturating_sub(1).max(1);
        let Sequence { priority, root, tokens, table, ready, .. } = &self.sequences[&id];
        let (rank, runs) = ((*priority, new), self.running.contains(&(*priority, id)));
        let table = self.blocks.fork(table);
        let (root, ready) = (*root, *ready);
        let fork = Sequence { root, table, ready, ..Sequence::new(*priority, tokens.clone()) };
        self.sequences.insert(new, fork);
        if runs {
            self.running.insert(rank);
        }
    }

    /// The next token of a sequence whose last chunk wanted it.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        let sequence = self.get(id);
        sequence.tokens.push(token);
        sequence.ready = false;
        let rank = (sequence.priority, id);
        // It may have given up its blocks while the token was being chosen.
        if !self.running.contains(&rank) {
            self.waiting.insert(rank);
        }
    }

    /// A sequence has ended; its blocks are free.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        let rank = (sequence.priority, id);
        self.waiting.remove(&rank);
        self.running.remove(&rank);
        self.blocks.free(sequence.table);
    }

    /// The first `tokens` tokens of a preempted sequence were saved: they will be wanted by a [`Load`].
    pub fn saved(&mut self, id: SequenceId, tokens: usize) {
        self.get(id).saved = tokens;
    }

    /// Prompt and answer of a sequence.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        &self.sequences[&id].tokens
    }

    /// The block table of a sequence.
    pub fn table(&self, id: SequenceId) -> &[u32] {
        self.sequences[&id].table.blocks()
    }

    /// Sequences that wait and that run.
    pub fn waiting_running(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    /// Times a sequence had to give up its blocks.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Tokens whose keys and values lie in blocks that some sequence uses, and the tokens these blocks
    /// could hold: the difference is waste.
    pub fn use_of_memory(&self) -> (usize, usize) {
        // A shared block is counted once, as full as its fullest user has it.
        let mut filled = BTreeMap::new();
        for sequence in self.sequences.values() {
            for (i, &block) in sequence.table.blocks().iter().enumerate() {
                let here = (sequence.table.len() - i * BLOCK_TOKENS).min(BLOCK_TOKENS);
                filled.entry(block).and_modify(|f: &mut usize| *f = here.max(*f)).or_insert(here);
            }
        }
        (filled.values().sum(), filled.len() * BLOCK_TOKENS)
    }

    /// The blocks.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// The limits, which may change between steps.
    pub fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    /// What runs next. All of it counts as computed once [`Scheduler::computed`] is called.
    pub fn schedule(&mut self) -> Schedule {
        let mut schedule = Schedule::default();
        self.generate(&mut schedule);
        let generating = schedule.chunks.len();
        let budget = match generating {
            0 => self.limits.step_tokens,
            _ => self.limits.mixed_step_tokens.saturating_sub(generating).max(LEAST_CHUNK),
        };
        if schedule.saves.is_empty() {
            self.admit(budget / LEAST_CHUNK, &mut schedule);
        }
        self.read_prompts(budget, &mut schedule);
        schedule
    }

    /// Where nothing can run because sequences hold memory that wait for others (for the token that is chosen
    /// once all of them are computed): the last of them makes way.
    pub fn make_way(&mut self, schedule: &mut Schedule) {
        if schedule.saves.is_empty() && !self.waiting.is_empty() && !self.running.is_empty() {
            self.preempt_last(schedule);
        }
    }

    /// A step's chunks were computed: what they gave may be shared.
    pub fn computed(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            let sequence = self.sequences.get_mut(&chunk.id).expect("it ran");
            let tokens = &sequence.tokens[..chunk.start + chunk.len];
            self.blocks.commit(&mut sequence.table, tokens);
            sequence.ready = chunk.wants_next;
        }
    }

    /// (1) Places for the next tokens of those that generate.
    fn generate(&mut self, schedule: &mut Schedule) {
        let mut next = self.running.first().copied();
        while let Some(rank) = next {
            let id = rank.1;
            if self.sequences[&id].left() == 1 {
                while self.running.contains(&rank) && self.grow(id, 1, schedule).is_err() {
                    self.preempt_last(schedule);
                }
            }
            next = after(&self.running, rank);
        }
    }

    /// (2) Waiting sequences join, while there are fewer than `most` that read prompts.
    fn admit(&mut self, most: usize, schedule: &mut Schedule) {
        let mut readers: Vec<SequenceId> = self.readers().collect();
        let left = |id: &SequenceId| self.sequences[id].left().div_ceil(BLOCK_TOKENS);
        let mut promised: usize = readers.iter().map(left).sum();
        let mut next = self.waiting.first().copied();
        while let Some(rank) = next {
            let id = rank.1;
            let running: usize = self.running.iter().map(|r| self.sequences[&r.1].answers).sum();
            let together = running + self.sequences[&id].answers;
            if readers.len() >= most || running > 0 && together > self.limits.sequences {
                return;
            }
            next = after(&self.waiting, rank);
            let Sequence { root, tokens, whole, .. } = &self.sequences[&id];
            let shares = self.limits.prefix_cache && !whole;
            // The last token is always computed: it says what comes next.
            let most_found = if shares { tokens.len() - 1 } else { 0 };
            let wanted = &tokens[..most_found];
            if readers.iter().any(|&reader| self.is_reading_for(reader, *root, wanted)) {
                continue;
            }
            let taken = self.blocks.would_take(*root, tokens, most_found);
            let reserve = if self.running.is_empty() { 0 } else { self.limits.reserve };
            if taken + promised + reserve > self.blocks.unused() {
                return;
            }
            let sequence = self.sequences.get_mut(&id).expect("it waits");
            sequence.table = self.blocks.allocate(sequence.root, &sequence.tokens, most_found);
            let saved = std::mem::take(&mut sequence.saved);
            if saved > sequence.table.len() {
                let skip = sequence.table.blocks().len();
                let more = saved - sequence.table.len();
                let room = self.blocks.append(&mut sequence.table, more);
                assert_eq!(room, Ok(None), "there are enough blocks, and whole ones are shared");
                let blocks = sequence.table.blocks()[skip..].to_vec();
                schedule.loads.push(Load { id, skip, blocks });
            }
            promised += sequence.left().div_ceil(BLOCK_TOKENS);
            readers.push(id);
            self.waiting.remove(&rank);
            self.running.insert(rank);
        }
    }

    /// Sequences that run and have more to read than the token they chose last.
    fn readers(&self) -> impl Iterator<Item = SequenceId> {
        self.running.iter().map(|rank| rank.1).filter(|id| self.sequences[id].left() > 0)
    }

    /// Whether a running sequence is about to compute what `tokens` begin with: it is worth waiting for.
    fn is_reading_for(&self, reader: SequenceId, root: Root, tokens: &[u32]) -> bool {
        let Sequence { tokens: read, table, root: at, .. } = &self.sequences[&reader];
        let done = table.len() / BLOCK_TOKENS * BLOCK_TOKENS;
        let common = read.len().min(tokens.len()) / BLOCK_TOKENS * BLOCK_TOKENS;
        *at == root
            && common >= done + LEAST_CHUNK
            && read[..done + LEAST_CHUNK] == tokens[..done + LEAST_CHUNK]
    }

    /// (3) Chunks of prompts.
    fn read_prompts(&mut self, budget: usize, schedule: &mut Schedule) {
        let readers: Vec<SequenceId> = self.readers().collect();
        // As many at a time as get a chunk worth computing, in their order.
        let readers = &readers[..readers.len().min(budget / LEAST_CHUNK)];
        let Some(share) = budget.checked_div(readers.len()) else { return };
        let left: Vec<usize> = readers.iter().map(|id| self.sequences[id].left()).collect();
        // What the short ones do not need goes to the first ones that do.
        let mut spare = budget - left.iter().map(|&left| left.min(share)).sum::<usize>();
        for (&id, left) in readers.iter().zip(left) {
            let more = left.saturating_sub(share).min(spare);
            spare -= more;
            let count = left.min(share) + more;
            if self.grow(id, count, schedule).is_ok() {
                continue;
            }
            // Sequences that generate will end and make room, unless there are none.
            if schedule.chunks.is_empty() {
                while self.running.contains(&(self.sequences[&id].priority, id))
                    && self.grow(id, count, schedule).is_err()
                {
                    self.preempt_last(schedule);
                }
            }
            return;
        }
    }

    /// Makes room for the next `count` tokens of a sequence and puts them on the schedule.
    fn grow(
        &mut self,
        id: SequenceId,
        count: usize,
        schedule: &mut Schedule,
    ) -> Result<(), NoRoom> {
        let sequence = self.sequences.get_mut(&id).expect("it runs");
        let start = sequence.table.len();
        let copy = self.blocks.append(&mut sequence.table, count)?;
        schedule.copies.extend(copy);
        let wants_next = sequence.table.len() == sequence.tokens.len();
        schedule.chunks.push(Chunk { id, start, len: count, wants_next });
        Ok(())
    }

    /// Takes its blocks from the sequence that comes last.
    fn preempt_last(&mut self, schedule: &mut Schedule) {
        let (_, id) = *self.running.last().expect("somebody has the blocks");
        let table = &self.sequences[&id].table;
        match schedule.loads.iter().position(|load| load.id == id) {
            // It has just come, and its blocks are where they were.
            Some(load) => {
                schedule.loads.remove(load);
                self.get(id).saved = self.sequences[&id].table.len();
            }
            None => {
                let (blocks, tokens) = (table.blocks().to_vec(), table.len());
                schedule.saves.push(Save { id, blocks, tokens });
            }
        }
        self.restart(id);
    }

    /// A running sequence gives up its blocks and waits again, unless there is nothing to compute for it yet.
    pub fn restart(&mut self, id: SequenceId) {
        let sequence = self.get(id);
        let (rank, table) = ((sequence.priority, id), std::mem::take(&mut sequence.table));
        let waits = !sequence.ready;
        self.blocks.free(table);
        self.running.remove(&rank);
        if waits {
            self.waiting.insert(rank);
        }
        self.preemptions += 1;
    }

    fn get(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("a sequence that was added and not removed")
    }

    /// Panics where an invariant does not hold.
    #[doc(hidden)]
    pub fn check(&self) {
        let tables: Vec<&Table> = self.sequences.values().map(|s| &s.table).collect();
        self.blocks.check(&tables);
        let mut queued = 0;
        for (id, sequence) in &self.sequences {
            let rank = (sequence.priority, *id);
            let (waits, runs) = (self.waiting.contains(&rank), self.running.contains(&rank));
            assert!(!(waits && runs), "{id:?} waits and runs");
            assert!(waits || runs || sequence.ready, "{id:?} is forgotten");
            assert!(!waits || !sequence.ready, "{id:?} waits for nothing");
            assert!(runs || sequence.table.is_empty(), "{id:?} has blocks and does not run");
            queued += usize::from(waits || runs);
        }
        assert_eq!(self.waiting.len() + self.running.len(), queued);
    }
}

/// The one that comes after `rank`.
fn after(ranks: &BTreeSet<Rank>, rank: Rank) -> Option<Rank> {
    ranks.range((Bound::Excluded(rank), Bound::Unbounded)).next().copied()
}
