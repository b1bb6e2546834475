//! A hub on loopback that misbehaves on request.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with one answer.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The connection is closed after this many bytes of the body.
    DropAfter(usize),
    /// One bit of the body is flipped.
    WrongByte,
    /// The range is ignored and the whole file sent with status 200.
    IgnoreRange,
    /// Both of the above.
    IgnoreRangeAndDropAfter(usize),
    /// The range is answered from another position.
    WrongRange,
    /// This status with these header lines instead of the file.
    Status(u16, &'static str),
    /// A redirect to the same path on this address.
    Redirect(SocketAddr),
    /// The body stops after this many bytes and the connection stays open.
    StallAfter(usize),
    /// The body comes in pieces of this many bytes with a wait between them.
    Trickle(usize, Duration),
    /// The announced length and the body are this many bytes longer.
    Longer(usize),
    /// The announced length is right for a body cut to this many bytes.
    Shorter(usize),
    /// This body instead.
    Body(&'static str),
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) range: Option<String>,
    pub(super) authorization: Option<String>,
}

struct Shared {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Faults by `METHOD path-suffix`: each is used up by one request.
    faults: Mutex<Vec<(String, VecDeque<Fault>)>>,
    log: Mutex<Vec<Request>>,
    commit: Mutex<String>,
    stop: AtomicBool,
    /// `owner/name`.
    repo: &'static str,
}

pub(super) struct StandIn {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
}

impl StandIn {
    /// A hub with one repository.
    pub(super) fn new(repo: &'static str, files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        let shared = Arc::new(Shared {
            files: Mutex::new(files.collect()),
            faults: Mutex::default(),
            log: Mutex::default(),
            commit: Mutex::new(COMMIT.to_owned()),
            stop: AtomicBool::new(false),
            repo,
        });
        let served = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if served.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&served);
                std::thread::spawn(move || {
                    // A client that goes away early is part of the tests.
                    let _ = shared.serve(stream.unwrap());
                });
            }
        });
        Self { address, shared }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next requests of this method whose path ends so meet these faults, one each.
    pub(super) fn fault(&self, request: &str, faults: impl IntoIterator<Item = Fault>) {
        let faults = faults.into_iter().collect();
        self.shared.faults.lock().unwrap().push((request.to_owned(), faults));
    }

    /// All requests of this method whose path ends so.
    pub(super) fn requests(&self, method: &str, suffix: &str) -> Vec<Request> {
        let log = self.shared.log.lock().unwrap();
        let is_it = |r: &&Request| r.method == method && r.path.ends_with(suffix);
        log.iter().filter(is_it).cloned().collect()
    }

    pub(super) fn count(&self) -> usize {
        self.shared.log.lock().unwrap().len()
    }

    /// A push to the repository: `main` becomes another commit with these files.
    pub(super) fn push(&self, commit: &str, files: &[(&str, &[u8])]) {
        *self.shared.commit.lock().unwrap() = commit.to_owned();
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        *self.shared.files.lock().unwrap() = files.collect();
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::to_owned);
        let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
        let mut request = Request { method, path, range: None, authorization: None };
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            let value = Some(value.trim().to_owned());
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = value,
                "authorization" => request.authorization = value,
                _ => {}
            }
        }
        self.log.lock().unwrap().push(request.clone());
        self.answer(stream, &request)
    }

    fn next_fault(&self, request: &Request) -> Option<Fault> {
        let line = format!("{} {}", request.method, request.path);
        let mut faults = self.faults.lock().unwrap();
        let is_it = |(key, left): &&mut (String, VecDeque<Fault>)| {
            let (method, suffix) = key.split_once(' ').unwrap();
            !left.is_empty() && line.starts_with(method) && line.ends_with(suffix)
        };
        faults.iter_mut().find(is_it)?.1.pop_front()
    }

    fn answer(&self, mut out: TcpStream, request: &Request) -> std::io::Result<()> {
        let fault = self.next_fault(request);
        match &fault {
            Some(Fault::Status(status, headers)) => {
                return write!(
                    out,
                    "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n{headers}\r\n"
                );
            }
            Some(Fault::Redirect(to)) => {
                let location = format!("http://{to}{}", request.path);
                let linked = self.file_headers(&request.path).unwrap_or_default();
                return write!(
                    out,
                    "HTTP/1.1 302 Found\r\nLocation: {location}\r\n{linked}Content-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
            _ => {}
        }
        let of_kind =
            |kind| request.path.starts_with(&format!("/api/{kind}/{}/revision/", self.repo));
        if of_kind("models") || of_kind("datasets") {
            let body = match &fault {
                Some(Fault::Body(body)) => (*body).to_owned(),
                _ => self.info(),
            };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", body.len());
            return send(&mut out, &head, body.as_bytes(), fault.as_ref());
        }
        let (Some(mut body), Some(headers)) =
            (self.file(&request.path), self.file_headers(&request.path))
        else {
            return write!(
                out,
                "HTTP/1.1 404 Not Found\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        };
        if request.method == "HEAD" {
            let len = body.len();
            return write!(
                out,
                "HTTP/1.1 200 OK\r\n{headers}Content-Length: {len}\r\nConnection: close\r\n\r\n"
            );
        }
        let total = body.len();
        let mut status = "200 OK".to_owned();
        let ignored = matches!(fault, Some(Fault::IgnoreRange | Fault::IgnoreRangeAndDropAfter(_)));
        let range = request.range.as_ref().filter(|_| !ignored);
        if let Some(range) = range {
            let start = range.trim_start_matches("bytes=").trim_end_matches('-');
            let mut start: usize = start.parse().unwrap();
            if start >= total {
                return write!(
                    out,
                    "HTTP/1.1 416 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
            if matches!(fault, Some(Fault::WrongRange)) {
                start -= 1;
            }
            body.drain(..start);
            status = format!("206 X\r\nContent-Range: bytes {start}-{}/{total}", total - 1);
        }
        match &fault {
            Some(Fault::WrongByte) => body[0] ^= 1,
            Some(Fault::Longer(n)) => body.extend(vec![0; *n]),
            Some(Fault::Shorter(n)) => body.truncate(*n),
            _ => {}
        }
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
        send(&mut out, &head, &body, fault.as_ref())
    }

    fn info(&self) -> String {
        let files = self.files.lock().unwrap();
        let sibling = |(name, bytes): (&String, &Vec<u8>)| serde_json::json!({ "rfilename": name, "size": bytes.len() });
        let siblings: Vec<_> = files.iter().map(sibling).collect();
        serde_json::json!({
            "id": self.repo,
            "sha": *self.commit.lock().unwrap(),
            "siblings": siblings,
        })
        .to_string()
    }

    fn name(&self, path: &str) -> Option<String> {
        let path = path.strip_prefix("/datasets").unwrap_or(path);
        let rest = path.strip_prefix(&format!("/{}/resolve/", self.repo))?;
        Some(rest.split_once('/')?.1.to_owned())
    }

    fn file(&self, path: &str) -> Option<Vec<u8>> {
        self.files.lock().unwrap().get(&self.name(path)?).cloned()
    }

    /// As the hub does: large files (here the weights) are linked and named by their sha256.
    fn file_headers(&self, path: &str) -> Option<String> {
        let bytes = self.file(path)?;
        let etag = etag(&self.name(path)?, &bytes);
        let commit = self.commit.lock().unwrap();
        Some(match etag.len() {
            64 => format!(
                "X-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nETag: \"storage\"\r\n",
                bytes.len()
            ),
            _ => format!("X-Repo-Commit: {commit}\r\nETag: W/\"{etag}\"\r\n"),
        })
    }
}

/// The name of a file's blob.
pub(super) fn etag(name: &str, bytes: &[u8]) -> String {
    let hex = |digest: &[u8]| digest.iter().map(|b| format!("{b:02x}")).collect::<String>();
    if name.ends_with(".safetensors") || name.ends_with(".gguf") {
        return hex(&Sha256::digest(bytes));
    }
    let mut blob = format!("blob {}\0", bytes.len()).into_bytes();
    blob.extend(bytes);
    hex(&Sha1::digest(&blob))
}

fn send(
    out: &mut TcpStream,
    head: &str,
    body: &[u8],
    fault: Option<&Fault>,
) -> std::io::Result<()> {
    write!(out, "{head}Connection: close\r\n\r\n")?;
    match fault {
        Some(Fault::DropAfter(n) | Fault::IgnoreRangeAndDropAfter(n)) => {
            out.write_all(&body[..*n.min(&body.len())])
        }
        Some(Fault::StallAfter(n)) => {
            out.write_all(&body[..*n.min(&body.len())])?;
            out.flush()?;
            // Longer than the client of the tests waits.
            std::thread::sleep(Duration::from_secs(20));
            Ok(())
        }
        Some(Fault::Trickle(n, wait)) => body.chunks(*n).try_for_each(|piece| {
            std::thread::sleep(*wait);
            out.write_all(piece)?;
            out.flush()
        }),
        _ => out.write_all(body),
    }
}
