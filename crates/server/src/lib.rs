//! Models over HTTP, as OpenAI's API has it. Each model has an engine on a thread of its own; everything
//! else here is about requests and responses.

#![forbid(unsafe_code)]

mod adapters;
mod answer;
mod api;
mod config;
mod histogram;
mod metrics;
mod models;
mod running;
mod served;
mod worker;

use std::io::IsTerminal;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::runtime::Runtime;

use models::Models;

pub use adapters::{AdapterLoader, AdapterToServe};
pub use config::{HeaderValue, ServerConfig};
pub use models::{Loader, ModelToServe};
pub use served::LoadedModel;

/// What keeps a server from running.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken or not this machine's.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        error: std::io::Error,
    },
    /// A model cannot be loaded, or its engine does not start.
    #[error("cannot serve `{model}`: {problem}")]
    Model {
        /// The model.
        model: String,
        /// Why not.
        problem: String,
    },
    /// Certificate or key are of no use.
    #[error("cannot use the TLS certificate `{certificate}` with the key `{key}`: {error}")]
    Tls {
        /// The certificate's file.
        certificate: String,
        /// The key's file.
        key: String,
        /// Why not.
        error: std::io::Error,
    },
    /// The system fails.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// A server that listens, but answers only once it runs.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    listener: TcpListener,
    app: Arc<api::App>,
    tls: Option<RustlsConfig>,
    runtime: Runtime,
}

impl Server {
    /// Listens, and loads the models that memory holds. The first model serves requests that name none.
    ///
    /// # Errors
    /// Where the address cannot be had, the certificate is of no use, or a model cannot be loaded.
    pub fn bind(config: ServerConfig, models: Vec<ModelToServe>) -> Result<Self, Error> {
        let address = config.address;
        let listen = |error| Error::Listen { address, error };
        let listener = TcpListener::bind(address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        // The models' threads are the busy ones.
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let tls = match &config.tls {
            None => None,
            Some((certificate, key)) => {
                let tls = runtime.block_on(RustlsConfig::from_pem_file(certificate, key));
                Some(tls.map_err(|error| Error::Tls {
                    certificate: certificate.display().to_string(),
                    key: key.display().to_string(),
                    error,
                })?)
            }
        };
        let models = Models::new(models, config.memory);
        models.load_first().map_err(|(model, problem)| Error::Model { model, problem })?;
        let (api_keys, body_limit) = (config.api_keys.clone(), config.body_limit);
        let (models, running) = (Arc::new(models), running::Running::default());
        let app = Arc::new(api::App { models, api_keys, body_limit, running });
        Ok(Self { config, listener, app, tls, runtime })
    }

    /// Where it listens: the port that was chosen where 0 was asked for.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> Result<SocketAddr, Error> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until `ended` says so, which is asked ten times a second; requests that run then have the
    /// config's time of grace.
    ///
    /// # Errors
    /// The system's.
    pub fn run(self, ended: impl Fn() -> bool + Send + 'static) -> Result<(), Error> {
        let Self { config, listener, app, tls, runtime } = self;
        let result = runtime.block_on(Self::serve(config, listener, app, tls, ended));
        // Nobody waits for what is left of them.
        runtime.shutdown_background();
        result
    }

    async fn serve(
        config: ServerConfig,
        listener: TcpListener,
        app: Arc<api::App>,
        tls: Option<RustlsConfig>,
        ended: impl Fn() -> bool + Send + 'static,
    ) -> Result<(), Error> {
        let running = app.running.clone();
        if let Some(after) = config.unload_after {
            let models = app.models.clone();
            tokio::spawn(async move { models.unload_idle(after).await });
        }
        let service = api::router(app, &config).into_make_service();
        let handle = Handle::new();
        tokio::spawn({
            let (handle, grace) = (handle.clone(), config.grace);
            async move {
                let mut often = tokio::time::interval(Duration::from_millis(100));
                while !ended() {
                    often.tick().await;
                }
                handle.graceful_shutdown(Some(grace));
                // Connections that ask for nothing, or have not said what, are not waited for.
                let mut quiet = 0;
                while quiet < 3 {
                    often.tick().await;
                    quiet = if running.count() == 0 { quiet + 1 } else { 0 };
                }
                handle.shutdown();
            }
        });
        match tls {
            None => {
                let mut server = axum_server::from_tcp(listener)?.handle(handle);
                be_patient(server.http_builder());
                server.serve(service).await?;
            }
            Some(tls) => {
                let mut server = axum_server::from_tcp_rustls(listener, tls)?.handle(handle);
                be_patient(server.http_builder());
                server.serve(service).await?;
            }
        }
        Ok(())
    }
}

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(30);

fn be_patient(builder: &mut Builder<TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
}

/// Logs a line for each request to stderr, for people or, as `json`, for programs.
pub fn log_to_stderr(json: bool) {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(tracing::Level::INFO)
        .with_target(false);
    // Somebody else's subscriber is as good.
    let _ = match json {
        true => subscriber.json().flatten_event(true).try_init(),
        false => subscriber.try_init(),
    };
}
