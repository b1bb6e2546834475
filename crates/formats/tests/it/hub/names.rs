//! Names, and the variables that say where they are looked for.

use super::*;

#[track_caller]
fn check(name: &str, id: &str, revision: &str, selection: Option<&str>) {
    let repo = repo(name);
    assert_eq!((repo.id(), repo.revision(), repo.selection()), (id, revision, selection));
    assert_eq!(repo.to_string(), name);
}

#[test]
fn names_are_taken_apart() {
    check("owner/name", "owner/name", "main", None);
    check("owner/name:Q4_K_M", "owner/name", "main", Some("Q4_K_M"));
    check("o.w_n-er/n@refs/pr/1:d/f.gguf", "o.w_n-er/n", "refs/pr/1", Some("d/f.gguf"));
    assert!(repo(&format!("owner/name@{COMMIT}")).is_commit());
    assert!(!repo("owner/name@v1").is_commit());
}

#[test]
fn names_that_no_hub_has() {
    let long = format!("owner/{}", "n".repeat(97));
    let bad = [
        "",
        "name",
        "/",
        "/name",
        "owner/",
        "a/b/c",
        "../name",
        "owner/..",
        "a--b/c",
        "-a/b",
        "a/b.",
        "owner/na me",
        "owner/näme",
        "C:\\model",
        "owner/name:",
        "owner/name@",
        "owner/name@../x",
        "owner/name:../x.gguf",
        "owner/name:/x.gguf",
        &long,
    ];
    for name in bad {
        let error = name.parse::<RepoId>().expect_err(name).to_string();
        assert_contains(&error, &[&format!("`{name}` is no model name")]);
    }
}

/// The settings for these variables.
fn settings(vars: &[(&str, &str)]) -> HubConfig {
    HubConfig::from_vars(|name| {
        vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn the_cache_is_where_the_variables_say() {
    let home = ("HOME", "/h");
    let cache = |vars: &[(&str, &str)]| settings(vars).cache;
    assert_eq!(cache(&[home]), PathBuf::from("/h/.cache/huggingface/hub"));
    assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), PathBuf::from("/x/huggingface/hub"));
    let hf_home = ("HF_HOME", "~/hf");
    assert_eq!(cache(&[home, hf_home, ("XDG_CACHE_HOME", "/x")]), PathBuf::from("/h/hf/hub"));
    let old = ("HUGGINGFACE_HUB_CACHE", "/old");
    assert_eq!(cache(&[home, hf_home, old]), PathBuf::from("/old"));
    assert_eq!(cache(&[home, hf_home, old, ("HF_HUB_CACHE", "/c")]), PathBuf::from("/c"));
    assert_eq!(cache(&[home, ("HF_HUB_CACHE", "")]), PathBuf::from("/h/.cache/huggingface/hub"));

    assert_eq!(settings(&[home]).bevel_cache, PathBuf::from("/h/.cache/bevel"));
    assert_eq!(settings(&[home, ("BEVEL_CACHE", "/b")]).bevel_cache, PathBuf::from("/b"));
}

#[test]
fn endpoint_offline_and_timeouts() {
    assert_eq!(settings(&[]).endpoint, "https://huggingface.co");
    assert_eq!(settings(&[("HF_ENDPOINT", "http://m.test/hf/")]).endpoint, "http://m.test/hf");
    for (value, expected) in
        [("1", true), ("true", true), ("ON", true), ("0", false), ("no", false)]
    {
        assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).offline, expected);
        assert_eq!(settings(&[("HF_HUB_DISABLE_SYMLINKS", value)]).symlinks, !expected);
    }
    assert!(settings(&[("TRANSFORMERS_OFFLINE", "1")]).offline);
    let timed = settings(&[("HF_HUB_ETAG_TIMEOUT", "3"), ("HF_HUB_DOWNLOAD_TIMEOUT", "60")]);
    assert_eq!(timed.connect_timeout, Duration::from_secs(3));
    assert_eq!(timed.stall_timeout, Duration::from_secs(60));
}

#[test]
fn the_token_and_its_files() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("token"), "from_home\n").unwrap();
    std::fs::write(path("elsewhere"), " from_path\r\n").unwrap();
    let (hf_home, elsewhere) = (path(""), path("elsewhere"));
    let hf_home = ("HF_HOME", hf_home.as_str());
    let token_path = ("HF_TOKEN_PATH", elsewhere.as_str());
    let old = ("HUGGING_FACE_HUB_TOKEN", "old");
    let token = |vars: &[(&str, &str)]| settings(vars).token;
    assert_eq!(token(&[("HF_HOME", &path("nowhere"))]), None);
    assert_eq!(token(&[hf_home]), Token::new("from_home"));
    assert_eq!(token(&[hf_home, token_path]), Token::new("from_path"));
    assert_eq!(token(&[hf_home, token_path, old]), Token::new("old"));
    assert_eq!(token(&[hf_home, old, ("HF_TOKEN", "new")]), Token::new("new"));
    assert_eq!(token(&[hf_home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
    assert_eq!(Token::new(" \n"), None);
    let shown = format!("{:?}", settings(&[("HF_TOKEN", "hf_secret")]));
    assert!(!shown.contains("hf_secret"), "{shown}");
}

#[test]
fn resolve_prefers_paths_and_explains_the_rest() {
    let fixture = Fixture::new(&[("m.gguf", b"x")]);
    let here = fixture.home.path().join("here.gguf");
    std::fs::write(&here, b"x").unwrap();
    let resolve = |name: &str| hub::resolve(name, &fixture.config, &mut ());
    assert_eq!(resolve(here.to_str().unwrap()).unwrap(), here);
    assert_eq!(resolve(fixture.home.path().to_str().unwrap()).unwrap(), fixture.home.path());
    assert_eq!(fixture.hub.count(), 0);
    for lost in ["lost.gguf", "dir/lost.gguf", "./dir", "smollm3"] {
        let error = resolve(lost).unwrap_err().to_string();
        assert_contains(&error, &[&format!("`{lost}` does not exist"), "`smollm2`"]);
    }
    assert_eq!(fixture.hub.count(), 0);
    assert_eq!(resolve(REPO).unwrap(), fixture.snapshot().join("m.gguf"));
}
