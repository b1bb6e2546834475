//! `POST /v1/completions`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bevel_engine::{Output, OutputToken};
use bevel_model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::body::Body;
use super::chat::stream_options;
use super::conversation::Prompt;
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{Options, Usage};
use super::stream::{Chunk, Chunks, respond};
use super::{App, new_id, now};
use crate::answer::{collect, finish_reason};
use crate::served::Served;

/// Prompts of one request.
const MOST_PROMPTS: usize = 256;

/// Tokens of an answer where the client does not say: OpenAI's number.
const USUAL_TOKENS: usize = 16;

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.model(&mut fields)?;
    let prompts = fields.require::<Prompts>("prompt")?.into_prompts();
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        let problem = format!("expected 1 to {MOST_PROMPTS} prompts");
        return Err(ApiError::field("prompt", problem));
    }
    let mut options = Options::take(&mut fields, &model)?;
    options.request.max_tokens = Some(fields.take("max_tokens")?.unwrap_or(USUAL_TOKENS));
    options.request.logprobs = fields.number("logprobs", |n: usize| n <= 20, "0 to 20")?;
    let answers = options.request.answers;
    fields.only("best_of", &[answers.into()])?;
    fields.only("suffix", &["".into()])?;
    let echo: bool = fields.take("echo")?.unwrap_or(false);
    if echo && options.request.logprobs.is_some() {
        let problem = "probabilities of the prompt's tokens are not computed: leave out `logprobs`";
        return Err(ApiError::field("echo", problem));
    }
    let stream = fields.take("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut fields, stream)?;
    fields.drop_notes(&["user"]);
    fields.finish()?;

    let count = prompts.len() * answers as usize;
    let (events, mut received) = mpsc::unbounded_channel();
    let tokens = super::submit(&model, prompts, options, &events).await?;
    drop(events);
    let texts = |tokens: &Vec<u32>| model.tokenizer.decode(tokens, true);
    let echoed: Vec<String> = if echo { tokens.iter().map(texts).collect() } else { Vec::new() };
    let (id, created) = (new_id("cmpl"), now());
    let shape = Shape { id, created, model, answers, echoed };
    if stream {
        let chunks = CompletionChunks {
            shape,
            usage: include_usage.then(Usage::default),
            lengths: Vec::new(),
        };
        return Ok(respond(received, count, chunks));
    }
    let (mut usage, mut choices) = (Usage::default(), Vec::new());
    for ((tag, index), answer) in collect(&mut received, count).await? {
        usage.add(tag, &answer.end);
        let mut logprobs = Logprobs::default();
        for (token, text) in &answer.tokens {
            logprobs.add(&shape.model.tokenizer, token, text);
        }
        let text = format!("{}{}", shape.echo(tag), answer.text);
        let finish = finish_reason(&answer.end.reason)?;
        choices.push(shape.choice(tag, index, &text, logprobs.json(), Some(finish)));
    }
    let mut response = shape.json(choices);
    response["usage"] = usage.json();
    Ok(Json(response).into_response())
}

/// Prompts as clients give them.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text, a list of tokens, or a list of either")]
pub(crate) enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    pub(crate) fn into_prompts(self) -> Vec<Prompt> {
        match self {
            Self::Text(text) => vec![Prompt::Raw(text)],
            // An empty list is one of no prompts.
            Self::Tokens(tokens) if tokens.is_empty() => Vec::new(),
            Self::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Raw).collect(),
            Self::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        }
    }
}

/// What all parts of a response have in common.
struct Shape {
    id: String,
    created: u64,
    model: Arc<Served>,
    /// To each prompt.
    answers: u32,
    /// The prompts, where they are wanted back.
    echoed: Vec<String>,
}

impl Shape {
    fn echo(&self, tag: usize) -> &str {
        self.echoed.get(tag).map_or("", String::as_str)
    }

    fn choice(
        &self,
        tag: usize,
        index: u32,
        text: &str,
        logprobs: Value,
        finish: Option<&str>,
    ) -> Value {
        json!({
            "index": tag as u32 * self.answers + index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
        })
    }

    fn json(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        })
    }
}

/// Probabilities in the completion API's shape.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters of the answer so far.
    offset: usize,
}

impl Logprobs {
    /// Adds a token with the text that it made certain.
    fn add(&mut self, tokenizer: &Tokenizer, token: &OutputToken, text: &str) {
        let Some(logprobs) = &token.logprobs else { return };
        let name = |id: u32| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let top: Map<String, Value> =
            logprobs.top.iter().map(|&(id, logprob)| (name(id), logprob.into())).collect();
        self.tokens.push(name(token.id).into());
        self.token_logprobs.push(logprobs.logprob);
        self.top_logprobs.push(top.into());
        self.text_offset.push(self.offset);
        self.offset += text.chars().count();
    }

    fn json(self) -> Value {
        if self.tokens.is_empty() {
            return Value::Null;
        }
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

struct CompletionChunks {
    shape: Shape,
    usage: Option<Usage>,
    /// Characters of each answer so far, by its choice's index.
    lengths: Vec<usize>,
}

impl Chunks for CompletionChunks {
    fn begin(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        for tag in 0..self.shape.echoed.len() {
            for index in 0..self.shape.answers {
                let choice = self.shape.choice(tag, index, self.shape.echo(tag), Value::Null, None);
                chunks.push(self.shape.json(vec![choice]).into());
            }
        }
        chunks
    }

    fn output(&mut self, tag: usize, output: Output, finish: Option<&'static str>) -> Vec<Chunk> {
        if let (Some(usage), Some(end)) = (&mut self.usage, &output.end) {
            usage.add(tag, end);
        }
        let place = tag * self.shape.answers as usize + output.index as usize;
        self.lengths.resize(self.lengths.len().max(place + 1), 0);
        let mut logprobs = Logprobs { offset: self.lengths[place], ..Logprobs::default() };
        if let Some(token) = &output.token {
            logprobs.add(&self.shape.model.tokenizer, token, &output.text);
        }
        self.lengths[place] += output.text.chars().count();
        let logprobs = logprobs.json();
        if output.text.is_empty() && logprobs.is_null() && finish.is_none() {
            return Vec::new();
        }
        let choice = self.shape.choice(tag, output.index, &output.text, logprobs, finish);
        let mut chunk = self.shape.json(vec![choice]);
        if self.usage.is_some() {
            chunk["usage"] = Value::Null;
        }
        vec![chunk.into()]
    }

    fn end(&mut self) -> Vec<Chunk> {
        let Some(usage) = &self.usage else { return Vec::new() };
        let mut chunk = self.shape.json(Vec::new());
        chunk["usage"] = usage.json();
        vec![chunk.into()]
    }
}
