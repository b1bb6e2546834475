//! Requests to the hub: redirects, refusals, and patience with a network that fails.

use std::fmt::Display;
use std::time::Duration;

use ureq::http::header::{AUTHORIZATION, CONTENT_RANGE, LOCATION, RANGE, RETRY_AFTER};
use ureq::http::{Response, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::repo::is_hex;
use super::select::Sibling;
use super::{Error, HubConfig, Progress, RepoId, Result};

pub(super) struct Client<'a> {
    config: &'a HubConfig,
    agent: Agent,
}

/// Why one attempt failed.
pub(super) enum Failure {
    /// Another attempt may help, not before `after`.
    Retry { why: String, after: Option<Duration> },
    /// None will.
    Fatal(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Fatal(error)
    }
}

impl Failure {
    pub(super) fn retry(why: impl Display) -> Self {
        Failure::Retry { why: why.to_string(), after: None }
    }
}

/// What the hub says of a file before its bytes.
pub(super) struct Head {
    pub(super) etag: String,
    pub(super) size: u64,
}

/// How far redirects are followed.
#[derive(Clone, Copy, PartialEq)]
enum Follow {
    /// To any host, without the token where the host changes.
    Anywhere,
    /// On the same host only: the answer before the redirect to storage carries the headers.
    SameHost,
}

const REDIRECTS: usize = 8;
/// The longest list of files that is read.
const INFO_LIMIT: u64 = 64 << 20;

impl<'a> Client<'a> {
    pub(super) fn new(config: &'a HubConfig) -> Result<Self> {
        let endpoint = || Error::Endpoint { endpoint: config.endpoint.clone() };
        let uri: Uri = config.endpoint.parse().map_err(|_| endpoint())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(endpoint());
        }
        // Reads are bounded one by one: a large file may take long as long as bytes keep coming.
        let settings = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("bevel/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .proxy(config.proxy.clone())
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .timeout_resolve(Some(config.connect_timeout))
            .timeout_connect(Some(config.connect_timeout))
            .timeout_per_read(Some(config.stall_timeout))
            .timeout_per_write(Some(config.stall_timeout))
            .build();
        Ok(Self { config, agent: settings.into() })
    }

    /// The commit that the repository's revision stands for, and its files.
    pub(super) fn info(
        &self,
        repo: &RepoId,
        attempts: u32,
        progress: &mut dyn Progress,
    ) -> Result<(String, Vec<Sibling>)> {
        let revision = percent_encode(repo.revision(), "");
        let url = format!(
            "{}/api/{}/{}/revision/{revision}?blobs=true",
            self.config.endpoint,
            repo.kind().plural(),
            repo.id()
        );
        let what = format!("{repo} at {}", self.config.endpoint);
        let mut patience = self.patience(&what, attempts);
        loop {
            let attempt = self.send("GET", &url, None, Follow::Anywhere).and_then(|response| {
                let mut response = self.accept(response, repo, None)?;
                let body = response.body_mut().with_config().limit(INFO_LIMIT).read_to_vec();
                body.map_err(Failure::retry)
            });
            match attempt {
                Ok(body) => return parse_info(&url, &body),
                Err(failure) => patience.wait(failure, false, progress)?,
            }
        }
    }

    /// A file's etag and size.
    pub(super) fn head(
        &self,
        repo: &RepoId,
        commit: &str,
        file: &str,
        progress: &mut dyn Progress,
    ) -> Result<Head> {
        let url = self.file_url(repo, commit, file);
        let mut patience = self.patience(file, self.config.attempts);
        loop {
            let attempt = self
                .send("HEAD", &url, None, Follow::SameHost)
                .and_then(|response| self.accept(response, repo, Some(file)));
            match attempt {
                Ok(response) => return parse_head(&url, &response),
                Err(failure) => patience.wait(failure, false, progress)?,
            }
        }
    }

    /// A file's bytes from `start` on: how many bytes the server skipped (all of `start`, or none
    /// where it ignores ranges), and the rest. `None` where it says that nothing is there.
    pub(super) fn get(
        &self,
        repo: &RepoId,
        commit: &str,
        file: &str,
        start: u64,
    ) -> Result<Option<(u64, Body)>, Failure> {
        let url = self.file_url(repo, commit, file);
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let response = self.send("GET", &url, range.as_deref(), Follow::Anywhere)?;
        if response.status() == 416 {
            return Ok(None);
        }
        let response = self.accept(response, repo, Some(file))?;
        if response.status() != 206 {
            return Ok(Some((0, response.into_body())));
        }
        let from: Option<u64> = header(&response, CONTENT_RANGE)
            .and_then(|value| value.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
        match from {
            Some(from) if from == start => Ok(Some((start, response.into_body()))),
            _ => Err(Failure::retry(format!("the server sent another range than from {start}"))),
        }
    }

    pub(super) fn patience(&self, what: &str, attempts: u32) -> Patience<'a> {
        Patience { config: self.config, what: what.to_owned(), attempts, failed: 0 }
    }

    /// Attempts in a row that may bring nothing.
    pub(super) fn attempts(&self) -> u32 {
        self.config.attempts
    }

    fn file_url(&self, repo: &RepoId, commit: &str, file: &str) -> String {
        let file = percent_encode(file, "/");
        format!("{}/{}/resolve/{commit}/{file}", self.config.endpoint, repo.page())
    }

    /// One request and the redirects it leads to. The token goes to the endpoint and nowhere else.
    fn send(
        &self,
        method: &str,
        url: &str,
        range: Option<&str>,
        follow: Follow,
    ) -> Result<Response<Body>, Failure> {
        let home = Origin::of(&self.config.endpoint);
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS {
            let origin = Origin::of(&url);
            let mut request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            };
            if let Some(token) = self.config.token.as_ref().filter(|_| origin == home) {
                request = request.header(AUTHORIZATION, format!("Bearer {}", token.secret()));
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let response = request.call().map_err(Failure::retry)?;
            let status = response.status();
            if status == 429 || status.is_server_error() {
                let seconds = header(&response, RETRY_AFTER).and_then(|text| text.parse().ok());
                let why = format!("the server answers {status}");
                return Err(Failure::Retry { why, after: seconds.map(Duration::from_secs) });
            }
            let location = header(&response, LOCATION).filter(|_| status.is_redirection());
            let Some(next) = location.map(|location| join(&url, location)) else {
                return Ok(response);
            };
            if follow == Follow::SameHost && Origin::of(&next) != origin {
                return Ok(response);
            }
            url = next;
        }
        let why = format!("more than {REDIRECTS} redirects");
        Err(Failure::Fatal(Error::Reply { url, why }))
    }

    /// Turns refusals into errors that say what to do.
    fn accept(
        &self,
        response: Response<Body>,
        repo: &RepoId,
        file: Option<&str>,
    ) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let page = format!("{}/{}", self.config.endpoint, repo.page());
        let noun = repo.kind().noun();
        let repo = repo.id().to_owned();
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
        let who = match self.config.token {
            Some(_) => "the account of your token",
            None => "visitors without a token",
        };
        Err(Failure::Fatal(match (status.as_u16(), code) {
            (403, _) | (401, Some("GatedRepo")) => Error::Gated { repo, who, page },
            (401, _) => Error::Unauthorized { repo, who, page },
            (404, Some("RevisionNotFound")) => {
                Error::NotFound { what: format!("such revision of `{repo}`"), page }
            }
            (404, _) => {
                let what =
                    file.map_or(format!("{noun} `{repo}`"), |f| format!("`{f}` in `{repo}`"));
                Error::NotFound { what, page }
            }
            _ => Error::Reply { url: page, why: format!("status {status}") },
        }))
    }
}

/// Counts attempts that brought nothing, and waits between them.
pub(super) struct Patience<'a> {
    config: &'a HubConfig,
    what: String,
    attempts: u32,
    failed: u32,
}

impl Patience<'_> {
    /// Sleeps before the next attempt; the error where there is to be none. An attempt that brought
    /// something makes up for those before it.
    pub(super) fn wait(
        &mut self,
        failure: Failure,
        brought_something: bool,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let (why, after) = match failure {
            Failure::Retry { why, after } => (why, after),
            Failure::Fatal(error) => return Err(error),
        };
        self.failed = if brought_something { 0 } else { self.failed + 1 };
        if self.failed >= self.attempts {
            let what = self.what.clone();
            return Err(Error::Unreachable { what, why, attempts: self.failed });
        }
        let doubled =
            self.config.backoff.saturating_mul(1 << self.failed.saturating_sub(1).min(16));
        let wait = doubled.max(after.unwrap_or_default()).min(self.config.longest_wait);
        let seconds = wait.as_secs_f32();
        progress.note(&format!("`{}`: {why}; trying again in {seconds:.1} s.", self.what));
        std::thread::sleep(wait);
        Ok(())
    }
}

/// Scheme, host and port: what a token is meant for.
#[derive(PartialEq)]
struct Origin(Option<(String, String, u16)>);

impl Origin {
    fn of(url: &str) -> Self {
        let parse = || {
            let uri: Uri = url.parse().ok()?;
            let scheme = uri.scheme_str()?.to_ascii_lowercase();
            let default = if scheme == "https" { 443 } else { 80 };
            let host = uri.host()?.to_ascii_lowercase();
            Some((scheme, host, uri.port_u16().unwrap_or(default)))
        };
        Self(parse())
    }
}

fn header(response: &Response<Body>, name: ureq::http::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

/// The address that a `Location` means on the page `url`.
fn join(url: &str, location: &str) -> String {
    if location.contains("://") {
        return location.to_owned();
    }
    let (scheme, rest) = url.split_once("://").unwrap_or(("https", url));
    if location.starts_with("//") {
        return format!("{scheme}:{location}");
    }
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if location.starts_with('/') {
        return format!("{scheme}://{host}{location}");
    }
    let path = path.split('?').next().unwrap_or_default();
    match path.rsplit_once('/') {
        Some((directory, _)) => format!("{scheme}://{host}/{directory}/{location}"),
        None => format!("{scheme}://{host}/{location}"),
    }
}

/// Escapes all but unreserved characters and those in `keep`.
fn percent_encode(text: &str, keep: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-_.~".contains(c) || (c.is_ascii() && keep.contains(c)) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn parse_info(url: &str, body: &[u8]) -> Result<(String, Vec<Sibling>)> {
    #[derive(serde::Deserialize)]
    struct Info {
        sha: String,
        siblings: Vec<File>,
    }
    #[derive(serde::Deserialize)]
    struct File {
        rfilename: String,
        size: Option<u64>,
    }
    let reply = |why: String| Error::Reply { url: url.to_owned(), why };
    let info: Info = serde_json::from_slice(body).map_err(|error| reply(error.to_string()))?;
    if !is_hex(&info.sha, 40) {
        return Err(reply(format!("`{}` is no commit", info.sha)));
    }
    let sibling = |file: File| Sibling { path: file.rfilename, size: file.size };
    Ok((info.sha, info.siblings.into_iter().map(sibling).collect()))
}

fn parse_head(url: &str, response: &Response<Body>) -> Result<Head> {
    let reply = |why: String| Error::Reply { url: url.to_owned(), why };
    let field = |linked: &str, plain: &str| {
        let headers = response.headers();
        headers.get(linked).or_else(|| headers.get(plain)).and_then(|value| value.to_str().ok())
    };
    let etag = field("x-linked-etag", "etag").ok_or_else(|| reply("no etag".to_owned()))?;
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
    let is_safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if etag.is_empty() || etag.len() > 128 || etag.starts_with('.') || !etag.chars().all(is_safe) {
        return Err(reply(format!("`{etag}` is no usable etag")));
    }
    // A redirect's own length is not the file's.
    let plain = if response.status().is_redirection() { "x-linked-size" } else { "content-length" };
    let size = field("x-linked-size", plain).and_then(|text| text.parse().ok());
    let size = size.ok_or_else(|| reply("no file size".to_owned()))?;
    Ok(Head { etag, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_joined_as_browsers_do() {
        let page = "https://hub.test:8443/owner/name/resolve/main/a.bin?x=1";
        for (location, expected) in [
            ("https://other.test/a", "https://other.test/a"),
            ("//other.test/a", "https://other.test/a"),
            ("/new/a.bin?y=2", "https://hub.test:8443/new/a.bin?y=2"),
            ("b.bin", "https://hub.test:8443/owner/name/resolve/main/b.bin"),
        ] {
            assert_eq!(join(page, location), expected);
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a, b| Origin::of(a) == Origin::of(b);
        assert!(same("https://hub.test/a", "https://HUB.test:443/b"));
        assert!(!same("https://hub.test/a", "http://hub.test/a"));
        assert!(!same("https://hub.test/a", "https://hub.test:444/a"));
        assert!(!same("https://hub.test/a", "https://hub.test.evil.test/a"));
        assert!(!same("https://hub.test/a", "https://hub.test@evil.test/a"));
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(percent_encode("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(percent_encode("dir/a b?é.gguf", "/"), "dir/a%20b%3F%C3%A9.gguf");
    }
}
