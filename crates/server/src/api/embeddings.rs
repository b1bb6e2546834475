//! `POST /v1/embeddings`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use bevel_engine::{Pooling, Request};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::App;
use super::body::Body;
use super::completions::Prompts;
use super::conversation::Prompt;
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::Options;
use crate::answer::{finish_reason, next};

/// Texts of one request: OpenAI's number.
const MOST_INPUTS: usize = 2048;

/// Texts that are handed to the engine together.
const TOGETHER: usize = 32;

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Encoding {
    Float,
    Base64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum GivenPooling {
    Mean,
    Last,
}

pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = super::in_place(|| Fields::parse(&body))?;
    let model = app.computing_model(&mut fields).await?;
    let prompts = fields.require::<Prompts>("input")?.into_prompts();
    if prompts.is_empty() || prompts.len() > MOST_INPUTS {
        let problem = format!("expected 1 to {MOST_INPUTS} texts");
        return Err(ApiError::field("input", problem));
    }
    let encoding = fields.take("encoding_format")?.unwrap_or(Encoding::Float);
    let pooling = match fields.take("pooling")?.unwrap_or(GivenPooling::Mean) {
        GivenPooling::Mean => Pooling::Mean,
        GivenPooling::Last => Pooling::Last,
    };
    fields.only("dimensions", &[model.dim.into()])?;
    fields.drop_notes(&["user"])?;
    fields.finish()?;

    let count = prompts.len();
    let request =
        Request { embed: Some(pooling), deadline: model.deadline(), ..Request::new(Vec::new()) };
    let options = Options { request, grammar: None, grammar_field: "" };
    let mut data = vec![Value::Null; count];
    let mut tokens = 0;
    let mut prompts = prompts.into_iter();
    // Some at a time, so that a list of thousands is not refused because the queue is shorter.
    for first in (0..count).step_by(TOGETHER) {
        let some: Vec<Prompt> = prompts.by_ref().take(TOGETHER).collect();
        let number = some.len();
        let (events, mut received) = mpsc::unbounded_channel();
        let submitted = super::submit(&model, some, options.clone(), &events).await;
        let submitted = submitted.map_err(|error| error.blaming("prompt", "input"))?;
        tokens += submitted.iter().map(Vec::len).sum::<usize>();
        drop(events);
        for _ in 0..number {
            let (tag, output) = next(&mut received).await?;
            let tag = first + tag;
            if let Some(end) = &output.end {
                finish_reason(&end.reason)?;
            }
            let embedding = output.embedding.unwrap_or_default();
            let embedding: Value = match encoding {
                Encoding::Float => embedding.into(),
                Encoding::Base64 => {
                    let bytes: Vec<u8> = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
                    base64(&bytes).into()
                }
            };
            data[tag] = json!({ "object": "embedding", "index": tag, "embedding": embedding });
        }
    }
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "model": model.name,
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    })))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..part.len()].copy_from_slice(part);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for digit in 0..4 {
            text.push(match digit <= part.len() {
                true => DIGITS[(bits >> (18 - 6 * digit)) as usize & 63].into(),
                false => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
