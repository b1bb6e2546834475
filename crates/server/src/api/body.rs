use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use futures_util::StreamExt;
use tokio::time::timeout;

use super::App;
use super::error::ApiError;

/// A request's body, whose size is limited.
pub(crate) struct Body(pub(crate) Vec<u8>);

/// Bytes beyond the limit that are read and thrown away. A client that is still sending when the server closes
/// the connection does not see what it is told.
const DISCARDED: usize = 64 << 20;

/// The longest pause in a body.
const PATIENCE: Duration = Duration::from_secs(30);

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let encoding = request.headers().get(header::CONTENT_ENCODING);
        if encoding.is_some_and(|encoding| encoding != "identity") {
            let problem = "compressed bodies are not read: send it without content-encoding";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, problem));
        }
        let limit = app.body_limit;
        let mut stream = request.into_body().into_data_stream();
        let (mut body, mut size) = (Vec::new(), 0usize);
        while size <= limit.saturating_add(DISCARDED) {
            let chunk = timeout(PATIENCE, stream.next()).await.map_err(|_| {
                ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")
            })?;
            let Some(chunk) = chunk else { break };
            let chunk = chunk.map_err(|error| {
                ApiError::bad_request(format!("the body cannot be read: {error}"))
            })?;
            size += chunk.len();
            if size <= limit {
                body.extend_from_slice(&chunk);
            }
        }
        if size > limit {
            let problem = format!("the body is larger than this server's limit of {limit} bytes");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, problem));
        }
        Ok(Self(body))
    }
}
