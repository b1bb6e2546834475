//! Adapters, as llama-server and vLLM have them.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::App;
use super::body::Body;
use super::error::ApiError;
use super::fields::Fields;
use crate::adapters::{Adapters, Scale};

/// `GET /lora-adapters`: those of the first model.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let describe = |adapter: &crate::adapters::ServedAdapter| {
        json!({
            "id": adapter.id,
            "name": adapter.served.name,
            "path": adapter.served.path.display().to_string(),
            "scale": adapter.usual_scale,
        })
    };
    Json(first(&app).all().iter().map(describe).collect())
}

/// `POST /lora-adapters`: how strongly they count where requests do not say.
pub(crate) async fn set(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let scales: Vec<Scale> = serde_json::from_slice(&body).map_err(|error| {
        ApiError::bad_request(format!(
            "the body is no list of objects of `id` and `scale`: {error}"
        ))
    })?;
    first(&app).set_usual(&scales)?;
    Ok(success())
}

/// `POST /v1/load_lora_adapter`
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let place = app.models.place(fields.take::<String>("model")?.as_deref())?;
    let name: String = fields.require("lora_name")?;
    let path: PathBuf = fields.require("lora_path")?;
    fields.finish()?;
    app.models.slots()[place].adapters.loader()?;
    if name.is_empty() || app.models.find(&name).is_some() {
        let problem = format!("`{name}` is no name that is free; choose another one");
        return Err(ApiError::field("lora_name", problem));
    }
    let app = app.clone();
    super::blocking(move || app.models.slots()[place].adapters.load(name, path)).await??;
    Ok(success())
}

/// `POST /v1/unload_lora_adapter`
pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let name: String = fields.require("lora_name")?;
    fields.finish()?;
    first(&app).loader()?;
    match app.models.find(&name) {
        Some((place, Some(_))) => app.models.slots()[place].adapters.unload(&name)?,
        _ => {
            let problem = format!("no adapter is called `{name}`");
            let error = ApiError::field("lora_name", problem);
            return Err(ApiError { status: StatusCode::NOT_FOUND, ..error });
        }
    }
    Ok(success())
}

fn success() -> Json<Value> {
    Json(json!({ "success": true }))
}

fn first(app: &App) -> &Adapters {
    &app.models.slots()[0].adapters
}
