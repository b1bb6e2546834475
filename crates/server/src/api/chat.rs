//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bevel_engine::{Output, OutputToken};
use bevel_model::chat::Message;
use bevel_model::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::body::Body;
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{Options, Usage};
use super::stream::{Chunks, respond};
use super::{App, new_id, now};
use crate::answer::{collect, finish_reason};
use crate::served::Served;

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let model = app.model(&mut fields)?;
    let chat = Chat::take(&mut fields, &model)?;
    fields.finish()?;
    let Chat { prompt, options, stream, include_usage } = chat;
    let answers = options.request.answers as usize;
    let (events, mut received) = mpsc::unbounded_channel();
    let prompts = vec![Prompt::Text(prompt)];
    super::submit(&model, prompts, options, &events).await?;
    drop(events);

    let (id, created) = (new_id("chatcmpl"), now());
    if stream {
        let usage = include_usage.then(Usage::default);
        let chunks = ChatChunks { id, created, model, answers, usage };
        return Ok(respond(received, answers, chunks));
    }
    let (mut usage, mut choices) = (Usage::default(), Vec::new());
    for ((tag, index), answer) in collect(&mut received, answers).await? {
        usage.add(tag, &answer.end);
        let tokens = answer.tokens.iter().map(|(token, _)| token);
        choices.push(json!({
            "index": index,
            "message": { "role": "assistant", "content": answer.text, "refusal": null },
            "logprobs": logprobs(&model.tokenizer, tokens),
            "finish_reason": finish_reason(&answer.end.reason)?,
        }));
    }
    let response = json!({
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model.name,
        "choices": choices,
        "usage": usage.json(),
    });
    Ok(Json(response).into_response())
}

/// What a client asked for.
struct Chat {
    /// The conversation as the model reads it.
    prompt: String,
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
        let prompt = render(fields, model)?;
        let mut options = Options::take(fields, model)?;
        let most: Option<usize> = fields.take("max_tokens")?;
        options.request.max_tokens = fields.take("max_completion_tokens")?.or(most);
        let wants_logprobs = fields.take("logprobs")?.unwrap_or(false);
        let top = fields.number("top_logprobs", |n: usize| n <= 20, "0 to 20")?;
        if top.is_some() && !wants_logprobs {
            return Err(ApiError::field("top_logprobs", "it needs `logprobs` to be true"));
        }
        options.request.logprobs = wants_logprobs.then_some(top.unwrap_or(0));
        let stream = fields.take("stream")?.unwrap_or(false);
        let include_usage = stream_options(fields, stream)?;
        for (name, served) in [
            ("modalities", vec![json!(["text"])]),
            ("store", vec![false.into()]),
            ("service_tier", vec!["auto".into(), "default".into()]),
            ("audio", vec![]),
            ("prediction", vec![]),
            ("web_search_options", vec![]),
            ("verbosity", vec!["medium".into()]),
            ("parallel_tool_calls", vec![true.into()]),
            ("tools", vec![json!([])]),
            ("tool_choice", vec!["none".into(), "auto".into()]),
            ("functions", vec![]),
            ("function_call", vec![]),
        ] {
            fields.only(name, &served)?;
        }
        fields.drop_notes(&["user", "metadata", "safety_identifier", "prompt_cache_key"]);
        Ok(Self { prompt, options, stream, include_usage })
    }
}

/// Takes `stream_options`; whether a stream tells its usage.
pub(crate) fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    match fields.take::<StreamOptions>("stream_options")? {
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

/// Takes the fields of a conversation and renders it.
pub(crate) fn render(fields: &mut Fields, model: &Served) -> Result<String, ApiError> {
    let messages: Vec<Message> = fields.require("messages")?;
    if messages.is_empty() {
        return Err(ApiError::field("messages", "there is none"));
    }
    let messages: Vec<Message> =
        messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    let mut extra: Map<String, Value> = fields.take("chat_template_kwargs")?.unwrap_or_default();
    let continues = fields.take("continue_final_message")?.unwrap_or(false);
    let prompted = fields.take("add_generation_prompt")?.unwrap_or(!continues);
    if continues && prompted {
        let problem = "an answer is begun anew or a message is continued, not both";
        return Err(ApiError::field("continue_final_message", problem));
    }
    let template = model.template()?;
    if let Some(effort) = fields.take::<String>("reasoning_effort")? {
        // Only some templates know what to do with it.
        if !template.source().contains("reasoning_effort") {
            let problem = "this model's chat template does not know it";
            return Err(ApiError::field("reasoning_effort", problem));
        }
        extra.insert("reasoning_effort".to_owned(), effort.into());
    }
    let text = template.render(&messages, None, prompted, extra)?;
    if !continues {
        return Ok(text);
    }
    // What the template writes after the message's text would end it.
    let last = messages.last().and_then(|message| message.content.as_str()).unwrap_or_default();
    match text.rfind(last.trim_end()).filter(|_| !last.trim().is_empty()) {
        Some(at) => Ok(text[..at + last.trim_end().len()].to_owned()),
        None => Err(ApiError::field("continue_final_message", "the last message has no text")),
    }
}

/// A message as templates know them: of text only, arguments of calls parsed.
fn message((i, mut message): (usize, Message)) -> Result<Message, ApiError> {
    if let Value::Array(parts) = &message.content {
        let mut text = String::new();
        for (j, part) in parts.iter().enumerate() {
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(part)) => text.push_str(part),
                (kind, _) => {
                    let problem = format!("this model reads text, not `{}`", kind.unwrap_or("?"));
                    return Err(ApiError::field(format!("messages[{i}].content[{j}]"), problem));
                }
            }
        }
        message.content = text.into();
    }
    if !matches!(message.content, Value::String(_) | Value::Null) {
        return Err(ApiError::field(format!("messages[{i}].content"), "expected text"));
    }
    if message.role == "developer" {
        message.role = "system".to_owned();
    }
    if let Some(Value::Array(calls)) = message.extra.get_mut("tool_calls") {
        for call in calls {
            let arguments = call.pointer_mut("/function/arguments");
            if let Some(arguments) = arguments
                && let Some(parsed) =
                    arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
            {
                *arguments = parsed;
            }
        }
    }
    Ok(message)
}

/// A prompt as clients give it.
#[derive(Clone, Debug)]
pub(crate) enum Prompt {
    /// A rendered conversation: special tokens spelt in it count, and none are added.
    Text(String),
    /// Text to go on from.
    Raw(String),
    /// Tokens.
    Tokens(Vec<u32>),
}

impl Prompt {
    pub(crate) fn tokens(self, tokenizer: &Tokenizer) -> Result<Vec<u32>, ApiError> {
        let encoded = match self {
            Self::Tokens(tokens) => return Ok(tokens),
            Self::Text(text) => tokenizer.encode(&text, false, true),
            Self::Raw(text) => tokenizer.encode(&text, true, false),
        };
        encoded.map_err(|error| ApiError::field("prompt", error))
    }
}

/// Probabilities in the chat API's shape; null where they were not asked for.
fn logprobs<'a>(tokenizer: &Tokenizer, tokens: impl Iterator<Item = &'a OutputToken>) -> Value {
    let entry = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        json!({ "token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes })
    };
    let mut content = Vec::new();
    for token in tokens {
        let Some(logprobs) = &token.logprobs else { return Value::Null };
        let mut here = entry(token.id, logprobs.logprob);
        here["top_logprobs"] = logprobs.top.iter().map(|&(id, p)| entry(id, p)).collect();
        content.push(here);
    }
    if content.is_empty() { Value::Null } else { json!({ "content": content, "refusal": null }) }
}

struct ChatChunks {
    id: String,
    created: u64,
    model: Arc<Served>,
    answers: usize,
    usage: Option<Usage>,
}

impl ChatChunks {
    fn chunk(&self, choices: Value) -> Value {
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
    fn begin(&mut self) -> Vec<Value> {
        let first = |index| {
            let delta = json!({ "role": "assistant", "content": "" });
            let choice = json!({ "index": index, "delta": delta, "finish_reason": null });
            self.chunk(json!([choice]))
        };
        (0..self.answers).map(first).collect()
    }

    fn output(&mut self, tag: usize, output: Output, finish: Option<&'static str>) -> Vec<Value> {
        if let (Some(usage), Some(end)) = (&mut self.usage, &output.end) {
            usage.add(tag, end);
        }
        let logprobs = logprobs(&self.model.tokenizer, output.token.iter());
        let mut chunks = Vec::new();
        if !output.text.is_empty() || !logprobs.is_null() {
            let mut choice = json!({
                "index": output.index,
                "delta": { "content": output.text },
                "finish_reason": null,
            });
            if !logprobs.is_null() {
                choice["logprobs"] = logprobs;
            }
            chunks.push(self.chunk(json!([choice])));
        }
        if let Some(finish) = finish {
            let choice = json!({ "index": output.index, "delta": {}, "finish_reason": finish });
            chunks.push(self.chunk(json!([choice])));
        }
        chunks
    }

    fn end(&mut self) -> Vec<Value> {
        let Some(usage) = &self.usage else { return Vec::new() };
        let mut chunk = self.chunk(json!([]));
        chunk["usage"] = usage.json();
        vec![chunk]
    }
}
