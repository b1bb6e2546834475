//! What clients can ask for.

mod adapters;
mod body;
mod chat;
mod completions;
mod conversation;
mod embeddings;
pub(crate) mod error;
mod fields;
mod messages;
mod native;
mod openapi;
mod page;
mod responses;
mod sampling;
mod stream;
mod thoughts;
mod tools;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use subtle::ConstantTimeEq;
use tokio::sync::mpsc;
use tower_http::cors::{AllowHeaders, Any, CorsLayer};
use tracing::Instrument;

use crate::adapters::Scale;
use crate::config::ServerConfig;
use crate::metrics;
use crate::models::Models;
use crate::running::Running;
use crate::served::Asked;
use crate::worker::Event;
use conversation::Prompt;
use error::ApiError;
use fields::Fields;
use sampling::Options;

/// What requests are answered with.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) models: Arc<Models>,
    pub(crate) api_keys: Vec<String>,
    /// Most bytes of a body.
    pub(crate) body_limit: usize,
    pub(crate) running: Running,
}

impl App {
    /// Takes the field `model`. The model may have to be loaded.
    pub(crate) async fn model(&self, fields: &mut Fields) -> Result<Arc<Asked>, ApiError> {
        let name: Option<String> = fields.take("model")?;
        Ok(Arc::new(self.models.asked(name.as_deref()).await?))
    }

    /// Takes the fields `model` and `lora`, for what a model is to compute.
    pub(crate) async fn computing_model(
        &self,
        fields: &mut Fields,
    ) -> Result<Arc<Asked>, ApiError> {
        let name: Option<String> = fields.take("model")?;
        let scales: Option<Vec<Scale>> = fields.take("lora")?;
        let asked = self.models.asked(name.as_deref()).await?;
        let Some(scales) = scales else { return Ok(Arc::new(asked)) };
        if asked.name != asked.served.name {
            let problem = format!("`{}` is an adapter already: name its model", asked.name);
            return Err(ApiError::field("lora", problem));
        }
        let place = self.models.place(Some(&asked.name))?;
        let adapters = self.models.slots()[place].adapters.chosen("lora", &scales)?;
        Ok(Arc::new(Asked { adapters, ..asked }))
    }
}

/// All routes.
pub(crate) fn router(app: Arc<App>, config: &ServerConfig) -> Router {
    let router = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/messages", post(messages::handle))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/responses", post(responses::handle))
        .route("/v1/embeddings", post(embeddings::handle))
        .route("/v1/models", get(native::models))
        .route("/v1/models/{*name}", get(native::model))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/lora-adapters", get(adapters::list).post(adapters::set))
        .route("/models/load", post(native::load))
        .route("/models/unload", post(native::unload))
        .route("/tokenize", post(native::tokenize))
        .route("/detokenize", post(native::detokenize))
        .route("/apply-template", post(native::apply_template))
        .route("/metrics", get(metrics::handle))
        .route_layer(middleware::from_fn_with_state(app.clone(), authenticate))
        .route("/health", get(native::health))
        .route("/openapi.json", get(openapi::handle))
        .route("/", get(page::index))
        .route("/{file}", get(page::file))
        .fallback(async |request: Request| {
            let problem = format!("there is no `{}` here", request.uri().path());
            ApiError::new(StatusCode::NOT_FOUND, problem)
        })
        .method_not_allowed_fallback(async |request: Request| {
            let problem = format!("`{}` does not take {}", request.uri().path(), request.method());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, problem)
        });
    let router = match &config.cors {
        None => router.layer(middleware::from_fn(refuse_other_sites)),
        Some(origins) => {
            let cors = CorsLayer::new()
                .allow_methods([Method::GET, Method::POST])
                .allow_headers(AllowHeaders::mirror_request())
                .expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER]);
            router.layer(match origins.iter().any(|origin| origin == "*") {
                true => cors.allow_origin(Any),
                false => cors.allow_origin(origins.clone()),
            })
        }
    };
    router.layer(middleware::from_fn_with_state(app.clone(), log)).with_state(app)
}

/// Lets those through who know a key, if there are any.
async fn authenticate(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.api_keys.is_empty() || knows_key(&app.api_keys, request.headers()) {
        return next.run(request).await;
    }
    let problem = "give one of this server's keys: `Authorization: Bearer KEY`";
    let error = ApiError::new(StatusCode::UNAUTHORIZED, problem).with_code("invalid_api_key");
    match request.uri().path().starts_with("/v1/messages") {
        true => messages::MessagesError::from(error).into_response(),
        false => error.into_response(),
    }
}

fn knows_key(keys: &[String], headers: &HeaderMap) -> bool {
    let header = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let bearer = header("authorization").and_then(|value| value.split_once(' '));
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let bearer = bearer.map(|(_, key)| key);
    let given = bearer.or(header("x-api-key")).unwrap_or_default().trim().as_bytes();
    // Every key is compared whole, so that time tells nothing.
    keys.iter().fold(false, |known, key| known | bool::from(key.as_bytes().ct_eq(given)))
}

/// Refuses what pages of other sites ask for, where no other site may: a browser lets them ask, if not read.
async fn refuse_other_sites(request: Request, next: Next) -> Response {
    let from = request.headers().get("sec-fetch-site").and_then(|from| from.to_str().ok());
    if request.method() == Method::POST && matches!(from, Some("cross-site" | "same-site")) {
        let problem = "pages of other sites may not use this server: start it with --cors";
        return ApiError::new(StatusCode::FORBIDDEN, problem).into_response();
    }
    next.run(request).await
}

/// Logs a request under a number of its own, which the client is told.
async fn log(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let running = app.running.begin();
    let given = request.headers().get("x-request-id").and_then(|id| id.to_str().ok());
    let id = given.filter(|id| id.len() <= 128).map_or_else(|| new_id("req"), str::to_owned);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let start = std::time::Instant::now();
    let span = tracing::info_span!("request", id);
    let mut response = next.run(request).instrument(span).await;
    let (status, ms) = (response.status().as_u16(), start.elapsed().as_millis() as u64);
    tracing::info!(id, %method, path, status, ms, "request");
    if let Ok(id) = id.parse() {
        response.headers_mut().insert("x-request-id", id);
    }
    running.until_sent(response)
}

/// Hands prompts to a model's engine, the `i`-th with tag `i`, and returns their tokens. What comes of them
/// comes to `events`.
async fn submit(
    model: &Arc<Asked>,
    prompts: Vec<Prompt>,
    options: Options,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let Options { mut request, grammar, grammar_field } = options;
    let answers = prompts.len().saturating_mul(request.answers as usize);
    if answers > model.most_answers {
        let problem = format!(
            "{answers} answers are wanted, and this server takes {} at a time",
            model.most_answers
        );
        return Err(ApiError::field("prompt", problem));
    }
    let most = model.context.saturating_mul(model.longest_token);
    if let Some(len) = prompts.iter().map(Prompt::len).find(|&len| len > most) {
        let problem = format!(
            "the prompt has {len} bytes, which no context of {} tokens holds; shorten it",
            model.context
        );
        return Err(ApiError::bad_request(problem).with_code("context_length_exceeded"));
    }
    let turn = match &grammar {
        None => None,
        Some(_) => Some(model.turn_to_compile().await.ok_or_else(|| {
            let problem = "grammars that came before take long to prepare; try again later";
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, problem)
        })?),
    };
    let model_there = model.clone();
    let (prompts, constraint) = blocking(move || {
        let model = model_there;
        let prompts: Vec<Vec<u32>> = prompts
            .into_iter()
            .map(|prompt| prompt.tokens(&model.tokenizer))
            .collect::<Result<_, ApiError>>()?;
        let constraint =
            grammar.zip(turn).map(|(grammar, turn)| model.compile(grammar, turn)).transpose();
        let constraint =
            constraint.map_err(|error| ApiError::field(grammar_field, brief(&error)))?;
        Ok::<_, ApiError>((prompts, constraint))
    })
    .await??;
    request.constraint = constraint;
    request.adapters = model.adapters.clone();
    let with =
        |prompt: &Vec<u32>| bevel_engine::Request { prompt: prompt.clone(), ..request.clone() };
    model.worker.submit(prompts.iter().map(with).collect(), events.clone()).await?;
    Ok(prompts)
}

/// What a library says, without what only its authors understand.
pub(crate) fn brief(problem: &impl ToString) -> String {
    problem.to_string().lines().next().unwrap_or_default().chars().take(300).collect()
}

/// Runs what takes time beside the connections.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| ApiError::internal(error.to_string()))
}

/// Does what may take a while, and leaves other connections to other threads meanwhile.
fn in_place<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

/// A number that has not been given before.
fn new_id(kind: &str) -> String {
    format!("{kind}-{:032x}", rand::random::<u128>())
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
