//! What lies in the cache afterwards, and what the cache gives without a hub.

use super::*;

const CONFIG: &[u8] = br#"{"model_type":"llama"}"#;
const INDEX: &[u8] = br#"{"metadata":{},"weight_map":{
    "a":"model-00001-of-00002.safetensors",
    "b":"model-00002-of-00002.safetensors",
    "c":"model-00002-of-00002.safetensors"}}"#;

fn sharded() -> Fixture {
    Fixture::new(&[
        ("config.json", CONFIG),
        ("tokenizer.json", b"{}"),
        ("README.md", b"not fetched"),
        ("pytorch_model.bin", b"not fetched"),
        ("consolidated.safetensors", b"not fetched"),
        ("model.safetensors.index.json", INDEX),
        ("model-00001-of-00002.safetensors", b"first"),
        ("model-00002-of-00002.safetensors", b"second"),
    ])
}

#[test]
fn a_directory_is_laid_out_as_the_standard_cache() {
    let fixture = sharded();
    let snapshot = fixture.fetch(REPO).unwrap();
    assert_eq!(snapshot, fixture.snapshot());
    let mut names: Vec<_> =
        std::fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
    );
    let head = std::fs::read_to_string(fixture.root().join("refs/main")).unwrap();
    assert_eq!(head, COMMIT);
    let blob = etag("config.json", CONFIG);
    assert_eq!(std::fs::read(fixture.root().join("blobs").join(&blob)).unwrap(), CONFIG);
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(snapshot.join("config.json")).unwrap(),
        PathBuf::from(format!("../../blobs/{blob}"))
    );
    let left = |name: &std::fs::DirEntry| name.path().to_string_lossy().contains("incomplete");
    assert!(!std::fs::read_dir(fixture.root().join("blobs")).unwrap().flatten().any(|e| left(&e)));

    // Again: one question about the commit, and nothing else.
    let before = fixture.hub.count();
    assert_eq!(fixture.fetch(REPO).unwrap(), snapshot);
    assert_eq!(fixture.hub.count(), before + 1);
}

#[test]
fn files_in_directories_link_up_far_enough() {
    let fixture = Fixture::new(&[("q8/m-Q8_0.gguf", b"deep"), ("q4/m-Q4_0.gguf", b"other")]);
    let path = fixture.fetch("owner/model:Q8_0").unwrap();
    assert_eq!(path, fixture.snapshot().join("q8/m-Q8_0.gguf"));
    assert_eq!(std::fs::read(path).unwrap(), b"deep");
}

#[test]
fn a_split_gguf_comes_whole() {
    let fixture = Fixture::new(&[
        ("m-Q8_0-00002-of-00002.gguf", b"two"),
        ("m-Q8_0-00001-of-00002.gguf", b"one"),
        ("m-Q4_0-00001-of-00002.gguf", b"its second part is not there"),
    ]);
    let path = fixture.fetch("owner/model:Q8_0").unwrap();
    assert_eq!(path, fixture.snapshot().join("m-Q8_0-00001-of-00002.gguf"));
    assert_eq!(std::fs::read(path.with_file_name("m-Q8_0-00002-of-00002.gguf")).unwrap(), b"two");
    assert_contains(&fixture.error("owner/model:Q4_0"), &["all 2 parts"]);
}

#[test]
fn without_links_files_are_moved_or_copied() {
    let mut fixture = sharded();
    fixture.config.symlinks = false;
    let snapshot = fixture.fetch(REPO).unwrap();
    let config = snapshot.join("config.json");
    assert!(std::fs::symlink_metadata(&config).unwrap().is_file());
    assert_eq!(std::fs::read(&config).unwrap(), CONFIG);
    assert!(!fixture.root().join("blobs").join(etag("config.json", CONFIG)).exists());

    // A blob that was here before may serve another snapshot: it stays.
    let blob = fixture.root().join("blobs").join(etag("tokenizer.json", b"{}"));
    std::fs::write(&blob, b"{}").unwrap();
    std::fs::remove_file(snapshot.join("tokenizer.json")).unwrap();
    fixture.fetch(REPO).unwrap();
    assert_eq!(std::fs::read(snapshot.join("tokenizer.json")).unwrap(), b"{}");
    assert!(blob.exists());
}

#[test]
fn a_lost_blob_is_fetched_again() {
    let fixture = sharded();
    let snapshot = fixture.fetch(REPO).unwrap();
    let first = "model-00001-of-00002.safetensors";
    std::fs::remove_file(fixture.root().join("blobs").join(etag(first, b"first"))).unwrap();
    fixture.fetch(REPO).unwrap();
    assert_eq!(std::fs::read(snapshot.join(first)).unwrap(), b"first");
}

#[test]
fn offline_asks_nobody_and_says_what_is_missing() {
    let mut fixture = sharded();
    fixture.config.offline = true;
    let nothing = ["`owner/model`", "the model is not in the cache", "HF_HUB_OFFLINE"];
    assert_contains(&fixture.error(REPO), &nothing);
    fixture.config.offline = false;
    let snapshot = fixture.fetch(REPO).unwrap();
    let asked = fixture.hub.count();

    fixture.config.offline = true;
    assert_eq!(fixture.fetch(REPO).unwrap(), snapshot);
    assert_eq!(fixture.fetch(&format!("{REPO}@{COMMIT}")).unwrap(), snapshot);
    assert_contains(&fixture.error("owner/model@v2"), &["`owner/model@v2`"]);
    assert_contains(&fixture.error("owner/model:Q4_0"), &["Q4_0 is not in the cache"]);
    std::fs::remove_file(snapshot.join("model-00002-of-00002.safetensors")).unwrap();
    assert_contains(
        &fixture.error(REPO),
        &["model-00002-of-00002.safetensors is not in the cache"],
    );
    assert_eq!(fixture.hub.count(), asked);
}

#[test]
fn a_commit_in_the_cache_needs_no_question() {
    let fixture = sharded();
    let name = format!("{REPO}@{COMMIT}");
    let snapshot = fixture.fetch(&name).unwrap();
    let asked = fixture.hub.count();
    assert_eq!(fixture.fetch(&name).unwrap(), snapshot);
    assert_eq!(fixture.hub.count(), asked);
}

#[test]
fn an_unreachable_hub_is_replaced_by_the_cache() {
    let Fixture { hub, home, mut config } = sharded();
    let snapshot = hub::fetch(&config, &repo(REPO), &mut ()).unwrap();
    drop(hub);
    // Nobody listens on the port of a listener that was closed.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    config.endpoint = format!("http://{closed}");
    let mut heard = Heard::default();
    assert_eq!(hub::fetch(&config, &repo(REPO), &mut heard).unwrap(), snapshot);
    assert_eq!(heard.notes.len(), 1, "one attempt: {:?}", heard.notes);
    assert_contains(&heard.notes[0], &["cannot be reached", "the copy of `owner/model`"]);

    let error = hub::fetch(&config, &repo("owner/other"), &mut ()).unwrap_err().to_string();
    assert_contains(&error, &["cannot fetch", "brought nothing: 3", "HF_ENDPOINT", "`smollm2`"]);
    drop(home);
}

#[test]
fn an_update_that_is_cut_off_leaves_the_old_snapshot_in_use() {
    use super::stand_in::Fault;
    let mut fixture = sharded();
    let old = fixture.fetch(REPO).unwrap();
    let next = "fedcba9876543210fedcba9876543210fedcba98";
    let new_files: [(&str, &[u8]); 2] = [("config.json", CONFIG), ("model.safetensors", b"new")];
    fixture.hub.push(next, &new_files);
    fixture.hub.fault("GET model.safetensors", vec![Fault::Status(500, ""); 3]);
    assert_contains(&fixture.error(REPO), &["500"]);
    fixture.config.offline = true;
    assert_eq!(fixture.fetch(REPO).unwrap(), old);

    fixture.config.offline = false;
    let new = fixture.fetch(REPO).unwrap();
    assert_eq!(new, fixture.root().join("snapshots").join(next));
    // The unchanged file's blob serves both snapshots.
    assert_eq!(fixture.hub.requests("GET", "config.json").len(), 1);
}
