use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bevel_engine::{Constraint, EngineConfig, Grammar, GrammarError, Grammars};
use bevel_kernels::Cpu;
use bevel_model::chat::{ChatTemplate, TemplateError};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Model, SamplerConfig};

use crate::worker::Worker;

/// A model to be served.
#[derive(Debug)]
pub struct ModelToServe {
    /// What clients call it.
    pub name: String,
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

/// A model that is being served.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) worker: Worker,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) defaults: SamplerConfig,
    pub(crate) context: usize,
    /// Numbers of an embedding.
    pub(crate) dim: usize,
    pub(crate) request_timeout: Option<Duration>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    template: Template,
    /// The one for conversations with tools, where it is another.
    tool_template: Template,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl Served {
    pub(crate) fn start(model: ModelToServe) -> Result<Self, String> {
        let ModelToServe {
            name,
            model,
            tokenizer,
            template,
            cpu,
            defaults,
            engine,
            request_timeout,
        } = model;
        let template = |for_tools| match &template {
            Some(source) => ChatTemplate::new(source, tokenizer.special_texts()),
            None => tokenizer.chat_template(for_tools),
        };
        let (template, tool_template) = (Template(template(false)), Template(template(true)));
        let tokenizer = Arc::new(tokenizer);
        let (context, dim) = (engine.context, model.config().dim);
        let worker = Worker::start(model, tokenizer.clone(), cpu, engine)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            name,
            worker,
            tokenizer,
            defaults,
            context,
            dim,
            request_timeout,
            created: now.as_secs(),
            template,
            tool_template,
            grammars: OnceLock::new(),
        })
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

    /// Prepares a grammar. It takes time: not for async.
    pub(crate) fn compile(&self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        let grammars = self.grammars.get_or_init(|| Grammars::new(&self.tokenizer));
        grammars.as_ref().map_err(Clone::clone)?.compile(grammar)
    }
}

/// A chat template, or what is wrong with it.
#[derive(Debug)]
struct Template(Result<ChatTemplate, TemplateError>);

impl Template {
    fn get(&self) -> Result<&ChatTemplate, TemplateError> {
        self.0.as_ref().map_err(Clone::clone)
    }
}
