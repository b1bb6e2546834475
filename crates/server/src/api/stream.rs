//! Answers as they come: server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bevel_engine::Output;
use futures_util::stream;
use serde_json::Value;
use tokio::sync::mpsc;

use super::error::ApiError;
use crate::answer::{finish_reason, next};
use crate::worker::Event;

/// A server-sent event.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chunk {
    /// `event:`, where the API has it.
    name: Option<&'static str>,
    data: Value,
}

impl Chunk {
    /// One whose name is told as `event:` and as the data's `type`.
    pub(crate) fn named(name: &'static str, mut data: Value) -> Self {
        data["type"] = name.into();
        Self { name: Some(name), data }
    }
}

impl From<Value> for Chunk {
    fn from(data: Value) -> Self {
        Self { name: None, data }
    }
}

/// Makes an API's chunks of an engine's outputs.
pub(crate) trait Chunks: Send + 'static {
    /// Before anything came.
    fn begin(&mut self) -> Vec<Chunk>;

    /// Of an output of the client's request `tag`. `finish` is how its answer ended, if it has.
    fn output(&mut self, tag: usize, output: Output, finish: Option<&'static str>) -> Vec<Chunk>;

    /// After all answers ended.
    fn end(&mut self) -> Vec<Chunk>;

    /// Where something went wrong. Nothing follows.
    fn error(&self, error: &ApiError) -> Chunk {
        error.json().into()
    }

    /// What the stream ends with.
    fn mark_of_end(&self) -> Option<&'static str> {
        Some("[DONE]")
    }
}

/// A stream of `answers` answers.
pub(crate) fn respond<C: Chunks>(
    events: mpsc::UnboundedReceiver<Event>,
    answers: usize,
    mut chunks: C,
) -> Response {
    let ready = chunks.begin().into_iter().map(data).collect();
    let state = State { events, unfinished: answers, ended: false, chunks, ready };
    let stream = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    });
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Sse::new(stream).keep_alive(keep_alive).into_response()
}

struct State<C> {
    events: mpsc::UnboundedReceiver<Event>,
    unfinished: usize,
    ended: bool,
    chunks: C,
    ready: VecDeque<SseEvent>,
}

impl<C: Chunks> State<C> {
    async fn next(&mut self) -> Option<SseEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            if self.unfinished == 0 {
                self.ready.extend(self.chunks.end().into_iter().map(data));
                let mark = self.chunks.mark_of_end();
                self.ready.extend(mark.map(|mark| SseEvent::default().data(mark)));
                self.ended = true;
                continue;
            }
            match self.chunks_of_next().await {
                Ok(chunks) => self.ready.extend(chunks.into_iter().map(data)),
                Err(error) => {
                    self.ready.push_back(data(self.chunks.error(&error)));
                    self.ended = true;
                }
            }
        }
    }

    async fn chunks_of_next(&mut self) -> Result<Vec<Chunk>, ApiError> {
        let (tag, output) = next(&mut self.events).await?;
        let end = output.end.as_ref();
        let finish = end.map(|end| finish_reason(&end.reason)).transpose()?;
        self.unfinished -= usize::from(finish.is_some());
        Ok(self.chunks.output(tag, output, finish))
    }
}

fn data(chunk: Chunk) -> SseEvent {
    let event = SseEvent::default();
    // The name comes first: some clients want it so.
    let event = match chunk.name {
        Some(name) => event.event(name),
        None => event,
    };
    event.data(chunk.data.to_string())
}
