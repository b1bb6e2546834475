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
use crate::served::Served;

/// `GET /v1/models`
pub(crate) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.models.iter().map(|model| describe(model)).collect();
    Json(json!({ "object": "list", "data": models }))
}

/// `GET /v1/models/{name}`; names may contain slashes.
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(describe(&*app.named(Some(&name))?)))
}

fn describe(model: &Served) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "bevel",
        "max_model_len": model.context,
    })
}

/// `GET /health`
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    if app.models.iter().all(|model| model.worker.is_alive()) {
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
    let model = app.model(&mut fields)?;
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
    let model = app.model(&mut fields)?;
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
    let model = app.model(&mut fields)?;
    let prompt = super::in_place(|| Conversation::take(&mut fields, &model))?.prompt;
    fields.finish()?;
    Ok(Json(json!({ "prompt": prompt })))
}
