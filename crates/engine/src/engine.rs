use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bevel_kernels::{BLOCK_TOKENS, Cpu, KvPool, KvType};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Batch, Model, Part, SamplerScratch, State};

use crate::blocks::BlockStats;
use crate::error::{Error, Result};
use crate::grammar::Preparer;
use crate::request::{End, EndReason, Output, OutputToken, Pooling, Refused, Request, RequestId};
use crate::scheduler::{Chunk, Limits, Schedule, Scheduler, SequenceId};
use crate::stream::{Step, Stream};
use crate::swap::SwapFile;

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
    /// that are that small.
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
    /// Runs once there is something to prepare.
    preparer: Option<Preparer>,
    next_request: u64,
    /// One for each token that is chosen in a step.
    scratches: Vec<SamplerScratch>,
    /// Of reading prompts, lately.
    seconds_per_token: Option<f64>,
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
            preparer: None,
            next_request: 0,
            scratches: Vec::new(),
            seconds_per_token: None,
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
        self.scheduler.expect(id, request.answers as usize);
        if request.embed == Some(Pooling::Mean) {
            self.scheduler.compute_whole(id);
        }
        self.streams.insert(id, Stream::new(Arc::new(request), 0, self.tokenizer));
        Ok(RequestId(id.request))
    }

    /// Ends a request without further outputs. Its blocks are free at once.
    pub fn cancel(&mut self, request: RequestId) {
        let ids: Vec<SequenceId> = self.answers(request.0).collect();
        ids.into_iter().for_each(|id| self.remove(id));
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
        outputs.extend(self.take_constraints());
        let tokens = self.choose(rows);
        outputs.extend(self.accept(tokens));
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
        ids.into_iter().flat_map(|id| self.end(id, EndReason::Deadline)).collect()
    }

    /// Chooses what runs, and moves the blocks that have to move first.
    fn schedule(&mut self) -> Schedule {
        if let Some(seconds) = self.seconds_per_token {
            let tokens = self.config.step_time.as_secs_f64() / seconds;
            self.scheduler.limits_mut().mixed_step_tokens =
                (tokens as usize).min(self.config.step_tokens);
        }
        let mut schedule = self.scheduler.schedule();
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
        for chunk in &schedule.chunks {
            let stream = self.streams.get_mut(&chunk.id).expect("it runs");
            stream.cached_tokens.get_or_insert(chunk.start);
        }
        schedule
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
            parts.push(Part { tokens: len, context: start + len, blocks, tree: &[] });
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
        if prompts >= 2 * BLOCK_TOKENS {
            let seconds = time.as_secs_f64() / all as f64;
            let before = self.seconds_per_token.unwrap_or(seconds);
            self.seconds_per_token = Some(0.8 * before + 0.2 * seconds);
        }
    }

    /// Pools what prompts' tokens gave that are to be embedded.
    fn embed(&mut self, chunks: &[Chunk]) -> Vec<Output> {
        let (mut outputs, mut next) = (Vec::new(), 0);
        let dim = self.model.config().dim;
        for &Chunk { id, start, len, wants_next } in chunks {
            let (first, last) = (next, next + len);
            next = last;
            let stream = self.streams.get_mut(&id).expect("it ran");
            let rows: Vec<usize> = match stream.request.embed {
                None => continue,
                Some(Pooling::Mean) => (first..last).collect(),
                Some(Pooling::Last) if wants_next => vec![last - 1],
                Some(Pooling::Last) => continue,
            };
            stream.pool(self.model.hidden(self.cpu, &rows, &mut self.state), dim, start == 0);
            if wants_next {
                let embedding = stream.embedding();
                let found = embedding.is_some();
                let reason = if found { EndReason::Complete } else { EndReason::NotFinite };
                let mut ended = self.end(id, reason);
                ended[0].embedding = embedding;
                outputs.extend(ended);
            }
        }
        outputs
    }

    /// Takes back the constraints that were prepared while the model ran.
    fn take_constraints(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        for (id, result) in self.preparer.as_mut().map(Preparer::finish).unwrap_or_default() {
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

    /// The next token of every sequence that has a row of logits and has not ended meanwhile; `None` where
    /// its logits are no numbers.
    fn choose(&mut self, owners: Vec<SequenceId>) -> Vec<(SequenceId, Option<OutputToken>)> {
        let mut rows: Vec<(SequenceId, usize)> = Vec::new();
        for (row, id) in owners.into_iter().enumerate() {
            if self.streams.contains_key(&id) {
                rows.push((id, row));
                rows.extend(self.fork(id).into_iter().map(|id| (id, row)));
            }
        }
        self.scratches.resize_with(rows.len().max(self.scratches.len()), Default::default);
        let mut rows: HashMap<SequenceId, usize> = rows.into_iter().collect();
        let wanted =
            self.streams.iter_mut().filter_map(|(&id, s)| Some((id, rows.remove(&id)?, s)));
        let mut tasks: Vec<_> = wanted
            .zip(&mut self.scratches)
            .map(|((id, row, stream), scratch)| (id, row, stream, scratch, None))
            .collect();
        let vocabulary = self.model.config().vocab_size;
        let (cpu, scheduler, logits) = (self.cpu, &self.scheduler, self.state.logits());
        cpu.pool().run_chunks(&mut tasks, 1, |_, task| {
            let (id, row, stream, scratch, token) = &mut task[0];
            let logits = &logits[*row * vocabulary..][..vocabulary];
            *token = stream.choose(cpu, logits, scheduler.tokens(*id), scratch);
        });
        tasks.into_iter().map(|(id, .., token)| (id, token)).collect()
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
        let answers = if reads && id.index == 0 { stream.request.answers } else { 1 };
        (1..answers).map(move |index| SequenceId { index, ..id })
    }

    /// Adds the chosen tokens to their answers.
    fn accept(&mut self, tokens: Vec<(SequenceId, Option<OutputToken>)>) -> Vec<Output> {
        let mut outputs = Vec::with_capacity(tokens.len());
        for (id, token) in tokens {
            let Some(token) = token else {
                outputs.extend(self.end(id, EndReason::NotFinite));
                continue;
            };
            let stream = self.streams.get_mut(&id).expect("it ran");
            self.metrics.generated_tokens += 1;
            // Its own place is all that the token needs to be followed by another.
            let room = self.scheduler.tokens(id).len() < self.config.context;
            let chosen = token.id;
            let step = stream.push(token, self.tokenizer.end_of_generation(), room);
            let ended = step.end.is_some();
            if let Some(constraint) = stream.constraint.take_if(|_| !ended) {
                self.preparer
                    .as_mut()
                    .expect("it runs since the request came")
                    .start(id, constraint);
            }
            outputs.push(output(id, stream, step));
            if ended {
                self.remove(id);
            } else {
                self.scheduler.push(id, chosen);
            }
        }
        outputs
    }

    /// Ends an answer from outside, and with it those that would have come of it.
    fn end(&mut self, id: SequenceId, reason: EndReason) -> Vec<Output> {
        let ids: Vec<SequenceId> = std::iter::once(id).chain(self.unborn(id)).collect();
        let stream = self.streams.get_mut(&id).expect("it has not ended");
        let mut outputs = Vec::with_capacity(ids.len());
        for id in ids {
            let step = stream.finish(reason.clone(), None);
            outputs.push(output(id, stream, step));
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

fn output(id: SequenceId, stream: &Stream<'_>, step: Step) -> Output {
    let end = step.end.map(|reason| End {
        reason,
        prompt_tokens: stream.request.prompt.len(),
        cached_tokens: stream.cached_tokens.unwrap_or(0),
        answer_tokens: stream.answer_tokens,
    });
    let (request, index) = (RequestId(id.request), id.index);
    Output { request, index, text: step.text, token: step.token, embedding: None, end }
}
