//! What comes from the engine, put together.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use bevel_engine::{End, EndReason, OutputToken};
use bevel_model::TokenLogprobs;
use tokio::sync::mpsc;

use crate::api::brief;
use crate::api::error::ApiError;
use crate::worker::Event;

/// A finished answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) text: String,
    /// With the text that each made certain.
    pub(crate) tokens: Vec<(OutputToken, String)>,
    /// Of the prompt's tokens from the second one on: with the first answer to each request.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    pub(crate) end: End,
}

/// An answer that has not ended.
#[derive(Default)]
struct Begun {
    text: String,
    tokens: Vec<(OutputToken, String)>,
    prompt_logprobs: Vec<TokenLogprobs>,
}

/// Waits for `count` answers: by request and number.
pub(crate) async fn collect(
    events: &mut mpsc::UnboundedReceiver<Event>,
    count: usize,
) -> Result<BTreeMap<(usize, u32), Answer>, ApiError> {
    let mut begun = BTreeMap::<(usize, u32), Begun>::new();
    let mut answers = BTreeMap::new();
    while answers.len() < count {
        let (tag, output) = next(events).await?;
        let key = (tag, output.index);
        let answer = begun.entry(key).or_default();
        answer.text.push_str(&output.text);
        answer.tokens.extend(output.token.map(|token| (token, output.text)));
        answer.prompt_logprobs.extend(output.prompt_logprobs);
        if let Some(end) = output.end {
            finish_reason(&end.reason)?;
            let Begun { text, tokens, prompt_logprobs } = begun.remove(&key).unwrap_or_default();
            answers.insert(key, Answer { text, tokens, prompt_logprobs, end });
        }
    }
    Ok(answers)
}

/// The next output, and which of the client's requests it is of.
pub(crate) async fn next(
    events: &mut mpsc::UnboundedReceiver<Event>,
) -> Result<(usize, bevel_engine::Output), ApiError> {
    match events.recv().await {
        Some(Event::Output(tag, output)) => Ok((tag, output)),
        Some(Event::Failed(problem)) => Err(ApiError::internal(problem)),
        None => Err(ApiError::internal("the engine failed; what it was working on is lost")),
    }
}

/// OpenAI's word for how an answer ended.
pub(crate) fn finish_reason(reason: &EndReason) -> Result<&'static str, ApiError> {
    match reason {
        EndReason::EndOfText(_) | EndReason::StopString(_) | EndReason::Complete => Ok("stop"),
        EndReason::MaxTokens | EndReason::ContextFull => Ok("length"),
        EndReason::Deadline => Err(ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "the answer took longer than this server allows",
        )
        .with_code("timeout")),
        EndReason::NotFinite => Err(ApiError::internal(
            "the model's numbers overflowed: it is broken, or needs `--kv f32`",
        )),
        EndReason::Grammar(problem) => {
            let problem = format!("the grammar could not be followed: {}", brief(problem));
            Err(ApiError::bad_request(problem).with_code("grammar_not_followed"))
        }
    }
}

/// How an answer ended, for metrics.
pub(crate) fn end_name(reason: &EndReason) -> &'static str {
    match reason {
        EndReason::EndOfText(_) | EndReason::StopString(_) | EndReason::Complete => "stop",
        EndReason::MaxTokens | EndReason::ContextFull => "length",
        EndReason::Deadline => "timeout",
        EndReason::NotFinite | EndReason::Grammar(_) => "error",
    }
}
