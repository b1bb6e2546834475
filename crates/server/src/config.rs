use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use axum::http::HeaderValue;

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where it listens.
    pub address: SocketAddr,
    /// Clients have to give one of these keys. Without keys anybody is served.
    pub api_keys: Vec<String>,
    /// Pages of these origins may use the server; `*` stands for all. `None`: only its own.
    pub cors: Option<Vec<HeaderValue>>,
    /// Most bytes of a request's body.
    pub body_limit: usize,
    /// Certificate and key, PEM files, for TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Bytes that models may take with their keys and values. They are loaded when they are asked for, and make
    /// way for others. `None`: all of them are loaded at the beginning.
    pub memory: Option<u64>,
    /// Models that nobody asks for during this time are unloaded until somebody does.
    pub unload_after: Option<Duration>,
    /// How long running requests may go on once the server is to end.
    pub grace: Duration,
}

impl ServerConfig {
    /// One that serves anybody who can reach `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            api_keys: Vec::new(),
            cors: None,
            body_limit: 16 << 20,
            tls: None,
            memory: None,
            unload_after: None,
            grace: Duration::from_secs(30),
        }
    }
}
