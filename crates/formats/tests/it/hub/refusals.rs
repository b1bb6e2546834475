//! Repositories that may not or cannot be fetched: each is a sentence that says what to do.

use super::stand_in::Fault;
use super::*;

/// The hub answers the request with this fault; the error must contain all parts.
#[track_caller]
fn check(request: &str, fault: Fault, name: &str, parts: &[&str]) {
    let fixture = Fixture::new(&[("m.gguf", &weights(10))]);
    fixture.hub.fault(request, [fault]);
    let error = fixture.error(name);
    assert_contains(&error, parts);
    assert!(!error.contains("hf_secret"), "{error}");
}

#[test]
fn gated_private_and_missing() {
    let (info, head) = ("GET ?blobs=true", "HEAD m.gguf");
    let status = Fault::Status;
    check(info, status(401, ""), REPO, &["`owner/model`", "spelling", "private", "HF_TOKEN"]);
    let gated = ["`owner/model` is gated", "accept its licence at http://", "HF_TOKEN"];
    check(info, status(401, "X-Error-Code: GatedRepo\r\n"), REPO, &gated);
    check(head, status(403, "X-Error-Code: GatedRepo\r\n"), REPO, &gated);
    check(info, status(404, "X-Error-Code: RepoNotFound\r\n"), REPO, &["no model `owner/model`"]);
    check(
        info,
        status(404, "X-Error-Code: RevisionNotFound\r\n"),
        "owner/model@v9",
        &["no such revision of `owner/model`"],
    );
    check(head, status(404, ""), REPO, &["no `m.gguf` in `owner/model`"]);
    check(info, status(418, ""), REPO, &["418"]);
}

#[test]
fn answers_that_no_hub_gives() {
    let info = "GET ?blobs=true";
    check(info, Fault::Body("<html>log in to the hotel's network</html>"), REPO, &["unexpected"]);
    check(info, Fault::Body(r#"{"sha":"../../x","siblings":[]}"#), REPO, &["no commit"]);
    let bare = "ETag: \"a/../../b\"\r\n";
    check("HEAD m.gguf", Fault::Status(200, bare), REPO, &["no usable etag"]);
    check("HEAD m.gguf", Fault::Status(200, ""), REPO, &["no etag"]);
}

#[test]
fn names_that_leave_the_cache() {
    for bad in ["../x.safetensors", "/etc/x.safetensors", "a\\..\\x.gguf", "C:x.gguf", "a//b.gguf"]
    {
        let fixture = Fixture::new(&[(bad, b"x"), ("config.json", b"{}")]);
        assert_contains(&fixture.error(REPO), &["leads out of the cache"]);
        assert_eq!(fixture.hub.count(), 1, "only the listing was asked for");
    }
    let index = br#"{"weight_map":{"a":"../../../x.safetensors"}}"#;
    let fixture = Fixture::new(&[("model.safetensors.index.json", index)]);
    assert_contains(&fixture.error(REPO), &["leads out of the cache", "../../../x"]);
}

#[test]
fn nothing_to_read() {
    let fixture = Fixture::new(&[("pytorch_model.bin", b"x"), ("config.json", b"{}")]);
    assert_contains(&fixture.error(REPO), &["pickle", "`pytorch_model.bin`", "safetensors"]);
    let fixture = Fixture::new(&[("README.md", b"x")]);
    assert_contains(&fixture.error(REPO), &["neither .safetensors nor .gguf"]);
    let fixture = Fixture::new(&[("model.safetensors.index.json", b"{}")]);
    assert_contains(&fixture.error(REPO), &["no index", "weight_map"]);
}

#[test]
fn an_endpoint_that_is_no_address() {
    let mut fixture = Fixture::new(&[]);
    for endpoint in ["huggingface.co", "ftp://hub.test", ""] {
        fixture.config.endpoint = endpoint.to_owned();
        assert_contains(&fixture.error(REPO), &["HF_ENDPOINT", endpoint]);
    }
}

#[test]
fn several_gguf_files_want_a_choice() {
    let files: [(&str, &[u8]); 4] = [
        ("m-Q4_K_M.gguf", b"4444"),
        ("m-Q8_0.gguf", b"88888888"),
        ("mmproj-f16.gguf", b"eyes"),
        ("README.md", b"x"),
    ];
    let fixture = Fixture::new(&files);
    let error = fixture.error(REPO);
    assert_contains(&error, &["m-Q4_K_M.gguf", "m-Q8_0.gguf", "GB", "owner/model:QUANTIZATION"]);
    assert!(!error.contains("mmproj"));
    assert_contains(&fixture.error("owner/model:Q5_K"), &["`Q5_K`", "m-Q8_0.gguf"]);
    for name in ["owner/model:q8_0", "owner/model:m-Q8_0.gguf", "owner/model@main:Q8_0"] {
        let path = fixture.fetch(name).unwrap();
        assert_eq!(path, fixture.snapshot().join("m-Q8_0.gguf"));
        assert_eq!(std::fs::read(path).unwrap(), b"88888888");
    }
    assert!(fixture.hub.requests("GET", "m-Q4_K_M.gguf").is_empty());
}
