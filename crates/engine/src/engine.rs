mod beams;
mod prompts;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bevel_kernels::{BLOCK_TOKENS, Cpu, KvPool, KvType};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Batch, HeadState, Model, Part, SamplerScratch, ScaledAdapter, State};

use crate::blocks::BlockStats;
use crate::error::{Error, Result};
use crate::grammar::Preparer;
use crate::request::{End, EndReason, Output, OutputToken, Refused, Request, RequestId};
use crate::scheduler::{Chunk, Limits, Schedule, Scheduler, SequenceId};
use crate::stream::{Chosen, Step, Stream};
use crate::swap::SwapFile;
use beams::Search;
pub(crate) use beams::{Beam, Candidate};

/// What an engine may use.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Tokens of prompt and answer together.
    pub context: usize,
    /// Tokens whose keys and values memory holds, of all sequences together.
    pub memory_tokens: usize,
    /// Sequences that run together.
    pub sequences: usize,
    /// Answers that may wait. Further requests are refused.
    pub queue: usize,
    /// Most tokens of a step.
    pub step_tokens: usize,
    /// How long a step should take in which others wait for their next token: prompts are read in chunks
    /// that are that small. Where the next tokens alone take a third of this or more, a step takes three times
    /// as long as they do.
    pub step_time: Duration,
    /// What prompts begin alike with is read once.
    pub prefix_cache: bool,
    /// Where preempted sequences are kept; without, they are computed again.
    pub swap: Option<Swap>,
}

/// A place for preempted sequences.
#[derive(Clone, Debug)]
pub struct Swap {
    /// A file without a name is made in this directory.
    pub directory: PathBuf,
    /// It grows no larger.
    pub bytes: u64,
}

impl EngineConfig {
    /// One that holds `sequences` contexts of `context` tokens, in half precision.
    pub fn new(context: usize, sequences: usize) -> Self {
        Self {
            kv_type: KvType::F16,
            context,
            memory_tokens: context.next_multiple_of(BLOCK_TOKENS).saturating_mul(sequences),
            sequences,
            queue: 1024,
            step_tokens: 512,
            step_time: Duration::from_millis(100),
            prefix_cache: true,
            swap: None,
        }
    }
}

/// An engine's state in numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that run.
    pub running: usize,
    /// Blocks of key–value memory.
    pub blocks: usize,
    /// Blocks that sequences use.
    pub blocks_used: usize,
    /// Tokens in these, and tokens that they could hold.
    pub tokens_used: usize,
    /// See `tokens_used`.
    pub tokens_of_used_blocks: usize,
    /// Blocks of preempted sequences in the swap file.
    pub blocks_swapped: usize,
    /// Of the block manager.
    pub block_stats: BlockStats,
    /// Times a sequence had to give up its blocks.
    pub preemptions: u64,
    /// Times the swap file failed: the sequence was computed again.
    pub swap_failures: u64,
    /// Steps so far.
    pub steps: u64,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
}

/// Runs requests on a model, all of them together.
///
/// What a request gets depends on nothing but itself: the model's results do not depend on what else is in a
/// batch, bit for bit.
#[derive(Debug)]
pub struct Engine<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    cpu: &'m Cpu,
    config: EngineConfig,
    scheduler: Scheduler,
    pool: KvPool,
    state: State,
    swap: Option<SwapFile>,
    streams: BTreeMap<SequenceId, Stream<'m>>,
    /// Beam searches, by their requests.
    searches: BTreeMap<u64, Search>,
    /// Logits of prompts.
    prompt_head: HeadState,
    /// Runs once there is something to prepare.
    preparer: Option<Preparer>,
    next_request: u64,
    /// One for each token that is chosen in a step.
    scratches: Vec<SamplerScratch>,
    /// Of reading prompts, lately.
    seconds_per_token: Option<f64>,
    /// Of steps that only generate, lately.
    seconds_to_generate: Option<f64>,
    metrics: Metrics,
}

impl<'m> Engine<'m> {
    /// An engine without requests.
    ///
    /// # Errors
    /// Where there is not enough memory for one context, or the swap file cannot be made.
    pub fn new(
        model: &'m Model,
        tokenizer: &'m Tokenizer,
        cpu: &'m Cpu,
        config: EngineConfig,
    ) -> Result<Self> {
        let blocks = config.memory_tokens / BLOCK_TOKENS;
        if blocks < config.context.div_ceil(BLOCK_TOKENS) {
            let EngineConfig { memory_tokens: tokens, context, .. } = config;
            return Err(Error::Memory { tokens, context });
        }
        let pool = KvPool::new(model.config().kv_shape(config.kv_type), blocks)?;
        let swap = match &config.swap {
            None => None,
            Some(Swap { directory, bytes }) => {
                Some(SwapFile::new(directory, *bytes, &pool).map_err(|error| Error::Swap {
                    directory: directory.display().to_string(),
                    error,
                })?)
            }
        };
        let limits = Limits {
            sequences: config.sequences,
            step_tokens: config.step_tokens,
            mixed_step_tokens: config.step_tokens,
            // A hundredth of memory, as vLLM has it.
            reserve: blocks / 100,
            prefix_cache: config.prefix_cache,
        };
        Ok(Self {
            model,
            tokenizer,
            cpu,
            scheduler: Scheduler::new(limits, blocks),
            pool,
            state: State::new(model.config(), config.context),
            swap,
            streams: BTreeMap::new(),
            searches: BTreeMap::new(),
            prompt_head: HeadState::default(),
            preparer: None,
            next_request: 0,
            scratches: Vec::new(),
            seconds_per_token: None,
            seconds_to_generate: None,
            metrics: Metrics { blocks, ..Metrics::default() },
            config,
        })
    }

    /// Takes in a request.
    ///
    /// # Errors
    /// Where it cannot be served.
    pub fn submit(&mut self, request: Request) -> std::result::Result<RequestId, Refused> {
        let vocabulary = self.model.config().vocab_size;
        let (tokens, context) = (request.prompt.len(), self.config.context);
        let expected = self.scheduler.expected();
        if request.prompt.is_empty() {
            return Err(Refused::EmptyPrompt);
        }
        if tokens > context {
            return Err(Refused::PromptTooLong { tokens, context });
        }
        if let Some(&token) = request.prompt.iter().find(|&&t| t as usize >= vocabulary) {
            return Err(Refused::Token { token, vocabulary });
        }
        if request.answers == 0 || request.answers as usize > self.config.sequences {
            return Err(Refused::Answers { asked: request.answers, most: self.config.sequences });
        }
        let (asked, answers) = (request.sequences(), request.answers);
        if asked < answers || asked as usize > self.config.sequences {
            return Err(Refused::Beams { asked, answers, most: self.config.sequences });
        }
        // What could run at once does not wait, even if no step has begun since it came.
        if expected >= self.config.queue.saturating_add(self.config.sequences) {
            return Err(Refused::QueueFull(expected));
        }
        if request.constraint.is_some() && self.preparer.is_none() {
            let preparer = Preparer::new().map_err(|error| Refused::Thread(error.to_string()))?;
            self.preparer = Some(preparer);
        }
        let id = SequenceId { request: self.next_request, index: 0 };
        self.next_request += 1;
        self.scheduler.add(id, request.prompt.clone(), request.priority);
        self.scheduler.expect(id, asked as usize);
        self.scheduler.begin_at(id, request.root());
        if request.wants_whole_prompt() {
            self.scheduler.compute_whole(id);
        }
        if let Some(beams) = request.beams {
            self.searches.insert(id.request, Search::new(beams, &request, self.config.context));
        }
        self.streams.insert(id, Stream::new(Arc::new(request), 0, self.tokenizer));
        Ok(RequestId(id.request))
    }

    /// Ends a request without further outputs. Its blocks are free at once.
    pub fn cancel(&mut self, request: RequestId) {
        let ids: Vec<SequenceId> = self.answers(request.0).collect();
        ids.into_iter().for_each(|id| self.remove(id));
        self.searches.remove(&request.0);
    }

    /// True while there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.streams.is_empty()
    }

    /// Runs whatever is to be run next, and tells what came of it.
    ///
    /// # Errors
    /// Those of the model that concern no single request.
    pub fn step(&mut self) -> Result<Vec<Output>> {
        let mut outputs = self.end_overdue();
        let schedule = self.schedule();
        let rows = self.forward(&schedule.chunks)?;
        outputs.extend(self.embed(&schedule.chunks));
        self.score_prompts(&schedule.chunks);
        outputs.extend(self.take_constraints(schedule.chunks.is_empty()));
        let chosen = self.choose(rows);
        outputs.extend(self.accept(chosen));
        Ok(outputs)
    }

    /// The state in numbers.
    pub fn metrics(&self) -> Metrics {
        let (waiting, running) = self.scheduler.waiting_running();
        let (tokens_used, tokens_of_used_blocks) = self.scheduler.use_of_memory();
        let blocks = self.scheduler.blocks();
        Metrics {
            waiting,
            running,
            blocks_used: blocks.blocks() - blocks.unused(),
            tokens_used,
            tokens_of_used_blocks,
            blocks_swapped: self.swap.as_ref().map_or(0, SwapFile::blocks),
            block_stats: blocks.stats(),
            preemptions: self.scheduler.preemptions(),
            ..self.metrics.clone()
        }
    }

    /// Answers whose time is up.
    fn end_overdue(&mut self) -> Vec<Output> {
        let now = Instant::now();
        let overdue = |s: &Stream<'_>| s.request.deadline.is_some_and(|deadline| deadline <= now);
        let ids: Vec<SequenceId> =
            self.streams.iter().filter(|(_, s)| overdue(s)).map(|(&id, _)| id).collect();
        let mut outputs = Vec::new();
        for id in ids {
            // It may have ended with another beam.
            if self.streams.contains_key(&id) {
                outputs.extend(self.end(id, EndReason::Deadline));
            }
        }
        outputs
    }

    /// Chooses what runs, and moves the blocks that have to move first.
    fn schedule(&mut self) -> Schedule {
        if let Some(seconds) = self.seconds_per_token {
            let thrice = 3.0 * self.seconds_to_generate.unwrap_or(0.0);
            let tokens = self.config.step_time.as_secs_f64().max(thrice) / seconds;
            self.scheduler.limits_mut().mixed_step_tokens =
                (tokens as usize).min(self.config.step_tokens);
        }
        let mut schedule = self.scheduler.schedule();
        let prepares = self.preparer.as_ref().is_some_and(Preparer::is_busy);
        if schedule.chunks.is_empty() && !prepares {
            self.scheduler.make_way(&mut schedule);
        }
        for save in &schedule.saves {
            let Some(swap) = &mut self.swap else { break };
            match swap.save(&self.pool, save) {
                Ok(true) => self.scheduler.saved(save.id, save.tokens),
                Ok(false) => {}
                Err(_) => self.metrics.swap_failures += 1,
            }
        }
        for copy in &schedule.copies {
            self.pool.copy_block(copy.from, copy.to);
        }
        for load in &schedule.loads {
            let swap = self.swap.as_mut().expect("what is loaded was saved");
            if swap.load(&mut self.pool, load).is_err() {
                self.metrics.swap_failures += 1;
                self.scheduler.restart(load.id);
                schedule.chunks.retain(|chunk| chunk.id != load.id);
            }
        }
        self.put_alike_together(&mut schedule.chunks);
        for chunk in &schedule.chunks {
            let stream = self.streams.get_mut(&chunk.id).expect("it runs");
            stream.cached_tokens.get_or_insert(chunk.start);
        }
        schedule
    }

    /// Orders chunks so that those with the same adapters follow each other: each adapter is then read once.
    fn put_alike_together(&self, chunks: &mut [Chunk]) {
        let adapters = |chunk: &Chunk| &self.streams[&chunk.id].request.adapters;
        if chunks.iter().any(|chunk| !adapters(chunk).is_empty()) {
            let number = |a: &ScaledAdapter| (a.adapter.id(), a.scale.to_bits());
            chunks
                .sort_by_cached_key(|chunk| adapters(chunk).iter().map(number).collect::<Vec<_>>());
        }
    }

    /// Runs the chunks. The state then has logits, `[rows, vocab]`; whose each row is comes back.
    fn forward(&mut self, chunks: &[Chunk]) -> Result<Vec<SequenceId>> {
        let mut rows = Vec::new();
        if chunks.is_empty() {
            return Ok(rows);
        }
        let start = Instant::now();
        let (mut tokens, mut parts, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
        for &Chunk { id, start, len, wants_next } in chunks {
            tokens.extend_from_slice(&self.scheduler.tokens(id)[start..start + len]);
            let blocks = self.scheduler.table(id);
            let adapters = &self.streams[&id].request.adapters;
            parts.push(Part { tokens: len, context: start + len, blocks, tree: &[], adapters });
            if wants_next && self.streams[&id].request.embed.is_none() {
                outputs.push(tokens.len() - 1);
                rows.push(id);
            }
        }
        let batch = Batch { tokens: &tokens, parts: &parts, outputs: &outputs };
        match self.model.forward(self.cpu, &batch, &mut self.pool, &mut self.state) {
            // Whose they are is seen when tokens are chosen.
            Ok(_) | Err(bevel_model::Error::NotFinite { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.scheduler.computed(chunks);
        self.measure(chunks, start.elapsed());
        Ok(rows)
    }

    /// Learns from a step how long they take.
    fn measure(&mut self, chunks: &[Chunk], time: Duration) {
        let count = |chunk: &Chunk| chunk.len;
        let all: usize = chunks.iter().map(count).sum();
        let prompts: usize =
            chunks.iter().filter(|chunk| !chunk.wants_next || chunk.len > 1).map(count).sum();
        self.metrics.steps += 1;
        self.metrics.prompt_tokens += prompts as u64;
        let lately = |mean: &mut Option<f64>, now: f64| {
            *mean = Some(mean.map_or(now, |before| 0.8 * before + 0.2 * now));
        };
        if prompts >= 2 * BLOCK_TOKENS {
            lately(&mut self.seconds_per_token, time.as_secs_f64() / all as f64);
        } else if prompts == 0 {
            lately(&mut self.seconds_to_generate, time.as_secs_f64());
        }
    }

    /// Takes back the constraints that were prepared while the model ran. Those that take longer than half a
    /// step's time are waited for only where there was nothing else to do (`idle`): their sequences sit out.
    fn take_constraints(&mut self, idle: bool) -> Vec<Output> {
        let Some(preparer) = &mut self.preparer else { return Vec::new() };
        let patience = if idle { Duration::MAX } else { self.config.step_time / 2 };
        let mut outputs = Vec::new();
        for (id, result) in preparer.finish(patience) {
            match (result, self.streams.get_mut(&id)) {
                // It was cancelled meanwhile.
                (_, None) => {}
                (Ok(constraint), Some(stream)) => stream.constraint = Some(constraint),
                (Err(problem), Some(_)) => {
                    outputs.extend(self.end(id, EndReason::Grammar(problem)))
                }
            }
        }
        outputs
    }

    /// What follows every sequence that has a row of logits and has not ended meanwhile.
    fn choose(&mut self, owners: Vec<SequenceId>) -> Vec<(SequenceId, Chosen)> {
        let mut rows: HashMap<SequenceId, usize> = HashMap::new();
        for (row, id) in owners.into_iter().enumerate() {
            if self.streams.contains_key(&id) {
                rows.insert(id, row);
                rows.extend(self.fork(id).into_iter().map(|id| (id, row)));
            }
        }
        let vocabulary = self.model.config().vocab_size;
        let (cpu, scheduler, logits) = (self.cpu, &self.scheduler, self.state.logits());
        let mut ready = Vec::with_capacity(rows.len());
        for (&id, stream) in &mut self.streams {
            let row = rows.get(&id).map(|row| &logits[row * vocabulary..][..vocabulary]);
            ready.extend(stream.choosable(row).map(|logits| (id, stream, logits)));
        }
        self.scratches.resize_with(ready.len().max(self.scratches.len()), Default::default);
        let mut tasks: Vec<_> = ready
            .into_iter()
            .zip(&mut self.scratches)
            .map(|((id, stream, logits), scratch)| (id, stream, logits, scratch, None))
            .collect();
        cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
            let (id, stream, logits, scratch, chosen) = &mut task[0];
            *chosen = Some(stream.choose(cpu, logits, scheduler.tokens(*id), scratch));
        });
        tasks.into_iter().filter_map(|(id, .., chosen)| Some((id, chosen?))).collect()
    }

    /// The further answers to a request whose prompt has just been read.
    fn fork(&mut self, id: SequenceId) -> Vec<SequenceId> {
        let others: Vec<SequenceId> = self.unborn(id).collect();
        for &other in &others {
            self.scheduler.fork(id, other);
            let first = &self.streams[&id];
            let mut stream = Stream::new(first.request.clone(), other.index, self.tokenizer);
            stream.cached_tokens = first.cached_tokens;
            self.streams.insert(other, stream);
        }
        others
    }

    /// The answers that will share what the first one reads, while it reads.
    fn unborn(&self, id: SequenceId) -> impl Iterator<Item = SequenceId> + use<> {
        let stream = &self.streams[&id];
        let reads = stream.answer_tokens == 0 && self.answers(id.request).nth(1).is_none();
        let alone = !reads || id.index > 0 || stream.request.beams.is_some();
        let answers = if alone { 1 } else { stream.request.answers };
        (1..answers).map(move |index| SequenceId { index, ..id })
    }

    /// Adds what was chosen to the answers.
    fn accept(&mut self, chosen: Vec<(SequenceId, Chosen)>) -> Vec<Output> {
        let mut outputs = Vec::with_capacity(chosen.len());
        for (id, chosen) in chosen {
            // Its request may have ended with another beam.
            if !self.streams.contains_key(&id) {
                continue;
            }
            match chosen {
                Chosen::Token(token) => outputs.push(self.push(id, token)),
                Chosen::Candidates(candidates) => outputs.extend(self.extend_beam(id, candidates)),
                Chosen::NotFinite => outputs.extend(self.end(id, EndReason::NotFinite)),
            }
        }
        outputs
    }

    /// Adds a token to an answer.
    fn push(&mut self, id: SequenceId, token: OutputToken) -> Output {
        let mut stream = self.streams.remove(&id).expect("it ran");
        self.metrics.generated_tokens += 1;
        // Its own place is all that the token needs to be followed by another.
        let room = self.scheduler.tokens(id).len() < self.config.context;
        let chosen = token.id;
        let step = stream.push(token, self.tokenizer.end_of_generation(), room);
        let ended = step.end.is_some();
        let output = output(id, &mut stream, step);
        if ended {
            self.remove(id);
        } else {
            self.prepare(id, &mut stream);
            self.streams.insert(id, stream);
            self.scheduler.push(id, chosen);
        }
        output
    }

    /// Begins to find out what may follow.
    fn prepare(&mut self, id: SequenceId, stream: &mut Stream<'m>) {
        if let Some(constraint) = stream.constraint.take() {
            let preparer = self.preparer.as_mut().expect("it runs since the request came");
            preparer.start(id, constraint);
        }
    }

    /// Ends an answer from outside, and with it those that would have come of it.
    fn end(&mut self, id: SequenceId, reason: EndReason) -> Vec<Output> {
        let stream = &self.streams[&id];
        let ids: Vec<SequenceId> = match stream.request.beams {
            None => std::iter::once(id).chain(self.unborn(id)).collect(),
            Some(_) => (0..stream.request.answers).map(|i| SequenceId { index: i, ..id }).collect(),
        };
        // What a search would have found nobody knows.
        let searches = stream.request.beams.is_some();
        let mut stream = self.streams.remove(&id).expect("it has not ended");
        if searches {
            stream = stream.again(0, self.tokenizer);
            self.cancel(RequestId(id.request));
        }
        let mut outputs = Vec::with_capacity(ids.len());
        for id in ids {
            let step = stream.finish(reason.clone(), None);
            outputs.push(output(id, &mut stream, step));
        }
        self.remove(id);
        outputs
    }

    fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.streams.remove(&id);
        if let Some(swap) = &mut self.swap {
            swap.discard(id);
        }
    }

    /// The answers of a request that have not ended.
    fn answers(&self, request: u64) -> impl Iterator<Item = SequenceId> {
        let id = |index| SequenceId { request, index };
        self.streams.range(id(0)..=id(u32::MAX)).map(|(&id, _)| id)
    }
}

fn output(id: SequenceId, stream: &mut Stream<'_>, step: Step) -> Output {
    let end = step.end.map(|reason| End {
        reason,
        prompt_tokens: stream.request.prompt.len(),
        cached_tokens: stream.cached_tokens.unwrap_or(0),
        answer_tokens: stream.answer_tokens,
    });
    let (request, index) = (RequestId(id.request), id.index);
    let prompt_logprobs = std::mem::take(&mut stream.prompt_logprobs);
    let Step { text, token, .. } = step;
    Output { request, index, text, token, embedding: None, prompt_logprobs, end }
}
