//! `POST /v1/completions`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bevel_engine::{Output, OutputToken, Request};
use bevel_model::TokenLogprobs;
use bevel_model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::body::Body;
use super::chat::{stream_options, whole_for_prompt_logprobs};
use super::conversation::Prompt;
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{Options, Usage, logprobs, prompt_logprobs};
use super::stream::{Chunk, Chunks, respond};
use super::{App, new_id, now};
use crate::answer::{collect, finish_reason};
use crate::served::Asked;

/// Prompts of one request.
const MOST_PROMPTS: usize = 256;

/// Tokens of an answer where the client does not say: OpenAI's number.
const USUAL_TOKENS: usize = 16;

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.computing_model(&mut fields).await?;
    let prompts = fields.require::<Prompts>("prompt")?.into_prompts();
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        let problem = format!("expected 1 to {MOST_PROMPTS} prompts");
        return Err(ApiError::field("prompt", problem));
    }
    let mut options = Options::take(&mut fields, &model)?;
    options.request.max_tokens = Some(fields.take("max_tokens")?.unwrap_or(USUAL_TOKENS));
    options.request.logprobs = logprobs(&mut fields, "logprobs")?;
    let answers = options.request.answers;
    fields.only("suffix", &["".into()])?;
    let echo: bool = fields.take("echo")?.unwrap_or(false);
    let stream = fields.take("stream")?.unwrap_or(false);
    let include_usage = stream_options(&mut fields, stream)?;
    whole_for_prompt_logprobs(&options, stream)?;
    let of_prompt = options.request.prompt_logprobs.is_some();
    if echo {
        let Request { prompt_logprobs: of_prompt, logprobs, .. } = &mut options.request;
        *of_prompt = (*of_prompt).max(*logprobs);
    }
    fields.drop_notes(&["user"])?;
    fields.finish()?;

    let count = prompts.len() * answers as usize;
    let wanted_logprobs = options.request.logprobs;
    let (events, mut received) = mpsc::unbounded_channel();
    let tokens = super::submit(&model, prompts, options, &events).await?;
    drop(events);
    let (id, created) = (new_id("cmpl"), now());
    let shape = Shape { id, created, model, answers, echo: echo.then_some(wanted_logprobs) };
    if stream {
        let usage = include_usage.then(Usage::default);
        let prompts = tokens.into_iter().map(|tokens| (tokens, Vec::new())).collect();
        let chunks = CompletionChunks { shape, usage, prompts, lengths: Vec::new() };
        return Ok(respond(received, count, chunks));
    }
    let (mut usage, mut choices) = (Usage::default(), Vec::new());
    let answers = collect(&mut received, count).await?;
    for (&(tag, index), answer) in &answers {
        usage.add(tag, &answer.end);
        let scored = &answers[&(tag, 0)].prompt_logprobs;
        let (mut text, mut logprobs) = shape.echo(&tokens[tag], scored);
        for (token, text) in &answer.tokens {
            logprobs.add(&shape.model.tokenizer, token, text);
        }
        text.push_str(&answer.text);
        let finish = finish_reason(&answer.end.reason)?;
        let mut choice = shape.choice(tag, index, &text, logprobs.json(), Some(finish));
        if of_prompt {
            choice["prompt_logprobs"] =
                prompt_logprobs(&shape.model.tokenizer, &tokens[tag], scored);
        }
        choices.push(choice);
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
    model: Arc<Asked>,
    /// To each prompt.
    answers: u32,
    /// Where prompts are wanted back, with the so many likeliest tokens in each place.
    echo: Option<Option<usize>>,
}

impl Shape {
    /// What a choice begins with: text, and how likely its tokens were.
    fn echo(&self, prompt: &[u32], scored: &[TokenLogprobs]) -> (String, Logprobs) {
        let (mut text, mut logprobs) = (String::new(), Logprobs::default());
        let Some(top) = self.echo else { return (text, logprobs) };
        let tokenizer = &self.model.tokenizer;
        let mut decoder = tokenizer.decoder().skip_special(true);
        for (i, &id) in prompt.iter().enumerate() {
            let piece = decoder.push(id);
            if let Some(top) = top {
                let here = i.checked_sub(1).and_then(|i| scored.get(i));
                logprobs.add_known(tokenizer, id, here, top, &piece);
            }
            text.push_str(&piece);
        }
        text.push_str(&decoder.finish());
        (text, logprobs)
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
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters of the choice so far.
    offset: usize,
}

impl Logprobs {
    /// Adds a token with the text that it made certain.
    fn add(&mut self, tokenizer: &Tokenizer, token: &OutputToken, text: &str) {
        if let Some(logprobs) = &token.logprobs {
            self.add_known(tokenizer, token.id, Some(logprobs), usize::MAX, text);
        }
    }

    /// The same of a token that may be the first of all, with the `top` likeliest.
    fn add_known(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        logprobs: Option<&TokenLogprobs>,
        top: usize,
        text: &str,
    ) {
        let name = |id: u32| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let of = |logprobs: &TokenLogprobs| -> Map<String, Value> {
            let top = logprobs.top.iter().take(top);
            top.map(|&(id, logprob)| (name(id), logprob.into())).collect()
        };
        self.tokens.push(name(token).into());
        self.token_logprobs.push(logprobs.map(|logprobs| logprobs.logprob));
        self.top_logprobs.push(logprobs.map(of).into());
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
    /// With how likely their tokens were, once that is known.
    prompts: Vec<(Vec<u32>, Vec<TokenLogprobs>)>,
    /// Characters of each choice so far, if it has begun.
    lengths: Vec<Option<usize>>,
}

impl Chunks for CompletionChunks {
    fn begin(&mut self) -> Vec<Chunk> {
        Vec::new()
    }

    fn output(&mut self, tag: usize, output: Output, finish: Option<&'static str>) -> Vec<Chunk> {
        if let (Some(usage), Some(end)) = (&mut self.usage, &output.end) {
            usage.add(tag, end);
        }
        let (prompt, scored) = &mut self.prompts[tag];
        scored.extend(output.prompt_logprobs);
        let place = tag * self.shape.answers as usize + output.index as usize;
        self.lengths.resize(self.lengths.len().max(place + 1), None);
        let begun = self.lengths[place];
        let (mut text, mut logprobs) = match begun {
            None => self.shape.echo(prompt, scored),
            Some(offset) => (String::new(), Logprobs { offset, ..Logprobs::default() }),
        };
        if let Some(token) = &output.token {
            logprobs.add(&self.shape.model.tokenizer, token, &output.text);
        }
        text.push_str(&output.text);
        self.lengths[place] = Some(begun.unwrap_or(0) + text.chars().count());
        let logprobs = logprobs.json();
        if text.is_empty() && logprobs.is_null() && finish.is_none() {
            return Vec::new();
        }
        let choice = self.shape.choice(tag, output.index, &text, logprobs, finish);
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
