//! `POST /v1/responses`: OpenAI's newer API. Nothing is stored: a client sends the whole conversation each time.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bevel_engine::{End, EndReason, Output};
use bevel_model::chat::Message;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::body::Body;
use super::conversation::{Conversation, Prompt, Reader, Rendering, parsed};
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{NamedSchema, Options, any_object, json_of};
use super::stream::{Chunk, Chunks, respond};
use super::tools::{Call, Function, GivenFunction, Kind, Piece, ToolChoice, Tools};
use super::{App, new_id, now};
use crate::answer::{collect, finish_reason};
use crate::served::Served;

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.computing_model(&mut fields).await?;
    // What the client said comes back with the response.
    let said =
        |fields: &Fields, name: &str, usual: Value| fields.get(name).cloned().unwrap_or(usual);
    let mut response = json!({
        "id": new_id("resp"),
        "object": "response",
        "created_at": now(),
        "status": "in_progress",
        "error": null,
        "incomplete_details": null,
        "instructions": said(&fields, "instructions", Value::Null),
        "max_output_tokens": said(&fields, "max_output_tokens", Value::Null),
        "metadata": said(&fields, "metadata", json!({})),
        "model": model.name,
        "output": [],
        "parallel_tool_calls": said(&fields, "parallel_tool_calls", true.into()),
        "previous_response_id": null,
        "store": false,
        "text": said(&fields, "text", json!({ "format": { "type": "text" } })),
        "tool_choice": said(&fields, "tool_choice", "auto".into()),
        "tools": said(&fields, "tools", json!([])),
        "truncation": "disabled",
        "usage": null,
    });
    let mut conversation = super::in_place(|| conversation(&mut fields, &model))?;
    let max_tokens = fields.take("max_output_tokens")?;
    let stream = fields.take("stream")?.unwrap_or(false);
    let grammar = format(&mut fields)?;
    for (name, served) in [
        ("store", vec![false.into()]),
        ("background", vec![false.into()]),
        ("truncation", vec!["disabled".into()]),
        ("service_tier", vec!["auto".into(), "default".into()]),
        ("include", vec![json!([])]),
        ("top_logprobs", vec![0.into()]),
        ("previous_response_id", vec![]),
        ("conversation", vec![]),
        ("prompt", vec![]),
        ("reasoning", vec![]),
        ("max_tool_calls", vec![]),
        ("n", vec![]),
        ("stream_options", vec![]),
        ("response_format", vec![]),
    ] {
        fields.only(name, &served)?;
    }
    fields.drop_notes(&["user", "metadata", "safety_identifier", "prompt_cache_key"])?;
    fields.only("prompt_logprobs", &[])?;
    let mut options = Options::take(&mut fields, &model)?;
    fields.finish()?;
    options.request.max_tokens = max_tokens;
    if grammar.is_some() && options.grammar.is_some() {
        let problem = "an answer can follow `text.format` or this, not both";
        return Err(ApiError::field("structured_outputs", problem));
    }
    if grammar.is_some() {
        options.grammar = grammar;
        options.grammar_field = "text";
    }
    conversation.constrain(&mut options)?;
    response["temperature"] = options.request.sampler.temperature.into();
    response["top_p"] = options.request.sampler.top_p.into();

    let (events, mut received) = mpsc::unbounded_channel();
    let prompts = vec![Prompt::Text(conversation.prompt.clone())];
    super::submit(&model, prompts, options, &events).await?;
    drop(events);
    let mut reader = conversation.reader();
    if stream {
        let chunks =
            ResponseChunks { response, reader, items: Items::default(), number: 0, end: None };
        return Ok(respond(received, 1, chunks));
    }
    let answer = collect(&mut received, 1).await?.remove(&(0, 0)).expect("there is one answer");
    let mut items = Items::default();
    for piece in reader.read_all(&answer) {
        items.add(piece);
    }
    finish_reason(&answer.end.reason)?;
    finish(&mut response, items.finish(), &answer.end, reader.thought_tokens());
    Ok(Json(response).into_response())
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text or a list of items")]
enum Input {
    Text(String),
    Items(Vec<Value>),
}

fn conversation(fields: &mut Fields, model: &Served) -> Result<Conversation, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = fields.take::<String>("instructions")? {
        messages.push(Message::new("system", &instructions));
    }
    match fields.require("input")? {
        Input::Text(text) => messages.push(Message::new("user", &text)),
        Input::Items(items) => {
            for (i, item) in items.iter().enumerate() {
                add_item(item, &format!("input[{i}]"), &mut messages)?;
            }
        }
    }
    if messages.is_empty() {
        return Err(ApiError::field("input", "there is nothing to answer"));
    }
    let tools = tools(fields, model)?;
    Conversation::render(&messages, tools, Rendering::default(), model)
}

/// Adds what an item of the input says.
fn add_item(item: &Value, place: &str, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    match item["type"].as_str().unwrap_or("message") {
        "message" => {
            let role = item["role"].as_str();
            let role = role.ok_or_else(|| ApiError::field(place, "it has no role"))?;
            let role = if role == "developer" { "system" } else { role };
            let text = match &item["content"] {
                Value::String(text) => text.clone(),
                Value::Array(parts) => {
                    let mut text = String::new();
                    for (j, part) in parts.iter().enumerate() {
                        match (part["type"].as_str(), part["text"].as_str()) {
                            (Some("input_text" | "output_text"), Some(part)) => text.push_str(part),
                            (kind, _) => {
                                let kind = kind.unwrap_or("?");
                                let problem = format!("this model reads text, not `{kind}`");
                                let place = format!("{place}.content[{j}]");
                                return Err(ApiError::field(place, problem));
                            }
                        }
                    }
                    text
                }
                _ => return Err(ApiError::field(format!("{place}.content"), "expected text")),
            };
            messages.push(Message::new(role, &text));
        }
        "function_call" => {
            let arguments = parsed(&item["arguments"]);
            let function = json!({ "name": item["name"], "arguments": arguments });
            let call = json!({ "id": item["call_id"], "type": "function", "function": function });
            // Calls of one answer are one message.
            let last = messages.last_mut().filter(|message| message.role == "assistant");
            match last.and_then(|message| message.extra.get_mut("tool_calls")?.as_array_mut()) {
                Some(calls) => calls.push(call),
                None => {
                    let mut message = Message::new("assistant", "");
                    message.extra.insert("tool_calls".to_owned(), json!([call]));
                    messages.push(message);
                }
            }
        }
        "function_call_output" => {
            let output = match &item["output"] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let mut message = Message::new("tool", &output);
            message.extra.insert("tool_call_id".to_owned(), item["call_id"].clone());
            messages.push(message);
        }
        // What it thought before is nothing it has to read again.
        "reasoning" => {}
        kind => return Err(ApiError::field(place, format!("this server does not know `{kind}`"))),
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum GivenTool {
    Function(GivenFunction),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenChoice {
    #[serde(rename = "type")]
    kind: Kind,
    name: String,
}

fn tools(fields: &mut Fields, model: &Served) -> Result<Option<Tools>, ApiError> {
    let given: Vec<GivenTool> = fields.take("tools")?.unwrap_or_default();
    let function = |GivenTool::Function(function)| Function::from(function);
    let functions: Vec<Function> = given.into_iter().map(function).collect();
    let named = |GivenChoice { kind: Kind::Function, name }| name;
    let choice = ToolChoice::take(fields, named)?;
    let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
    Tools::new(functions, choice, parallel, model.tool_template())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    format: Option<Format>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Format {
    // With braces further members are refused.
    Text {},
    JsonObject {},
    JsonSchema(NamedSchema),
}

/// Takes `text`: the form of the answer.
fn format(fields: &mut Fields) -> Result<Option<bevel_engine::Grammar>, ApiError> {
    let text: Option<Text> = fields.object("text")?;
    Ok(match text.and_then(|text| text.format) {
        None | Some(Format::Text {}) => None,
        Some(Format::JsonObject {}) => Some(json_of(&any_object())),
        Some(Format::JsonSchema(named)) => Some(json_of(&named.schema)),
    })
}

/// What a response consists of, as it grows.
#[derive(Default)]
struct Items {
    done: Vec<Value>,
    open: Option<Open>,
}

/// An item that has not ended.
#[derive(Clone)]
struct Open {
    kind: Growing,
    id: String,
    text: String,
}

/// Items that grow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Growing {
    Thoughts,
    Message,
}

impl Growing {
    fn new_id(self) -> String {
        new_id(match self {
            Self::Thoughts => "rs",
            Self::Message => "msg",
        })
    }

    /// Names of the events that a text grows and has ended.
    fn events(self) -> (&'static str, &'static str) {
        match self {
            Self::Thoughts => ("response.reasoning_text.delta", "response.reasoning_text.done"),
            Self::Message => ("response.output_text.delta", "response.output_text.done"),
        }
    }

    fn part(self, text: &str) -> Value {
        match self {
            Self::Thoughts => json!({ "type": "reasoning_text", "text": text }),
            Self::Message => {
                json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
            }
        }
    }

    fn item(self, id: &str, status: &str, content: Vec<Value>) -> Value {
        match self {
            Self::Thoughts => json!({
                "id": id,
                "type": "reasoning",
                "status": status,
                "summary": [],
                "content": content,
            }),
            Self::Message => json!({
                "id": id,
                "type": "message",
                "status": status,
                "role": "assistant",
                "content": content,
            }),
        }
    }
}

impl Items {
    fn add(&mut self, piece: Piece) {
        match piece {
            Piece::Thought(text) => self.grow(Growing::Thoughts, &text),
            Piece::Text(text) => self.grow(Growing::Message, &text),
            Piece::Call(call) => {
                self.end_open();
                self.done.push(call_item(&call));
            }
        }
    }

    fn grow(&mut self, kind: Growing, text: &str) {
        if self.open.as_ref().is_none_or(|open| open.kind != kind) {
            self.end_open();
        }
        let begin = || Open { kind, id: kind.new_id(), text: String::new() };
        self.open.get_or_insert_with(begin).text.push_str(text);
    }

    /// The item that has ended, if there was one.
    fn end_open(&mut self) -> Option<(Growing, &Value)> {
        let Open { kind, id, text } = self.open.take()?;
        self.done.push(kind.item(&id, "completed", vec![kind.part(&text)]));
        Some((kind, self.done.last()?))
    }

    fn finish(&mut self) -> Vec<Value> {
        self.end_open();
        std::mem::take(&mut self.done)
    }
}

fn call_item(call: &Call) -> Value {
    json!({
        "id": new_id("fc"),
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments.to_string(),
    })
}

/// Completes a response.
fn finish(response: &mut Value, output: Vec<Value>, end: &End, thought_tokens: usize) {
    response["output"] = output.into();
    response["usage"] = json!({
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": { "cached_tokens": end.cached_tokens },
        "output_tokens": end.answer_tokens,
        "output_tokens_details": { "reasoning_tokens": thought_tokens },
        "total_tokens": end.prompt_tokens + end.answer_tokens,
    });
    let cut_off = matches!(end.reason, EndReason::MaxTokens | EndReason::ContextFull);
    response["status"] = if cut_off { "incomplete" } else { "completed" }.into();
    if cut_off {
        response["incomplete_details"] = json!({ "reason": "max_output_tokens" });
    }
}

struct ResponseChunks {
    response: Value,
    reader: Reader,
    items: Items,
    /// Events so far.
    number: u64,
    end: Option<End>,
}

impl ResponseChunks {
    fn event(&mut self, name: &'static str, mut data: Value) -> Chunk {
        data["sequence_number"] = self.number.into();
        self.number += 1;
        Chunk::named(name, data)
    }

    /// Thoughts or text grow.
    fn grow(&mut self, kind: Growing, text: &str) -> Vec<Chunk> {
        let begins = self.items.open.as_ref().is_none_or(|open| open.kind != kind);
        let mut chunks = if begins { self.end_open() } else { Vec::new() };
        self.items.grow(kind, text);
        let index = self.items.done.len();
        let id = self.items.open.as_ref().map(|open| open.id.clone()).unwrap_or_default();
        let place = json!({ "item_id": id, "output_index": index, "content_index": 0 });
        if begins {
            let item = kind.item(&id, "in_progress", Vec::new());
            let added = json!({ "output_index": index, "item": item });
            chunks.push(self.event("response.output_item.added", added));
            let mut part = place.clone();
            part["part"] = kind.part("");
            chunks.push(self.event("response.content_part.added", part));
        }
        let mut delta = place;
        delta["delta"] = text.into();
        if kind == Growing::Message {
            delta["logprobs"] = json!([]);
        }
        chunks.push(self.event(kind.events().0, delta));
        chunks
    }

    fn end_open(&mut self) -> Vec<Chunk> {
        let index = self.items.done.len();
        let Some((kind, item)) = self.items.end_open() else { return Vec::new() };
        let item = item.clone();
        let part = &item["content"][0];
        let place = json!({ "item_id": item["id"], "output_index": index, "content_index": 0 });
        let (mut text, mut whole) = (place.clone(), place);
        text["text"] = part["text"].clone();
        if kind == Growing::Message {
            text["logprobs"] = json!([]);
        }
        whole["part"] = part.clone();
        vec![
            self.event(kind.events().1, text),
            self.event("response.content_part.done", whole),
            self.event("response.output_item.done", json!({ "output_index": index, "item": item })),
        ]
    }

    fn call(&mut self, call: &Call) -> Vec<Chunk> {
        let mut chunks = self.end_open();
        let (index, item) = (self.items.done.len(), call_item(call));
        let arguments = &item["arguments"];
        let mut begun = item.clone();
        begun["arguments"] = "".into();
        begun["status"] = "in_progress".into();
        let place = json!({ "item_id": item["id"], "output_index": index });
        let (mut delta, mut whole) = (place.clone(), place);
        delta["delta"] = arguments.clone();
        whole["arguments"] = arguments.clone();
        whole["name"] = item["name"].clone();
        let begun = json!({ "output_index": index, "item": begun });
        chunks.push(self.event("response.output_item.added", begun));
        chunks.push(self.event("response.function_call_arguments.delta", delta));
        chunks.push(self.event("response.function_call_arguments.done", whole));
        let done = json!({ "output_index": index, "item": item });
        chunks.push(self.event("response.output_item.done", done));
        self.items.done.push(item);
        chunks
    }
}

impl Chunks for ResponseChunks {
    fn begin(&mut self) -> Vec<Chunk> {
        let response = json!({ "response": self.response });
        vec![
            self.event("response.created", response.clone()),
            self.event("response.in_progress", response),
        ]
    }

    fn output(&mut self, _: usize, output: Output, finish: Option<&'static str>) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let tokens = usize::from(output.token.is_some());
        for piece in self.reader.read(&output.text, tokens, finish.is_some()) {
            chunks.extend(match piece {
                Piece::Thought(text) => self.grow(Growing::Thoughts, &text),
                Piece::Text(text) => self.grow(Growing::Message, &text),
                Piece::Call(call) => self.call(&call),
            });
        }
        self.end = output.end.or(self.end.take());
        chunks
    }

    fn end(&mut self) -> Vec<Chunk> {
        let mut chunks = self.end_open();
        let end = self.end.take().expect("the answer has ended");
        let mut response = self.response.take();
        let thought_tokens = self.reader.thought_tokens();
        self::finish(&mut response, self.items.finish(), &end, thought_tokens);
        let name = match response["status"].as_str() {
            Some("incomplete") => "response.incomplete",
            _ => "response.completed",
        };
        chunks.push(self.event(name, json!({ "response": response })));
        chunks
    }

    fn error(&self, error: &ApiError) -> Chunk {
        let mut response = self.response.clone();
        response["status"] = "failed".into();
        response["error"] = json!({ "code": "server_error", "message": error.message });
        let data = json!({ "response": response, "sequence_number": self.number });
        Chunk::named("response.failed", data)
    }

    fn mark_of_end(&self) -> Option<&'static str> {
        None
    }
}
