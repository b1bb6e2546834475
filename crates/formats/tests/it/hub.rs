//! Fetching by name, against a hub on loopback that fails in every way a hub can.

mod data_sets;
mod names;
mod network;
#[cfg(unix)]
mod packages;
mod refusals;
mod snapshots;
mod stand_in;

use std::path::PathBuf;
use std::time::Duration;

use bevel_formats::hub::{self, HubConfig, Progress, RepoId, Token};
use stand_in::{COMMIT, StandIn, etag};
use tempfile::TempDir;

const REPO: &str = "owner/model";

/// A hub, an empty cache, and settings that are quick.
struct Fixture {
    hub: StandIn,
    home: TempDir,
    config: HubConfig,
}

/// Keeps what it hears.
#[derive(Default)]
struct Heard {
    starts: Vec<(String, Option<u64>, u64)>,
    advanced: u64,
    finished: usize,
    notes: Vec<String>,
}

impl Progress for Heard {
    fn start(&mut self, file: &str, total: Option<u64>, resumed: u64) {
        self.starts.push((file.to_owned(), total, resumed));
    }
    fn advance(&mut self, bytes: u64) {
        self.advanced += bytes;
    }
    fn finish(&mut self) {
        self.finished += 1;
    }
    fn note(&mut self, message: &str) {
        self.notes.push(message.to_owned());
    }
}

impl Fixture {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let hub = StandIn::new(REPO, files);
        let home = tempfile::tempdir().unwrap();
        let config = config(&hub.endpoint(), &home);
        Self { hub, home, config }
    }

    fn fetch(&self, name: &str) -> hub::Result<PathBuf> {
        hub::fetch(&self.config, &repo(name), &mut ())
    }

    /// The file that a fetch of `m.gguf` leaves half done.
    fn incomplete(&self, name: &str, bytes: &[u8]) -> PathBuf {
        self.root().join("blobs").join(format!("{}.incomplete", etag(name, bytes)))
    }

    fn root(&self) -> PathBuf {
        self.config.cache.join("models--owner--model")
    }

    fn snapshot(&self) -> PathBuf {
        self.root().join("snapshots").join(COMMIT)
    }

    #[track_caller]
    fn error(&self, name: &str) -> String {
        self.fetch(name).expect_err("this must fail").to_string()
    }
}

fn config(endpoint: &str, home: &TempDir) -> HubConfig {
    let home = home.path().to_str().unwrap().to_owned();
    let vars = [("HOME", home.as_str()), ("HF_ENDPOINT", endpoint)];
    let mut config = HubConfig::from_vars(|name| {
        vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    });
    config.token = Token::new("hf_secret");
    config.connect_timeout = Duration::from_secs(5);
    config.stall_timeout = Duration::from_secs(10);
    config.attempts = 3;
    config.backoff = Duration::from_millis(1);
    config
}

fn repo(name: &str) -> RepoId {
    name.parse().unwrap()
}

/// Bytes in which every position can be told from its neighbours.
fn weights(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

#[track_caller]
fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}
