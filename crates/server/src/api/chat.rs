//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bevel_engine::{Output, OutputToken};
use bevel_model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::body::Body;
use super::conversation::{Conversation, Prompt, Reader};
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{Options, Usage, logprobs as number_of_logprobs, prompt_logprobs};
use super::stream::{Chunk, Chunks, respond};
use super::tools::{Call, Piece};
use super::{App, new_id, now};
use crate::answer::{collect, finish_reason};
use crate::served::{Asked, Served};

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.computing_model(&mut fields).await?;
    let chat = super::in_place(|| {
        let chat = Chat::take(&mut fields, &model)?;
        fields.finish()?;
        Ok::<_, ApiError>(chat)
    })?;
    let Chat { conversation, options, stream, include_usage } = chat;
    let answers = options.request.answers as usize;
    let asked = options.request.logprobs.is_some();
    let of_prompt = options.request.prompt_logprobs.is_some();
    let (events, mut received) = mpsc::unbounded_channel();
    let prompts = vec![Prompt::Text(conversation.prompt.clone())];
    let tokens = super::submit(&model, prompts, options, &events).await?;
    drop(events);

    let (id, created) = (new_id("chatcmpl"), now());
    if stream {
        let usage = include_usage.then(Usage::default);
        let readers = vec![conversation.reader(); answers];
        let chunks = ChatChunks { id, created, model, readers, calls: vec![0; answers], usage };
        return Ok(respond(received, answers, chunks));
    }
    let (mut usage, mut choices) = (Usage::default(), Vec::new());
    let answers = collect(&mut received, answers).await?;
    let scored = prompt_logprobs(&model.tokenizer, &tokens[0], &answers[&(0, 0)].prompt_logprobs);
    for ((tag, index), answer) in answers {
        usage.add(tag, &answer.end);
        let tokens = answer.tokens.iter().map(|(token, _)| token);
        let mut reader = conversation.reader();
        let message = message(reader.read_all(&answer));
        usage.thought_tokens += reader.thought_tokens();
        choices.push(json!({
            "index": index,
            "message": message,
            "logprobs": match asked {
                true => json!({ "content": logprobs(&model.tokenizer, tokens), "refusal": null }),
                false => Value::Null,
            },
            "finish_reason": finish(finish_reason(&answer.end.reason)?, &reader),
        }));
    }
    let mut response = json!({
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model.name,
        "choices": choices,
        "usage": usage.json(),
    });
    if of_prompt {
        response["prompt_logprobs"] = scored;
    }
    Ok(Json(response).into_response())
}

/// An answer in the chat API's shape.
fn message(pieces: Vec<Piece>) -> Value {
    let (mut thoughts, mut text, mut calls) = (String::new(), String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Thought(part) => thoughts.push_str(&part),
            Piece::Text(part) => text.push_str(&part),
            Piece::Call(call) => calls.push(call_json(&call)),
        }
    }
    let mut message = json!({ "role": "assistant", "content": text, "refusal": null });
    if !thoughts.is_empty() {
        message["reasoning_content"] = thoughts.into();
    }
    if !calls.is_empty() {
        if text.is_empty() {
            message["content"] = Value::Null;
        }
        message["tool_calls"] = calls.into();
    }
    message
}

fn call_json(call: &Call) -> Value {
    let function = json!({ "name": call.name, "arguments": call.arguments.to_string() });
    json!({ "id": call.id, "type": "function", "function": function })
}

/// How an answer ended, calls counted.
fn finish(finish: &'static str, reader: &Reader) -> &'static str {
    if finish == "stop" && reader.called() { "tool_calls" } else { finish }
}

/// What a client asked for.
struct Chat {
    conversation: Conversation,
    options: Options,
    stream: bool,
    include_usage: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub(crate) include_usage: bool,
    /// Whether chunks are padded against eavesdroppers: they are not.
    #[serde(default)]
    pub(crate) include_obfuscation: bool,
}

impl Chat {
    fn take(fields: &mut Fields, model: &Served) -> Result<Self, ApiError> {
        let mut conversation = Conversation::take(fields, model)?;
        let mut options = Options::take(fields, model)?;
        conversation.constrain(&mut options)?;
        let most: Option<usize> = fields.take("max_tokens")?;
        options.request.max_tokens = fields.take("max_completion_tokens")?.or(most);
        let wants_logprobs = fields.take("logprobs")?.unwrap_or(false);
        let top = number_of_logprobs(fields, "top_logprobs")?;
        if top.is_some() && !wants_logprobs {
            return Err(ApiError::field("top_logprobs", "it needs `logprobs` to be true"));
        }
        options.request.logprobs = wants_logprobs.then_some(top.unwrap_or(0));
        let stream = fields.take("stream")?.unwrap_or(false);
        let include_usage = stream_options(fields, stream)?;
        whole_for_prompt_logprobs(&options, stream)?;
        for (name, served) in [
            ("modalities", vec![json!(["text"])]),
            ("store", vec![false.into()]),
            ("service_tier", vec!["auto".into(), "default".into()]),
            ("audio", vec![]),
            ("prediction", vec![]),
            ("web_search_options", vec![]),
            ("verbosity", vec!["medium".into()]),
            ("functions", vec![]),
            ("function_call", vec![]),
        ] {
            fields.only(name, &served)?;
        }
        fields.drop_notes(&["user", "metadata", "safety_identifier", "prompt_cache_key"])?;
        Ok(Self { conversation, options, stream, include_usage })
    }
}

/// Takes `stream_options`; whether a stream tells its usage.
pub(crate) fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    match fields.object::<StreamOptions>("stream_options")? {
        Some(_) if !stream => {
            Err(ApiError::field("stream_options", "it needs `stream` to be true"))
        }
        Some(options) if options.include_obfuscation => {
            let problem = "this server does not pad chunks";
            Err(ApiError::field("stream_options.include_obfuscation", problem))
        }
        options => Ok(options.is_some_and(|options| options.include_usage)),
    }
}

/// Streams do not tell how likely a prompt was.
pub(crate) fn whole_for_prompt_logprobs(options: &Options, stream: bool) -> Result<(), ApiError> {
    match options.request.prompt_logprobs {
        Some(_) if stream => {
            Err(ApiError::field("prompt_logprobs", "it needs `stream` to be false"))
        }
        _ => Ok(()),
    }
}

/// Probabilities of tokens in the chat API's shape; none where they were not asked for.
fn logprobs<'a>(
    tokenizer: &Tokenizer,
    tokens: impl Iterator<Item = &'a OutputToken>,
) -> Vec<Value> {
    let entry = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        json!({ "token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes })
    };
    let mut content = Vec::new();
    for token in tokens {
        let Some(logprobs) = &token.logprobs else { continue };
        let mut here = entry(token.id, logprobs.logprob);
        here["top_logprobs"] = logprobs.top.iter().map(|&(id, p)| entry(id, p)).collect();
        content.push(here);
    }
    content
}

struct ChatChunks {
    id: String,
    created: u64,
    model: Arc<Asked>,
    /// Of each answer.
    readers: Vec<Reader>,
    /// Calls of each so far.
    calls: Vec<usize>,
    usage: Option<Usage>,
}

impl ChatChunks {
    fn chunk(&self, choices: Value) -> Chunk {
        self.json(choices).into()
    }

    fn json(&self, choices: Value) -> Value {
        let Self { id, created, model, .. } = self;
        let mut chunk = json!({
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model.name,
            "choices": choices,
        });
        if self.usage.is_some() {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self) -> Vec<Chunk> {
        let first = |index| {
            let delta = json!({ "role": "assistant", "content": "" });
            let choice = json!({ "index": index, "delta": delta, "finish_reason": null });
            self.chunk(json!([choice]))
        };
        (0..self.readers.len()).map(first).collect()
    }

    fn output(&mut self, tag: usize, output: Output, finish: Option<&'static str>) -> Vec<Chunk> {
        if let (Some(usage), Some(end)) = (&mut self.usage, &output.end) {
            usage.add(tag, end);
        }
        let logprobs = logprobs(&self.model.tokenizer, output.token.iter());
        let mut logprobs = Some(logprobs).filter(|tokens| !tokens.is_empty());
        let reader = &mut self.readers[output.index as usize];
        let tokens = usize::from(output.token.is_some());
        let pieces = reader.read(&output.text, tokens, finish.is_some());
        if let (Some(usage), Some(_)) = (&mut self.usage, &output.end) {
            usage.thought_tokens += reader.thought_tokens();
        }
        let finish = finish.map(|reason| self::finish(reason, reader));
        let mut deltas = Vec::new();
        let number = &mut self.calls[output.index as usize];
        for piece in pieces {
            deltas.push(match piece {
                Piece::Thought(text) => json!({ "reasoning_content": text }),
                Piece::Text(text) => json!({ "content": text }),
                Piece::Call(call) => {
                    let mut call = call_json(&call);
                    call["index"] = (*number).into();
                    *number += 1;
                    json!({ "tool_calls": [call] })
                }
            });
        }
        if deltas.is_empty() && logprobs.is_some() {
            deltas.push(json!({ "content": "" }));
        }
        let mut chunks = Vec::new();
        for delta in deltas {
            let mut choice =
                json!({ "index": output.index, "delta": delta, "finish_reason": null });
            if let Some(tokens) = logprobs.take() {
                choice["logprobs"] = json!({ "content": tokens, "refusal": null });
            }
            chunks.push(self.chunk(json!([choice])));
        }
        if let Some(finish) = finish {
            let choice = json!({ "index": output.index, "delta": {}, "finish_reason": finish });
            chunks.push(self.chunk(json!([choice])));
        }
        chunks
    }

    fn end(&mut self) -> Vec<Chunk> {
        let Some(usage) = &self.usage else { return Vec::new() };
        let mut chunk = self.json(json!([]));
        chunk["usage"] = usage.json();
        vec![chunk.into()]
    }
}
