use std::ops::Deref;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bevel_engine::{Constraint, EngineConfig, Grammar, GrammarError, Grammars};
use bevel_kernels::Cpu;
use bevel_model::chat::{ChatTemplate, TemplateError};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Model, SamplerConfig, ScaledAdapter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::worker::Worker;

/// A model in memory, and how it is to be served.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Jinja source of a chat template in place of the model's own.
    pub template: Option<String>,
    /// What it runs on. Models that share it run in turn.
    pub cpu: Arc<Cpu>,
    /// How tokens are chosen where a client does not say.
    pub defaults: SamplerConfig,
    /// What its engine may use.
    pub engine: EngineConfig,
    /// The longest that a request may take.
    pub request_timeout: Option<Duration>,
}

/// A model as a request asks for it.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) served: Arc<Served>,
    /// What the client calls it: the model's name, or that of an adapter.
    pub(crate) name: String,
    pub(crate) adapters: Vec<ScaledAdapter>,
}

impl Deref for Asked {
    type Target = Served;

    fn deref(&self) -> &Served {
        &self.served
    }
}

/// A model that is being served.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) worker: Worker,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) defaults: SamplerConfig,
    pub(crate) context: usize,
    /// Answers that run or wait together.
    pub(crate) most_answers: usize,
    /// Bytes of the longest token.
    pub(crate) longest_token: usize,
    /// Numbers of an embedding.
    pub(crate) dim: usize,
    pub(crate) request_timeout: Option<Duration>,
    template: Template,
    /// The one for conversations with tools, where it is another.
    tool_template: Template,
    /// Made when the first grammar comes. A thread that prepares one may outlive the model.
    grammars: Arc<OnceLock<Result<Grammars, GrammarError>>>,
    /// Lets few grammars be prepared at a time.
    compiling: Arc<Semaphore>,
    /// Dropped after everything else.
    there: watch::Sender<()>,
}

impl Served {
    pub(crate) fn start(name: String, loaded: LoadedModel) -> Result<Self, String> {
        let LoadedModel { model, tokenizer, template, cpu, defaults, engine, request_timeout } =
            loaded;
        let template = |for_tools| match &template {
            Some(source) => ChatTemplate::new(source, tokenizer.special_texts()),
            None => tokenizer.chat_template(for_tools),
        };
        let (template, tool_template) = (Template(template(false)), Template(template(true)));
        let bytes = |token| tokenizer.token_bytes(token).map_or(0, |bytes| bytes.len());
        let longest_token = (0..tokenizer.vocab_size() as u32).map(bytes).max().unwrap_or(0);
        let tokenizer = Arc::new(tokenizer);
        let (context, dim) = (engine.context, model.config().dim);
        let most_answers = engine.queue.saturating_add(engine.sequences);
        let worker = Worker::start(model, tokenizer.clone(), cpu, engine)?;
        Ok(Self {
            name,
            worker,
            tokenizer,
            defaults,
            context,
            most_answers,
            longest_token,
            dim,
            request_timeout,
            template,
            tool_template,
            grammars: Arc::default(),
            compiling: Arc::new(Semaphore::new(GRAMMARS_TOGETHER)),
            there: watch::Sender::new(()),
        })
    }

    /// Fails to change once nobody uses the model any more and its memory is free.
    pub(crate) fn gone(&self) -> watch::Receiver<()> {
        self.there.subscribe()
    }

    /// When a request that comes now has to end.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.request_timeout.map(|timeout| Instant::now() + timeout)
    }

    /// The model's chat template.
    pub(crate) fn template(&self) -> Result<&ChatTemplate, TemplateError> {
        self.template.get()
    }

    /// The one for conversations with tools.
    pub(crate) fn tool_template(&self) -> Result<&ChatTemplate, TemplateError> {
        self.tool_template.get()
    }

    /// Waits for a turn to prepare a grammar; `None` where those before take too long.
    pub(crate) async fn turn_to_compile(&self) -> Option<OwnedSemaphorePermit> {
        let turn = self.compiling.clone().acquire_owned();
        tokio::time::timeout(GRAMMAR_TIME, turn).await.ok()?.ok()
    }

    /// Prepares a grammar. It takes time: not for async.
    pub(crate) fn compile(
        &self,
        grammar: Grammar,
        turn: OwnedSemaphorePermit,
    ) -> Result<Constraint, GrammarError> {
        let refused = |problem: String| Err(GrammarError::Grammar(problem));
        let size = match &grammar {
            Grammar::JsonSchema(schema) => schema.to_string().len(),
            Grammar::Regex(text) | Grammar::Lark(text) => text.len(),
        };
        if size > MOST_GRAMMAR {
            return refused(format!("it has {size} bytes; this server takes {MOST_GRAMMAR}"));
        }
        // Rules that name rules are followed by calls within calls: a chain of thousands takes a large stack,
        // and a stack that overflows ends the program. What takes too long is waited for no longer, though it
        // cannot be stopped.
        let (done, result) = std::sync::mpsc::channel();
        let (grammars, tokenizer) = (self.grammars.clone(), self.tokenizer.clone());
        let compile = move || {
            let grammars = grammars.get_or_init(|| Grammars::new(&tokenizer));
            let grammars = grammars.as_ref().map_err(Clone::clone);
            let _ = done.send(grammars.and_then(|grammars| grammars.compile(&grammar)));
            drop(turn);
        };
        let thread = std::thread::Builder::new().name("compile".to_owned());
        match thread.stack_size(GRAMMAR_STACK).spawn(compile) {
            Err(error) => refused(error.to_string()),
            Ok(_) => match result.recv_timeout(GRAMMAR_TIME) {
                Ok(result) => result,
                Err(RecvTimeoutError::Timeout) => {
                    refused("it takes too long to prepare".to_owned())
                }
                Err(RecvTimeoutError::Disconnected) => refused("it cannot be prepared".to_owned()),
            },
        }
    }
}

/// Most bytes of a schema or grammar.
const MOST_GRAMMAR: usize = 128 << 10;

/// Of the thread that prepares one: address space, of which little is used.
const GRAMMAR_STACK: usize = 1 << 30;

/// The longest that one may take.
const GRAMMAR_TIME: Duration = Duration::from_secs(10);

/// Those that may be prepared at a time.
const GRAMMARS_TOGETHER: usize = 4;

/// A chat template, or what is wrong with it.
#[derive(Debug)]
struct Template(Result<ChatTemplate, TemplateError>);

impl Template {
    fn get(&self) -> Result<&ChatTemplate, TemplateError> {
        self.0.as_ref().map_err(Clone::clone)
    }
}
