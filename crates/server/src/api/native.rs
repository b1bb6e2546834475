//! What is not about answers: models, tokens, health.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::body::Body;
use super::conversation::Conversation;
use super::error::ApiError;
use super::fields::Fields;
use crate::adapters::ServedAdapter;
use crate::models::Slot;

/// `GET /v1/models`
pub(crate) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let mut data = Vec::new();
    for slot in app.models.slots() {
        data.push(describe(slot));
        data.extend(slot.adapters.all().iter().map(|adapter| describe_adapter(slot, adapter)));
    }
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{name}`; names may contain slashes.
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let slots = app.models.slots();
    Ok(Json(match app.models.find(&name) {
        Some((place, Some(adapter))) => describe_adapter(&slots[place], &adapter),
        _ => describe(&slots[app.models.place(Some(&name))?]),
    }))
}

/// An adapter is a model too, whose parent it is made for.
fn describe_adapter(slot: &Slot, adapter: &ServedAdapter) -> Value {
    let mut description = describe(slot);
    description["id"] = adapter.served.name.clone().into();
    description["parent"] = slot.model.name.clone().into();
    description["root"] = adapter.served.path.display().to_string().into();
    description
}

fn describe(slot: &Slot) -> Value {
    let status = if slot.loaded().is_some() { "loaded" } else { "unloaded" };
    json!({
        "id": slot.model.name,
        "object": "model",
        "created": slot.created,
        "owned_by": "bevel",
        "max_model_len": slot.model.context,
        "status": { "value": status },
    })
}

/// `POST /models/load`: before anybody waits for an answer.
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    app.models.get(Some(&named(&body)?)).await?;
    Ok(Json(json!({ "success": true })))
}

/// `POST /models/unload`: its memory is free when this answers, and it is loaded when it is asked for.
pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    app.models.unload(Some(&named(&body)?)).await?;
    Ok(Json(json!({ "success": true })))
}

/// The model that a body names, and nothing else.
fn named(body: &[u8]) -> Result<String, ApiError> {
    let mut fields = Fields::parse(body)?;
    let name = fields.require("model")?;
    fields.finish()?;
    Ok(name)
}

/// `GET /health`
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let mut loaded = app.models.slots().iter().filter_map(Slot::loaded);
    if loaded.all(|model| model.worker.is_alive()) {
        Json(json!({ "status": "ok" })).into_response()
    } else {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "a model's thread has ended").into_response()
    }
}

/// `POST /tokenize`: a text's tokens, or those of a conversation.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.model(&mut fields).await?;
    let (text, add_special, parse_special) = match fields.take::<String>("prompt")? {
        Some(text) => (text, true, false),
        None => (super::in_place(|| Conversation::take(&mut fields, &model))?.prompt, false, true),
    };
    let add_special = fields.take("add_special_tokens")?.unwrap_or(add_special);
    let parse_special = fields.take("parse_special")?.unwrap_or(parse_special);
    let with_texts = fields.take("return_token_strs")?.unwrap_or(false);
    fields.finish()?;
    let tokenizer = model.tokenizer.clone();
    let encoded =
        super::blocking(move || tokenizer.encode(&text, add_special, parse_special)).await?;
    let tokens = encoded.map_err(|error| ApiError::field("prompt", error))?;
    let mut response =
        json!({ "tokens": tokens, "count": tokens.len(), "max_model_len": model.context });
    if with_texts {
        let texts = tokens.iter().map(|&token| model.tokenizer.token(token));
        response["token_strs"] = texts.collect();
    }
    Ok(Json(response))
}

/// `POST /detokenize`
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.model(&mut fields).await?;
    let tokens: Vec<u32> = fields.require("tokens")?;
    let skip_special = fields.take("skip_special_tokens")?.unwrap_or(false);
    fields.finish()?;
    let vocabulary = model.tokenizer.vocab_size();
    if let Some(i) = tokens.iter().position(|&token| token as usize >= vocabulary) {
        let problem = format!("{} is none of the model's {vocabulary} tokens", tokens[i]);
        return Err(ApiError::field(format!("tokens[{i}]"), problem));
    }
    Ok(Json(json!({ "prompt": model.tokenizer.decode(&tokens, skip_special) })))
}

/// `POST /apply-template`: a conversation as the model reads it.
pub(crate) async fn apply_template(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.model(&mut fields).await?;
    let prompt = super::in_place(|| Conversation::take(&mut fields, &model))?.prompt;
    fields.finish()?;
    Ok(Json(json!({ "prompt": prompt })))
}
