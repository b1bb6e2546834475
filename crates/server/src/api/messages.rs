//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's API.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bevel_engine::{EndReason, Output};
use bevel_model::chat::Message;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::body::Body;
use super::conversation::{Conversation, Prompt, Reader, Rendering};
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{Options, stop};
use super::stream::{Chunk, Chunks, respond};
use super::tools::{Call, Function, Piece, ToolChoice, Tools};
use super::{App, new_id};
use crate::answer::{collect, finish_reason};
use crate::served::{Asked, Served};

/// An error in Anthropic's shape.
pub(crate) struct MessagesError(ApiError);

impl From<ApiError> for MessagesError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl MessagesError {
    pub(crate) fn json(error: &ApiError) -> Value {
        let kind = match error.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            _ => "api_error",
        };
        json!({ "type": "error", "error": { "type": kind, "message": error.message } })
    }
}

impl IntoResponse for MessagesError {
    fn into_response(self) -> Response {
        let body = Self::json(&self.0);
        let mut response = self.0.into_response();
        *response.body_mut() = body.to_string().into();
        response.headers_mut().remove("content-length");
        response
    }
}

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    body: Result<Body, ApiError>,
) -> Result<Response, MessagesError> {
    let body = body?;
    let mut fields = super::in_place(|| Fields::parse(&body.0))?;
    let model = app.computing_model(&mut fields).await?;
    let mut conversation = super::in_place(|| conversation(&mut fields, &model))?;
    let stop = stop(&mut fields, "stop_sequences")?;
    let max_tokens: usize = fields.require("max_tokens")?;
    let stream = fields.take("stream")?.unwrap_or(false);
    fields.only("service_tier", &["auto".into(), "standard_only".into()])?;
    for name in ["container", "mcp_servers", "context_management", "n", "stop", "output_format"] {
        fields.only(name, &[])?;
    }
    fields.drop_notes(&["metadata"])?;
    fields.only("prompt_logprobs", &[])?;
    let mut options = Options::take(&mut fields, &model)?;
    fields.finish()?;
    options.request.stop = stop;
    options.request.max_tokens = Some(max_tokens);
    conversation.constrain(&mut options)?;

    let (events, mut received) = mpsc::unbounded_channel();
    let prompts = vec![Prompt::Text(conversation.prompt.clone())];
    let tokens = super::submit(&model, prompts, options, &events).await?;
    drop(events);
    let (id, reader) = (new_id("msg"), conversation.reader());
    if stream {
        let prompt_tokens = tokens[0].len();
        let chunks =
            MessageChunks { id, model, reader, prompt_tokens, blocks: 0, open: None, end: None };
        return Ok(respond(received, 1, chunks));
    }
    let answer = collect(&mut received, 1).await?.remove(&(0, 0)).expect("there is one answer");
    let mut reader = reader;
    let content: Vec<Value> = blocks(reader.read_all(&answer));
    finish_reason(&answer.end.reason)?;
    let (reason, stop) = stop_reason(&answer.end.reason, &reader);
    let response = json!({
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model.name,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": usage(answer.end.prompt_tokens, answer.end.cached_tokens, answer.end.answer_tokens),
    });
    Ok(Json(response).into_response())
}

/// `POST /v1/messages/count_tokens`
pub(crate) async fn count_tokens(
    State(app): State<Arc<App>>,
    body: Result<Body, ApiError>,
) -> Result<Json<Value>, MessagesError> {
    let body = body?;
    let mut fields = super::in_place(|| Fields::parse(&body.0))?;
    let model = app.model(&mut fields).await?;
    let conversation = super::in_place(|| conversation(&mut fields, &model))?;
    fields.finish()?;
    let tokenizer = model.tokenizer.clone();
    let prompt = Prompt::Text(conversation.prompt);
    let tokens = super::blocking(move || prompt.tokens(&tokenizer)).await??;
    Ok(Json(json!({ "input_tokens": tokens.len() })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenMessage {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text or a list of blocks")]
enum Content {
    Text(String),
    Blocks(Vec<Value>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenTool {
    name: String,
    description: Option<String>,
    input_schema: Map<String, Value>,
    #[serde(rename = "type")]
    kind: Option<String>,
    // Everything is cached that can be.
    #[allow(dead_code)]
    cache_control: Option<Value>,
    // Arguments always follow their schema.
    #[allow(dead_code)]
    strict: Option<bool>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum GivenChoice {
    Auto { disable_parallel_tool_use: Option<bool> },
    Any { disable_parallel_tool_use: Option<bool> },
    Tool { name: String, disable_parallel_tool_use: Option<bool> },
    None,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Thinking {
    #[serde(rename = "type")]
    kind: String,
}

/// Takes the fields that make a conversation.
fn conversation(fields: &mut Fields, model: &Served) -> Result<Conversation, ApiError> {
    let given: Vec<GivenMessage> = fields.require("messages")?;
    if given.is_empty() {
        return Err(ApiError::field("messages", "there is none"));
    }
    let mut messages = Vec::new();
    match fields.take("system")? {
        None => {}
        Some(Content::Text(text)) => messages.push(Message::new("system", &text)),
        Some(Content::Blocks(blocks)) => {
            let mut text = String::new();
            for (i, block) in blocks.iter().enumerate() {
                text.push_str(text_of(block, &format!("system[{i}]"))?);
            }
            messages.push(Message::new("system", &text));
        }
    }
    for (i, message) in given.into_iter().enumerate() {
        if !["user", "assistant"].contains(&message.role.as_str()) {
            let problem = "expected `user` or `assistant`";
            return Err(ApiError::field(format!("messages[{i}].role"), problem));
        }
        match message.content {
            Content::Text(text) => messages.push(Message::new(&message.role, &text)),
            Content::Blocks(blocks) => expand(&message.role, &blocks, i, &mut messages)?,
        }
    }
    // An assistant's message at the end is the beginning of the answer.
    let continues = messages.last().is_some_and(|message| {
        message.role == "assistant" && !message.extra.contains_key("tool_calls")
    });
    let mut extra = Map::new();
    if let Some(Thinking { kind }) = fields.object("thinking")? {
        let thinks = match kind.as_str() {
            "disabled" => false,
            "adaptive" => true,
            _ => {
                let problem =
                    "this server sets thoughts no limit: `adaptive` and `disabled` are known";
                return Err(ApiError::field("thinking.type", problem));
            }
        };
        // What Qwen's templates and others ask for.
        extra.insert("enable_thinking".to_owned(), thinks.into());
    }
    let tools = tools(fields, model)?;
    let rendering = Rendering { extra, unprompted: continues, continues };
    Conversation::render(&messages, tools, rendering, model)
}

fn tools(fields: &mut Fields, model: &Served) -> Result<Option<Tools>, ApiError> {
    let given: Vec<GivenTool> = fields.take("tools")?.unwrap_or_default();
    let mut functions = Vec::new();
    for (i, tool) in given.into_iter().enumerate() {
        if let Some(kind) = tool.kind.filter(|kind| kind != "custom") {
            let problem = format!("this server does not have `{kind}`");
            return Err(ApiError::field(format!("tools[{i}].type"), problem));
        }
        let GivenTool { name, description, input_schema: parameters, .. } = tool;
        functions.push(Function { name, description, parameters: parameters.into() });
    }
    let (choice, single) = match fields.take("tool_choice")? {
        None => (ToolChoice::Auto, None),
        Some(GivenChoice::Auto { disable_parallel_tool_use: d }) => (ToolChoice::Auto, d),
        Some(GivenChoice::Any { disable_parallel_tool_use: d }) => (ToolChoice::Required, d),
        Some(GivenChoice::Tool { name, disable_parallel_tool_use: d }) => {
            (ToolChoice::Named(name), d)
        }
        Some(GivenChoice::None) => (ToolChoice::None, None),
    };
    Tools::new(functions, choice, !single.unwrap_or(false), model.tool_template())
}

/// The messages that one of blocks becomes: results of calls are messages of their own.
fn expand(
    role: &str,
    blocks: &[Value],
    i: usize,
    messages: &mut Vec<Message>,
) -> Result<(), ApiError> {
    let (mut text, mut calls) = (String::new(), Vec::new());
    for (j, block) in blocks.iter().enumerate() {
        let place = format!("messages[{i}].content[{j}]");
        match block["type"].as_str() {
            Some("tool_use") if role == "assistant" => {
                let function = json!({ "name": block["name"], "arguments": block["input"] });
                calls.push(json!({ "id": block["id"], "type": "function", "function": function }));
            }
            Some("tool_result") if role == "user" => {
                let result = match &block["content"] {
                    Value::String(text) => text.clone(),
                    Value::Array(parts) => {
                        let mut text = String::new();
                        for part in parts {
                            text.push_str(text_of(part, &place)?);
                        }
                        text
                    }
                    _ => String::new(),
                };
                let result = match block["is_error"].as_bool() {
                    Some(true) => format!("Error: {result}"),
                    _ => result,
                };
                let mut message = Message::new("tool", &result);
                message.extra.insert("tool_call_id".to_owned(), block["tool_use_id"].clone());
                messages.push(message);
            }
            // What it thought before is nothing it has to read again.
            Some("thinking" | "redacted_thinking") if role == "assistant" => {}
            _ => text.push_str(text_of(block, &place)?),
        }
    }
    if !text.is_empty() || !calls.is_empty() {
        let mut message = Message::new(role, &text);
        if !calls.is_empty() {
            message.extra.insert("tool_calls".to_owned(), calls.into());
        }
        messages.push(message);
    }
    Ok(())
}

fn text_of<'v>(block: &'v Value, place: &str) -> Result<&'v str, ApiError> {
    match (block["type"].as_str(), block["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (kind, _) => {
            let problem = format!("this model reads text, not `{}`", kind.unwrap_or("?"));
            Err(ApiError::field(place, problem))
        }
    }
}

/// An answer's content.
fn blocks(pieces: Vec<Piece>) -> Vec<Value> {
    let mut blocks: Vec<Value> = Vec::new();
    for piece in pieces {
        let (kind, part) = match piece {
            Piece::Thought(part) => ("thinking", part),
            Piece::Text(part) => ("text", part),
            Piece::Call(Call { id, name, arguments }) => {
                let call =
                    json!({ "type": "tool_use", "id": id, "name": name, "input": arguments });
                blocks.push(call);
                continue;
            }
        };
        if blocks.last().is_none_or(|block| block["type"] != kind) {
            blocks.push(empty_block(kind));
        }
        if let Some(Value::String(text)) = blocks.last_mut().map(|block| &mut block[kind]) {
            text.push_str(&part);
        }
    }
    blocks
}

/// A block of thoughts or text, both of which have their text under their own name.
fn empty_block(kind: &str) -> Value {
    let mut block = json!({ "type": kind, kind: "" });
    if kind == "thinking" {
        // Nobody reads it again, so nobody has to know who wrote it.
        block["signature"] = "".into();
    }
    block
}

/// Why an answer ended, and the stop string that did it.
fn stop_reason(reason: &EndReason, reader: &Reader) -> (&'static str, Option<String>) {
    match reason {
        EndReason::StopString(stop) => ("stop_sequence", Some(stop.clone())),
        EndReason::MaxTokens => ("max_tokens", None),
        EndReason::ContextFull => ("model_context_window_exceeded", None),
        _ if reader.called() => ("tool_use", None),
        _ => ("end_turn", None),
    }
}

fn usage(prompt_tokens: usize, cached_tokens: usize, answer_tokens: usize) -> Value {
    json!({
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": answer_tokens,
    })
}

struct MessageChunks {
    id: String,
    model: Arc<Asked>,
    reader: Reader,
    prompt_tokens: usize,
    /// Content blocks begun.
    blocks: usize,
    /// The kind of the last of them, if it has not ended.
    open: Option<&'static str>,
    end: Option<bevel_engine::End>,
}

impl MessageChunks {
    fn end_block(&mut self, chunks: &mut Vec<Chunk>) {
        if self.open.take().is_some() {
            let index = self.blocks - 1;
            chunks.push(Chunk::named("content_block_stop", json!({ "index": index })));
        }
    }

    fn begin_block(&mut self, block: Value, chunks: &mut Vec<Chunk>) -> usize {
        self.end_block(chunks);
        let index = self.blocks;
        self.blocks += 1;
        let begin = json!({ "index": index, "content_block": block });
        chunks.push(Chunk::named("content_block_start", begin));
        index
    }

    /// Adds to thoughts or text, which may have to be begun.
    fn add_to_block(&mut self, kind: &'static str, delta: Value, chunks: &mut Vec<Chunk>) {
        if self.open != Some(kind) {
            self.begin_block(empty_block(kind), chunks);
            self.open = Some(kind);
        }
        let delta = json!({ "index": self.blocks - 1, "delta": delta });
        chunks.push(Chunk::named("content_block_delta", delta));
    }
}

impl Chunks for MessageChunks {
    fn begin(&mut self) -> Vec<Chunk> {
        let message = json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model.name,
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": usage(self.prompt_tokens, 0, 0),
        });
        vec![Chunk::named("message_start", json!({ "message": message }))]
    }

    fn output(&mut self, _: usize, output: Output, finish: Option<&'static str>) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        for piece in
            self.reader.read(&output.text, usize::from(output.token.is_some()), finish.is_some())
        {
            match piece {
                Piece::Thought(text) => {
                    let delta = json!({ "type": "thinking_delta", "thinking": text });
                    self.add_to_block("thinking", delta, &mut chunks);
                }
                Piece::Text(text) => {
                    let delta = json!({ "type": "text_delta", "text": text });
                    self.add_to_block("text", delta, &mut chunks);
                }
                Piece::Call(call) => {
                    let block = json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": {} });
                    let index = self.begin_block(block, &mut chunks);
                    let arguments = call.arguments.to_string();
                    let delta = json!({ "type": "input_json_delta", "partial_json": arguments });
                    let delta = json!({ "index": index, "delta": delta });
                    chunks.push(Chunk::named("content_block_delta", delta));
                    chunks.push(Chunk::named("content_block_stop", json!({ "index": index })));
                }
            }
        }
        self.end = output.end.or(self.end.take());
        chunks
    }

    fn end(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        self.end_block(&mut chunks);
        let end = self.end.as_ref().expect("the answer has ended");
        let (reason, stop) = stop_reason(&end.reason, &self.reader);
        let delta = json!({ "stop_reason": reason, "stop_sequence": stop });
        let usage = usage(end.prompt_tokens, end.cached_tokens, end.answer_tokens);
        chunks.push(Chunk::named("message_delta", json!({ "delta": delta, "usage": usage })));
        chunks.push(Chunk::named("message_stop", json!({})));
        chunks
    }

    fn error(&self, error: &ApiError) -> Chunk {
        Chunk::named("error", MessagesError::json(error))
    }

    fn mark_of_end(&self) -> Option<&'static str> {
        None
    }
}
