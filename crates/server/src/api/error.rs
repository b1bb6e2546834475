use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bevel_engine::Refused;
use bevel_model::chat::TemplateError;
use serde_json::{Value, json};

use crate::worker::SubmitError;

/// What a client is told went wrong, in OpenAI's shape.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The field that is to blame.
    pub(crate) param: Option<String>,
    /// For programs.
    pub(crate) code: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// The request's fault.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// The fault of one field.
    pub(crate) fn field(name: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let name = name.into();
        let message = format!("`{name}`: {problem}");
        Self { param: Some(name), ..Self::bad_request(message) }
    }

    /// The same, where a field has another name for the client.
    pub(crate) fn blaming(self, name: &str, called: &str) -> Self {
        match self.param.as_deref() {
            Some(param) if param == name => {
                let message = self.message.replace(&format!("`{name}`"), &format!("`{called}`"));
                Self { message, param: Some(called.to_owned()), ..self }
            }
            _ => self,
        }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub(crate) fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The body of the response.
    pub(crate) fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        let Self { message, param, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Gone => Self::new(StatusCode::SERVICE_UNAVAILABLE, message),
            SubmitError::Refused(refused) => match refused {
                Refused::QueueFull(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, message),
                Refused::PromptTooLong { .. } => {
                    Self::bad_request(message).with_code("context_length_exceeded")
                }
                Refused::Answers { .. } => Self::field("n", refused),
                Refused::Beams { .. } => Self::field("best_of", refused),
                Refused::EmptyPrompt | Refused::Token { .. } => Self::field("prompt", refused),
                Refused::Thread(_) => Self::internal(message),
            },
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        match error {
            TemplateError::Missing => Self::bad_request(
                "the model has no chat template, so it was probably not trained to answer: use /v1/completions, or \
                 start the server with --chat-template",
            ),
            error => Self::field("messages", error),
        }
    }
}
