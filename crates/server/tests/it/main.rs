//! The server, asked over a socket, on the model that comes with the project.

mod adapters;
mod answers;
mod clients;
mod models;
mod refusals;
mod running;
mod tools;

pub(crate) use running::{Running, prompt_tokens, server, server_with};
