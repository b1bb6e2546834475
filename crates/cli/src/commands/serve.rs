//! `bevel serve`: models over HTTP.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bevel_engine::{EngineConfig, Swap};
use bevel_kernels::{BLOCK_TOKENS, Cpu, KvType};
use bevel_model::chat::CHATML;
use bevel_model::{Adapter, Checkpoint, KvCache, ModelConfig, ScaledAdapter};
use bevel_server::{
    AdapterLoader, AdapterToServe, HeaderValue, LoadedModel, ModelToServe, Server, ServerConfig,
};
use clap::ValueEnum;
use serde::Serialize;

use crate::adapters::{Adapters, Named};
use crate::args::{Global, size};
use crate::generation::GenerationConfig;
use crate::model;
use crate::sampling::{Kv, Products, context};
use crate::text;
use crate::ui::units::{bytes, duration};
use crate::ui::{interrupt, print_json};

/// Options of `bevel serve`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The models: paths, hub names, aliases or `tiny-austen`. Requests that name none go to the first
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,

    /// What clients call the models, in their order [default: as they are called here]
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    name: Vec<String>,

    /// Serve an adapter of the first model under a name of its own; repeatable
    #[arg(long = "adapter", value_name = "NAME=PATH[=SCALE]", value_parser = named_adapter)]
    adapters: Vec<(String, Named)>,

    /// Let clients load further adapters, from paths of this machine, and unload them
    #[arg(long)]
    adapter_loading: bool,

    /// Render conversations by this Jinja template instead of the model's own; `chatml` for the format of that name
    #[arg(long, value_name = "FILE")]
    chat_template: Option<String>,

    /// The address or name to listen on; 0.0.0.0 is every one of this machine
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", value_parser = host)]
    host: IpAddr,

    /// The port; 0 takes a free one
    #[arg(short, long, value_name = "N", default_value_t = 8080)]
    port: u16,

    /// Clients have to give this key; may be given more than once
    #[arg(long, value_name = "KEY", env = "BEVEL_API_KEY", hide_env_values = true, value_delimiter = ',', value_parser = clap::builder::NonEmptyStringValueParser::new())]
    api_key: Vec<String>,

    /// Pages of this origin may use the server; may be given more than once, `*` for all
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    cors: Vec<HeaderValue>,

    /// Certificate for TLS, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// Its key, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Longest that an answer may take, in seconds [default: as long as it takes]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,

    /// Largest body of a request
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "16MB")]
    max_body: u64,

    /// Memory for all models with their keys and values: they are loaded when they are asked for, and make way
    /// for others [default: all are loaded at once]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,

    /// Unload a model that nobody asks for during so many seconds, until somebody does
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    unload_after: Option<Duration>,

    /// Log a line for each request, on stderr
    #[arg(long, value_name = "FORMAT")]
    log: Option<LogFormat>,

    /// Answers that are generated together
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Engine", value_parser = clap::value_parser!(u16).range(1..=1024))]
    parallel: u16,

    /// Answers that may wait; more requests are refused
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Engine")]
    queue: usize,

    /// How long answers may wait for their next tokens while prompts are read: prompts are read in parts that
    /// take as long
    #[arg(long, value_name = "SECONDS", default_value = "0.1", value_parser = seconds, help_heading = "Engine")]
    step_time: Duration,

    /// Memory for keys and values [default: 1GB, or one context if that takes more]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Engine")]
    kv_memory: Option<u64>,

    /// Read every prompt from its beginning, even if others began alike
    #[arg(long, help_heading = "Engine")]
    no_prefix_cache: bool,

    /// Keep what does not fit into memory in a file in this directory, instead of computing it again
    #[arg(long, value_name = "DIR", help_heading = "Engine")]
    swap: Option<PathBuf>,

    /// Largest size of that file
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "4GB", requires = "swap", help_heading = "Engine")]
    swap_size: u64,

    /// Tokens of context of each conversation [default: the model's own, up to 8192]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Context")]
    ctx: Option<usize>,

    #[command(flatten)]
    products: Products,

    #[command(flatten)]
    kv: Kv,
}

fn named_adapter(text: &str) -> Result<(String, Named), String> {
    match text.split_once('=') {
        Some((name, adapter)) if !name.is_empty() => Ok((name.to_owned(), adapter.parse()?)),
        _ => Err("expected a name and a path, such as poet=adapters/poet".to_owned()),
    }
}

fn origin(text: &str) -> Result<HeaderValue, String> {
    let is_one = text == "*" || text.contains("://") && !text.contains(char::is_whitespace);
    let value = text.parse().ok().filter(|_| is_one);
    value.ok_or_else(|| "expected an origin such as https://app.example, or *".to_owned())
}

fn host(text: &str) -> Result<IpAddr, String> {
    let found = (text, 0).to_socket_addrs().map_err(|error| error.to_string())?;
    // Where a name has addresses of both kinds, most clients try the older one.
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    first.copied().ok_or_else(|| "it has no address".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..1e9).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds, above 0".to_owned())
}

/// How requests are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

/// What `--json` prints once the server listens.
#[derive(Serialize)]
struct Output<'a> {
    url: &'a str,
    models: &'a [String],
    ready_seconds: f64,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<()> {
    let start = Instant::now();
    if args.name.len() > args.models.len() {
        bail!("there are {} names for {} models", args.name.len(), args.models.len());
    }
    if let Some(format) = args.log {
        bevel_server::log_to_stderr(format == LogFormat::Json);
    }
    bevel_base::share_freed_memory();
    let cpu = Arc::new(model::cpu(global)?);
    let mut models: Vec<ModelToServe> = Vec::new();
    for (i, model) in args.models.iter().enumerate() {
        let name = args.name.get(i).unwrap_or(model).clone();
        if models.iter().any(|other| other.name == name) {
            bail!("two models are called `{name}`: give them names by --name");
        }
        // The first model has the adapters.
        let adapters = if i == 0 { &args.adapters[..] } else { &[] };
        models.push(args.model(model, name, adapters, cpu.clone(), global)?);
    }
    let names = |model: &ModelToServe| {
        let adapters = model.adapters.iter().map(|adapter| adapter.name.clone());
        std::iter::once(model.name.clone()).chain(adapters).collect::<Vec<_>>()
    };
    let names: Vec<String> = models.iter().flat_map(names).collect();
    if let Some(twice) = names.iter().find(|name| names.iter().filter(|n| n == name).count() > 1) {
        bail!("two models or adapters are called `{twice}`: give them different names");
    }
    let config = ServerConfig {
        api_keys: args.api_key.clone(),
        cors: (!args.cors.is_empty()).then(|| args.cors.clone()),
        body_limit: usize::try_from(args.max_body).unwrap_or(usize::MAX),
        memory: args.memory,
        unload_after: args.unload_after,
        tls: args.tls_cert.clone().zip(args.tls_key.clone()),
        ..ServerConfig::new(SocketAddr::new(args.host, args.port))
    };
    if !args.host.is_loopback() && config.api_keys.is_empty() {
        global.warn("anybody who can reach this machine can use the server: give an --api-key");
    }
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    // Every client takes one.
    bevel_base::raise_file_limit();
    let handler = interrupt::handle();
    let server = Server::bind(config, models)?;
    let url = format!("{scheme}://{}", server.address()?);
    if global.json {
        let ready_seconds = start.elapsed().as_secs_f64();
        print_json(&Output { url: &url, models: &names, ready_seconds })?;
    }
    global.note(format!(
        "{} at {url}/v1 after {}; Ctrl-C ends",
        names.join(", "),
        duration(start.elapsed())
    ));
    server.run(interrupt::requested)?;
    drop(handler);
    Ok(())
}

impl Args {
    /// A model that will run on `cpu`. Its headers are read.
    fn model(
        &self,
        model: &str,
        name: String,
        adapters: &[(String, Named)],
        cpu: Arc<Cpu>,
        global: &Global,
    ) -> Result<ModelToServe> {
        let path = model::resolve(model, global)?;
        let checkpoint = Checkpoint::open(&path)?;
        let context = context(self.ctx, 0, checkpoint.config(), global)?;
        let tokens = self.memory_tokens(checkpoint.config(), context)?;
        let kv_memory = tokens as u64 * self.bytes_per_token(checkpoint.config());
        let memory = checkpoint.tensor_bytes() + kv_memory;
        if let Some(most) = self.memory.filter(|&most| most < memory) {
            bail!(
                "`{name}` takes {} of --memory, {} of it for keys and values, and {} are given: give more, or \
                 less --kv-memory",
                bytes(memory),
                bytes(kv_memory),
                bytes(most)
            );
        }
        let adapter = |(name, named): &(String, Named)| {
            let ScaledAdapter { adapter, scale } = named.load(&checkpoint, &cpu)?;
            Ok(AdapterToServe { name: name.clone(), path: named.path.clone(), adapter, scale })
        };
        let adapters = adapters.iter().map(adapter).collect::<Result<_>>()?;
        let adapter_cpu = cpu.clone();
        let load_adapter = move |path: &Path| {
            Adapter::open(path, &checkpoint, &adapter_cpu).map_err(|error| error.to_string())
        };
        let load_adapter =
            self.adapter_loading.then(|| -> AdapterLoader { Box::new(load_adapter) });
        let (args, global) = (self.clone(), global.clone());
        let load = move || {
            let loaded = args.load(&path, context, tokens, cpu.clone(), &global);
            loaded.map_err(|error| format!("{error:#}"))
        };
        let load = Box::new(load);
        Ok(ModelToServe { name, memory, context, load, adapters, load_adapter })
    }

    /// Loads a model, with memory for the keys and values of so many `tokens`.
    fn load(
        &self,
        path: &Path,
        context: usize,
        tokens: usize,
        cpu: Arc<Cpu>,
        global: &Global,
    ) -> Result<LoadedModel> {
        let (model, mut tokenizer) =
            model::load_on(&cpu, path, self.products.exact, &Adapters::default(), global)?;
        let generation = GenerationConfig::of(model.checkpoint())?;
        tokenizer.add_end_of_generation(generation.eos().iter().copied());
        let engine = EngineConfig {
            kv_type: self.kv.kv.into(),
            memory_tokens: tokens,
            queue: self.queue,
            step_time: self.step_time,
            prefix_cache: !self.no_prefix_cache,
            swap: self.swap.clone().map(|directory| Swap { directory, bytes: self.swap_size }),
            ..EngineConfig::new(context, self.parallel.into())
        };
        Ok(LoadedModel {
            tokenizer,
            template: self.template()?,
            cpu,
            defaults: generation.sampler(),
            engine,
            request_timeout: self.timeout,
            model,
        })
    }

    /// The source of --chat-template.
    fn template(&self) -> Result<Option<String>> {
        match self.chat_template.as_deref() {
            None => Ok(None),
            Some("chatml") => Ok(Some(CHATML.to_owned())),
            Some(file) => Ok(Some(text::read(file.as_ref())?)),
        }
    }

    /// Tokens whose keys and values are kept, of all conversations together.
    fn memory_tokens(&self, config: &ModelConfig, context: usize) -> Result<usize> {
        let per_token = self.bytes_per_token(config);
        let one = context.next_multiple_of(BLOCK_TOKENS);
        let tokens = |memory: u64| usize::try_from(memory / per_token).unwrap_or(usize::MAX);
        let all = one.saturating_mul(self.parallel.into());
        match self.kv_memory {
            None => Ok(tokens(1_000_000_000).max(one).min(all)),
            Some(memory) if tokens(memory) < one => bail!(
                "one context of {context} tokens takes {} of --kv-memory, and {} are given: give more, or a shorter --ctx",
                bytes(one as u64 * per_token),
                bytes(memory)
            ),
            Some(memory) => Ok(tokens(memory).min(all)),
        }
    }

    /// Bytes of a token's keys and values.
    fn bytes_per_token(&self, config: &ModelConfig) -> u64 {
        let kv_type: KvType = self.kv.kv.into();
        KvCache::bytes_per_token(config, kv_type).max(1) as u64
    }
}
