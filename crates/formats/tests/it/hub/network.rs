//! Connections that break, lie, stall and lead elsewhere.

use std::time::{Duration, Instant};

use super::stand_in::Fault;
use super::*;

/// Fetches `m.gguf` while its downloads meet these faults; the file must come out right.
#[track_caller]
fn check(faults: Vec<Fault>) -> (Fixture, Heard) {
    check_with(Duration::from_secs(10), faults)
}

#[track_caller]
fn check_with(stall_timeout: Duration, faults: Vec<Fault>) -> (Fixture, Heard) {
    let bytes = weights(300_000);
    let mut fixture = Fixture::new(&[("m.gguf", &bytes)]);
    fixture.config.stall_timeout = stall_timeout;
    fixture.hub.fault("GET m.gguf", faults);
    let mut heard = Heard::default();
    let path = hub::fetch(&fixture.config, &repo(REPO), &mut heard).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    assert!(!fixture.incomplete("m.gguf", &bytes).exists());
    (fixture, heard)
}

#[track_caller]
fn ranges(fixture: &Fixture) -> Vec<Option<String>> {
    fixture.hub.requests("GET", "m.gguf").into_iter().map(|request| request.range).collect()
}

#[test]
fn a_clean_download() {
    let (fixture, heard) = check(vec![]);
    assert_eq!(ranges(&fixture), [None]);
    assert_eq!(heard.starts, [("m.gguf".to_owned(), Some(300_000), 0)]);
    assert_eq!((heard.advanced, heard.finished), (300_000, 1));
    assert!(heard.notes.is_empty());
}

#[test]
fn dropped_connections_continue_where_they_stopped() {
    // More drops than attempts: each brings something, so none counts against the limit.
    let (fixture, heard) = check(vec![
        Fault::DropAfter(100_000),
        Fault::DropAfter(50_000),
        Fault::DropAfter(50_000),
        Fault::DropAfter(50_000),
        Fault::DropAfter(1_000),
    ]);
    let starts = [100_000, 150_000, 200_000, 250_000, 251_000];
    let continued = starts.map(|start| Some(format!("bytes={start}-")));
    assert_eq!(ranges(&fixture)[1..], continued);
    assert_eq!(heard.advanced, 300_000);
    assert_eq!(heard.notes.len(), 5);
}

#[test]
fn drops_that_bring_nothing_are_bounded_and_leave_the_bytes() {
    let bytes = weights(300_000);
    let mut fixture = Fixture::new(&[("m.gguf", &bytes)]);
    let nothing = vec![Fault::DropAfter(0); 3];
    fixture.hub.fault("GET m.gguf", [vec![Fault::DropAfter(120_000)], nothing].concat());
    assert_contains(&fixture.error(REPO), &["`m.gguf`", "120000 of 300000", "continues where it"]);
    let partial = fixture.incomplete("m.gguf", &bytes);
    assert_eq!(std::fs::read(&partial).unwrap(), bytes[..120_000]);
    assert!(!fixture.root().join("refs").exists());

    // A second run asks only for the rest, and still checks the whole.
    fixture.config.attempts = 1;
    let mut heard = Heard::default();
    let path = hub::fetch(&fixture.config, &repo(REPO), &mut heard).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    assert_eq!(heard.starts, [("m.gguf".to_owned(), Some(300_000), 120_000)]);
    assert_eq!(heard.advanced, 180_000);
    assert_eq!(ranges(&fixture).last().unwrap().as_deref(), Some("bytes=120000-"));
}

#[test]
fn a_server_that_ignores_ranges_starts_again() {
    let (fixture, heard) = check(vec![Fault::DropAfter(100_000), Fault::IgnoreRange]);
    assert_eq!(ranges(&fixture).len(), 2);
    assert_eq!(heard.starts.len(), 2);
    assert_eq!(heard.starts[1].2, 0);
}

#[test]
fn a_server_that_ignores_ranges_and_drops_is_given_up() {
    let bytes = weights(300_000);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    // Bytes come each time, and never further than before.
    fixture.hub.fault("GET m.gguf", vec![Fault::IgnoreRangeAndDropAfter(100_000); 9]);
    assert_contains(&fixture.error(REPO), &["100000 of 300000", "brought nothing: 3"]);
    assert_eq!(ranges(&fixture).len(), 4);
}

#[test]
fn a_range_from_elsewhere_is_not_written() {
    let (fixture, heard) = check(vec![Fault::DropAfter(100_000), Fault::WrongRange]);
    let again = Some("bytes=100000-".to_owned());
    assert_eq!(ranges(&fixture), [None, again.clone(), again]);
    assert_contains(&heard.notes[1], &["another range"]);
}

#[test]
fn wrong_bytes_are_fetched_once_more() {
    let (fixture, heard) = check(vec![Fault::WrongByte]);
    assert_eq!(ranges(&fixture), [None, None]);
    assert_contains(&heard.notes[0], &["sha256", "expected", "again"]);
}

#[test]
fn wrong_bytes_twice_are_an_error_and_leave_nothing() {
    let bytes = weights(300_000);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    fixture.hub.fault("GET m.gguf", vec![Fault::WrongByte; 2]);
    assert_contains(&fixture.error(REPO), &["`m.gguf`", "wrong twice", "sha256", "deleted"]);
    assert!(!fixture.incomplete("m.gguf", &bytes).exists());
    assert!(!fixture.snapshot().join("m.gguf").exists());
}

#[test]
fn a_small_file_is_checked_by_its_git_hash() {
    let bytes = weights(100);
    let files: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", &bytes)];
    let fixture = Fixture::new(&files);
    fixture.hub.fault("GET config.json", vec![Fault::WrongByte; 2]);
    assert_contains(&fixture.error(REPO), &["`config.json`", "git blob hash"]);
}

#[test]
fn a_resumed_file_with_foreign_bytes_is_fetched_whole() {
    let bytes = weights(300_000);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    let partial = fixture.incomplete("m.gguf", &bytes);
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    for foreign in [vec![7; 1000], vec![7; 300_000], vec![7; 300_001]] {
        std::fs::write(&partial, foreign).unwrap();
        let path = fixture.fetch(REPO).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        std::fs::remove_dir_all(fixture.root().join("snapshots")).unwrap();
        std::fs::remove_file(fixture.root().join("blobs").join(etag("m.gguf", &bytes))).unwrap();
    }
}

#[test]
fn a_lying_length_is_wrong_or_continued() {
    check(vec![Fault::Longer(5)]);
    check(vec![Fault::Shorter(1000)]);
    let fixture = Fixture::new(&[("m.gguf", &weights(5000))]);
    fixture.hub.fault("GET m.gguf", vec![Fault::Longer(5); 2]);
    assert_contains(&fixture.error(REPO), &["more than the 5000 bytes"]);
}

#[test]
fn a_stalled_connection_is_dropped_and_continued() {
    let begin = Instant::now();
    let stall = Duration::from_millis(500);
    let (fixture, _) = check_with(stall, vec![Fault::StallAfter(100_000)]);
    assert_eq!(ranges(&fixture)[1].as_deref(), Some("bytes=100000-"));
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_slow_connection_is_not_a_stalled_one() {
    // Slower in all than the stall timeout, never silent that long.
    let begin = Instant::now();
    let pause = Duration::from_millis(100);
    let (fixture, _) = check_with(pause * 5, vec![Fault::Trickle(50_000, pause)]);
    assert_eq!(ranges(&fixture), [None]);
    assert!(begin.elapsed() > fixture.config.stall_timeout);
}

#[test]
fn servers_in_trouble_are_asked_again() {
    let bytes = weights(10);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    fixture.hub.fault("GET ?blobs=true", [Fault::Status(500, ""), Fault::DropAfter(10)]);
    fixture.hub.fault("HEAD m.gguf", [Fault::Status(502, ""), Fault::Status(504, "")]);
    fixture.hub.fault("GET m.gguf", [Fault::Status(503, "")]);
    let path = fixture.fetch(REPO).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
}

#[test]
fn too_many_requests_waits_as_long_as_it_is_told() {
    let begin = Instant::now();
    let (_, heard) = check(vec![Fault::Status(429, "Retry-After: 1\r\n")]);
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_contains(&heard.notes[0], &["429", "1.0 s"]);
}

#[test]
fn a_wait_is_bounded() {
    let mut fixture = Fixture::new(&[("m.gguf", &weights(10))]);
    fixture.config.longest_wait = Duration::from_millis(10);
    fixture.hub.fault("GET m.gguf", [Fault::Status(429, "Retry-After: 3600\r\n")]);
    fixture.fetch(REPO).unwrap();
}

#[test]
fn the_token_goes_to_the_endpoint_and_to_no_other_host() {
    let bytes = weights(5000);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    let storage = StandIn::new(REPO, &[("m.gguf", &bytes)]);
    // First a redirect inside the hub, as for a renamed repository, then one to storage.
    let away = Fault::Redirect(storage.address);
    fixture.hub.fault("HEAD m.gguf", [Fault::Redirect(fixture.hub.address), away.clone()]);
    fixture.hub.fault("GET m.gguf", [away]);
    storage.fault("GET m.gguf", [Fault::DropAfter(2000)]);
    fixture.hub.fault("GET m.gguf", [Fault::Redirect(storage.address)]);
    let path = fixture.fetch(REPO).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);

    let bearer = Some("Bearer hf_secret".to_owned());
    let asked = [("GET", "?blobs=true"), ("HEAD", "m.gguf"), ("GET", "m.gguf")];
    for (method, suffix) in asked {
        let requests = fixture.hub.requests(method, suffix);
        assert!(!requests.is_empty() && requests.iter().all(|r| r.authorization == bearer));
    }
    assert_eq!(fixture.hub.requests("HEAD", "m.gguf").len(), 2);
    // The HEAD was answered by the hub's own headers, the range went along with the redirect.
    assert!(storage.requests("HEAD", "").is_empty());
    let stored = storage.requests("GET", "m.gguf");
    assert_eq!(
        stored.iter().map(|r| r.range.as_deref()).collect::<Vec<_>>(),
        [None, Some("bytes=2000-")]
    );
    assert!(stored.iter().all(|request| request.authorization.is_none()));
}

#[test]
fn redirects_in_a_circle_end() {
    let fixture = Fixture::new(&[("m.gguf", &weights(10))]);
    let here = Fault::Redirect(fixture.hub.address);
    fixture.hub.fault("HEAD m.gguf", vec![here; 20]);
    assert_contains(&fixture.error(REPO), &["redirects"]);
    assert!(fixture.hub.count() < 12);
}

#[test]
fn fetches_at_the_same_time_download_once() {
    let bytes = weights(300_000);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    fixture.hub.fault("GET m.gguf", [Fault::Trickle(50_000, Duration::from_millis(50))]);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| fixture.fetch(REPO))).collect();
        for run in runs {
            assert_eq!(std::fs::read(run.join().unwrap().unwrap()).unwrap(), bytes);
        }
    });
    assert_eq!(ranges(&fixture), [None]);
}

#[test]
fn a_proxy_is_used() {
    let proxy = StandIn::new(REPO, &[]);
    let home = tempfile::tempdir().unwrap();
    let mut config = config("http://hub.invalid", &home);
    config.proxy = Some(ureq::Proxy::new(&proxy.endpoint()).unwrap());
    config.attempts = 1;
    assert!(hub::fetch(&config, &repo(REPO), &mut ()).is_err());
    assert_eq!(proxy.count(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_sentence() {
    let bytes = weights(300_000);
    let fixture = Fixture::new(&[("m.gguf", &bytes)]);
    let partial = fixture.incomplete("m.gguf", &bytes);
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    assert_contains(&fixture.error(REPO), &["no space left", "300000 bytes", "HF_HUB_CACHE"]);
}
