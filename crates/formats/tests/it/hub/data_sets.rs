//! Data sets: their own addresses and cache, and otherwise what models get.

use super::*;

const ROWS: &[u8] = b"{\"text\": \"one\"}\n";

fn data_set() -> Fixture {
    Fixture::new(&[
        ("README.md", b"not fetched"),
        ("data/train-00000.jsonl", ROWS),
        ("data/train-00001.jsonl", b"{\"text\": \"two\"}\n"),
        ("data/test-00000.jsonl", b"not fetched"),
    ])
}

fn fetch(fixture: &Fixture, name: &str) -> hub::Result<Vec<PathBuf>> {
    hub::fetch_data_set(&fixture.config, &repo(name), hub::ENOUGH, &mut ())
}

#[test]
fn a_split_is_laid_out_as_the_standard_cache() {
    let mut fixture = data_set();
    let root = fixture.config.cache.join("datasets--owner--model");
    let snapshot = root.join("snapshots").join(COMMIT);
    let files = fetch(&fixture, REPO).unwrap();
    let names = ["data/train-00000.jsonl", "data/train-00001.jsonl"];
    assert_eq!(files, names.map(|name| snapshot.join(name)));
    assert_eq!(std::fs::read(&files[0]).unwrap(), ROWS);
    assert!(!snapshot.join("data/test-00000.jsonl").exists());
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert!(!fixture.root().exists(), "nothing lies among the models");

    let requests = fixture.hub.requests("GET", "?blobs=true");
    assert!(requests[0].path.starts_with("/api/datasets/owner/model/revision/main"));
    let requests = fixture.hub.requests("GET", "train-00000.jsonl");
    let path = format!("/datasets/owner/model/resolve/{COMMIT}/data/train-00000.jsonl");
    assert_eq!(requests[0].path, path);
    assert_eq!(requests[0].authorization.as_deref(), Some("Bearer hf_secret"));

    // Again: one question about the commit. Offline: none.
    let before = fixture.hub.count();
    assert_eq!(fetch(&fixture, REPO).unwrap(), files);
    assert_eq!(fixture.hub.count(), before + 1);
    fixture.config.offline = true;
    assert_eq!(fetch(&fixture, REPO).unwrap(), files);
    assert_eq!(fixture.hub.count(), before + 1);
    let error = fetch(&fixture, "owner/model:test").unwrap_err().to_string();
    assert_contains(&error, &["owner/model:test", "not in the cache"]);
}

#[test]
fn other_splits_and_single_files() {
    let fixture = data_set();
    let names = |files: Vec<PathBuf>| -> Vec<String> {
        files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(fetch(&fixture, "owner/model:test").unwrap()), ["test-00000.jsonl"]);
    let one = fetch(&fixture, "owner/model:data/train-00001.jsonl").unwrap();
    assert_eq!(names(one), ["train-00001.jsonl"]);
    let error = fetch(&fixture, "owner/model:dev").unwrap_err().to_string();
    assert_contains(&error, &["no file that `dev` names", "data/test-00000.jsonl"]);
}

#[test]
fn interrupted_files_are_continued() {
    let fixture = data_set();
    fixture.hub.fault("GET train-00000.jsonl", [stand_in::Fault::DropAfter(5)]);
    let files = fetch(&fixture, REPO).unwrap();
    assert_eq!(std::fs::read(&files[0]).unwrap(), ROWS);
    let ranges = fixture.hub.requests("GET", "train-00000.jsonl");
    assert_eq!(ranges[1].range.as_deref(), Some("bytes=5-"));
}

#[test]
fn without_a_hub_the_cache_serves() {
    let mut fixture = data_set();
    let files = fetch(&fixture, REPO).unwrap();
    fixture.config.endpoint = "http://127.0.0.1:9".to_owned();
    let mut heard = Heard::default();
    let again = hub::fetch_data_set(&fixture.config, &repo(REPO), hub::ENOUGH, &mut heard).unwrap();
    assert_eq!(again, files);
    assert_contains(&heard.notes.concat(), &["cannot be reached", "the cache"]);
}

#[test]
fn what_is_no_data_set_is_said() {
    let fixture = Fixture::new(&[("README.md", b""), ("load.py", b"")]);
    let error = fetch(&fixture, REPO).unwrap_err().to_string();
    assert_contains(&error, &["owner/model", "no .parquet", "2 files", "refs/convert/parquet"]);
    let hostile = Fixture::new(&[("../../train.jsonl", ROWS)]);
    assert_contains(&fetch(&hostile, REPO).unwrap_err().to_string(), &["leads out of the cache"]);
    fixture.hub.fault("GET ?blobs=true", [stand_in::Fault::Status(404, "")]);
    let error = fetch(&fixture, REPO).unwrap_err().to_string();
    assert_contains(&error, &["data set `owner/model`", "/datasets/owner/model"]);
}
