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
use super::tools::{Call, Function, Piece, ToolChoice, Tools};
use super::{App, new_id, now};
use crate::answer::{collect, finish_reason};
use crate::served::Served;

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.model(&mut fields).await?;
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
    let conversation = super::in_place(|| conversation(&mut fields, &model))?;
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
    fields.drop_notes(&["user", "metadata", "safety_identifier", "prompt_cache_key"]);
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
    for piece in reader.read(&answer.text, true) {
        items.add(piece);
    }
    finish_reason(&answer.end.reason)?;
    finish(&mut response, items.finish(), &answer.end);
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

fn tools(fields: &mut Fields, model: &Served) -> Result<Option<Tools>, ApiError> {
    let given: Vec<Value> = fields.take("tools")?.unwrap_or_default();
    let mut functions = Vec::new();
    for (i, tool) in given.iter().enumerate() {
        let (kind, name) = (tool["type"].as_str(), tool["name"].as_str());
        let (Some("function"), Some(name)) = (kind, name) else {
            let problem = format!("this server does not have `{}`", kind.unwrap_or("?"));
            return Err(ApiError::field(format!("tools[{i}]"), problem));
        };
        let parameters = Some(&tool["parameters"]).filter(|schema| schema.is_object());
        functions.push(Function {
            name: name.to_owned(),
            description: tool["description"].as_str().map(str::to_owned),
            parameters: parameters.cloned().unwrap_or_else(any_object),
        });
    }
    let choice = match fields.take::<Value>("tool_choice")? {
        None => ToolChoice::Auto,
        Some(choice) => match (choice.as_str(), choice["name"].as_str()) {
            (Some("auto"), _) => ToolChoice::Auto,
            (Some("none"), _) => ToolChoice::None,
            (Some("required"), _) => ToolChoice::Required,
            (None, Some(name)) => ToolChoice::Named(name.to_owned()),
            _ => {
                let problem = "expected \"auto\", \"none\", \"required\" or a function";
                return Err(ApiError::field("tool_choice", problem));
            }
        },
    };
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
    Text,
    JsonObject,
    JsonSchema(NamedSchema),
}

/// Takes `text`: the form of the answer.
fn format(fields: &mut Fields) -> Result<Option<bevel_engine::Grammar>, ApiError> {
    let text: Option<Text> = fields.object("text")?;
    Ok(match text.and_then(|text| text.format) {
        None | Some(Format::Text) => None,
        Some(Format::JsonObject) => Some(json_of(&any_object())),
        Some(Format::JsonSchema(named)) => Some(json_of(&named.schema)),
    })
}

/// What a response consists of, as it grows.
#[derive(Default)]
struct Items {
    done: Vec<Value>,
    /// A message that has not ended: its id and text.
    message: Option<(String, String)>,
}

impl Items {
    fn add(&mut self, piece: Piece) {
        match piece {
            Piece::Text(text) => self.message().1.push_str(&text),
            Piece::Call(call) => {
                self.end_message();
                self.done.push(call_item(&call));
            }
        }
    }

    fn message(&mut self) -> &mut (String, String) {
        self.message.get_or_insert_with(|| (new_id("msg"), String::new()))
    }

    /// The message that has ended, if there was one.
    fn end_message(&mut self) -> Option<&Value> {
        let (id, text) = self.message.take()?;
        self.done.push(json!({
            "id": id,
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [text_part(&text)],
        }));
        self.done.last()
    }

    fn finish(&mut self) -> Vec<Value> {
        self.end_message();
        std::mem::take(&mut self.done)
    }
}

fn text_part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
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
fn finish(response: &mut Value, output: Vec<Value>, end: &End) {
    response["output"] = output.into();
    response["usage"] = json!({
        "input_tokens": end.prompt_tokens,
        "input_tokens_details": { "cached_tokens": end.cached_tokens },
        "output_tokens": end.answer_tokens,
        "output_tokens_details": { "reasoning_tokens": 0 },
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

    fn begin_message(&mut self) -> Vec<Chunk> {
        let index = self.items.done.len();
        let id = self.items.message().0.clone();
        let item = json!({
            "id": id,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        });
        let part = json!({ "item_id": id, "output_index": index, "content_index": 0, "part": text_part("") });
        vec![
            self.event(
                "response.output_item.added",
                json!({ "output_index": index, "item": item }),
            ),
            self.event("response.content_part.added", part),
        ]
    }

    fn end_message(&mut self) -> Vec<Chunk> {
        let index = self.items.done.len();
        let Some(item) = self.items.end_message().cloned() else { return Vec::new() };
        let (id, part) = (&item["id"], &item["content"][0]);
        let place = json!({ "item_id": id, "output_index": index, "content_index": 0 });
        let (mut text, mut whole) = (place.clone(), place);
        text["text"] = part["text"].clone();
        text["logprobs"] = json!([]);
        whole["part"] = part.clone();
        vec![
            self.event("response.output_text.done", text),
            self.event("response.content_part.done", whole),
            self.event("response.output_item.done", json!({ "output_index": index, "item": item })),
        ]
    }

    fn call(&mut self, call: &Call) -> Vec<Chunk> {
        let mut chunks = self.end_message();
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
        for piece in self.reader.read(&output.text, finish.is_some()) {
            match piece {
                Piece::Call(call) => chunks.extend(self.call(&call)),
                Piece::Text(text) => {
                    if self.items.message.is_none() {
                        chunks.extend(self.begin_message());
                    }
                    let (index, id) = (self.items.done.len(), self.items.message().0.clone());
                    let delta = json!({
                        "item_id": id,
                        "output_index": index,
                        "content_index": 0,
                        "delta": text,
                        "logprobs": [],
                    });
                    chunks.push(self.event("response.output_text.delta", delta));
                    self.items.add(Piece::Text(text));
                }
            }
        }
        self.end = output.end.or(self.end.take());
        chunks
    }

    fn end(&mut self) -> Vec<Chunk> {
        let mut chunks = self.end_message();
        let end = self.end.take().expect("the answer has ended");
        let mut response = self.response.take();
        self::finish(&mut response, self.items.finish(), &end);
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
