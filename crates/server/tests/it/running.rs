//! A server on a port of its own.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bevel_engine::EngineConfig;
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Model, SamplerConfig};
use bevel_server::{LoadedModel, Loader, ModelToServe, Server, ServerConfig};
use serde_json::Value;

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// ChatML with tools as Hermes has them.
const TEMPLATE: &str = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}. Call one by \
    <tool_call>.<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>\n\
    {\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>\
    {% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

pub(crate) fn tiny_austen() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen")
}

/// The model, ready to be served.
pub(crate) fn loaded(engine: EngineConfig) -> LoadedModel {
    let (dir, cpu) = (tiny_austen(), Cpu::new(2).unwrap());
    LoadedModel {
        model: Model::load(Checkpoint::open(&dir).unwrap(), &cpu, &mut |_| {}).unwrap(),
        tokenizer: Tokenizer::from_hf(&dir).unwrap(),
        template: Some(TEMPLATE.to_owned()),
        cpu: Arc::new(cpu),
        defaults: SamplerConfig::default(),
        engine,
        request_timeout: None,
    }
}

/// The tokens of a prompt to be completed.
pub(crate) fn prompt_tokens(text: &str) -> usize {
    Tokenizer::from_hf(&tiny_austen()).unwrap().encode(text, true, false).unwrap().len()
}

/// A server with two names for the model, `tiny` and `austen/tiny`.
pub(crate) fn server() -> Running {
    server_with(|_| {}, |_| {})
}

pub(crate) fn server_with(
    change: impl FnOnce(&mut ServerConfig),
    change_model: impl Fn(&mut LoadedModel) + Clone + Send + Sync + 'static,
) -> Running {
    let models = ["tiny", "austen/tiny"].map(|name| {
        let change = change_model.clone();
        let load = move || {
            let mut loaded = loaded(EngineConfig::new(512, 8));
            change(&mut loaded);
            Ok(loaded)
        };
        to_serve(name, 1, Box::new(load))
    });
    serve(change, models.into())
}

/// A model without adapters.
pub(crate) fn to_serve(name: &str, memory: u64, load: Loader) -> ModelToServe {
    let (name, adapters, load_adapter) = (name.to_owned(), Vec::new(), None);
    ModelToServe { name, memory, context: 512, load, adapters, load_adapter }
}

/// A server with these models.
pub(crate) fn serve(change: impl FnOnce(&mut ServerConfig), models: Vec<ModelToServe>) -> Running {
    let mut config = ServerConfig::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    config.grace = Duration::from_secs(10);
    change(&mut config);
    let server = Server::bind(config, models).unwrap();
    let address = server.address().unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let asked = end.clone();
    let thread = std::thread::spawn(move || {
        server.run(move || asked.load(Ordering::SeqCst)).unwrap();
    });
    Running { address, end, thread: Some(thread) }
}

/// What a server says: status and JSON.
pub(crate) type Reply = (u16, Value);

impl Running {
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn agent() -> ureq::Agent {
        ureq::Agent::config_builder().http_status_as_error(false).build().into()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, &body.to_string())
    }

    pub(crate) fn post_text(&self, path: &str, body: &str) -> Reply {
        let mut response = Self::agent().post(self.url(path)).send(body).unwrap();
        (response.status().as_u16(), json(&mut response))
    }

    /// The JSON of a request that succeeds.
    #[track_caller]
    pub(crate) fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, json) = self.post(path, body);
        assert_eq!(status, 200, "{json}");
        json
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        let mut response = Self::agent().get(self.url(path)).call().unwrap();
        (response.status().as_u16(), json(&mut response))
    }

    /// The chunks of a stream, which ends with `[DONE]`.
    #[track_caller]
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = Self::agent().post(self.url(path)).send(&body.to_string()).unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut chunks = Vec::new();
        let mut done = false;
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            match line.unwrap().strip_prefix("data: ") {
                None => {}
                Some("[DONE]") => done = true,
                Some(data) => {
                    assert!(!done, "nothing comes after the end");
                    chunks.push(serde_json::from_str(data).unwrap());
                }
            }
        }
        assert!(done, "{chunks:?}");
        chunks
    }

    /// A number of `/metrics`, of the first model.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let mut response = Self::agent().get(self.url("/metrics")).call().unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        let line = text.lines().find(|line| {
            line.starts_with(name) && !line.starts_with('#') && line.contains("\"tiny\"")
        });
        line.map_or(0.0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
    }

    /// Waits until a metric has a value.
    #[track_caller]
    pub(crate) fn wait_for(&self, name: &str, expected: f64) {
        let start = Instant::now();
        while self.metric(name) != expected {
            assert!(start.elapsed() < Duration::from_secs(20), "{name} is {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the server to end.
    pub(crate) fn end(&self) {
        self.end.store(true, Ordering::SeqCst);
    }

    /// Waits for the server's end.
    pub(crate) fn join(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

fn json(response: &mut ureq::http::Response<ureq::Body>) -> Value {
    serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap()
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().unwrap();
        }
    }
}
