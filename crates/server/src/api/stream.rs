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

/// Makes an API's chunks of an engine's outputs.
pub(crate) trait Chunks: Send + 'static {
    /// Before anything came.
    fn begin(&mut self) -> Vec<Value>;

    /// Of an output of the client's request `tag`. `finish` is how its answer ended, if it has.
    fn output(&mut self, tag: usize, output: Output, finish: Option<&'static str>) -> Vec<Value>;

    /// After all answers ended.
    fn end(&mut self) -> Vec<Value>;
}

/// A stream of `answers` answers, which ends with `[DONE]`.
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
                self.ready.push_back(SseEvent::default().data("[DONE]"));
                self.ended = true;
                continue;
            }
            match self.chunks_of_next().await {
                Ok(chunks) => self.ready.extend(chunks.into_iter().map(data)),
                Err(error) => {
                    self.ready.push_back(data(error.json()));
                    self.ended = true;
                }
            }
        }
    }

    async fn chunks_of_next(&mut self) -> Result<Vec<Value>, ApiError> {
        let (tag, output) = next(&mut self.events).await?;
        let end = output.end.as_ref();
        let finish = end.map(|end| finish_reason(&end.reason)).transpose()?;
        self.unfinished -= usize::from(finish.is_some());
        Ok(self.chunks.output(tag, output, finish))
    }
}

fn data(value: Value) -> SseEvent {
    SseEvent::default().data(value.to_string())
}
