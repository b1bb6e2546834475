use std::fs;

use crate::{check_failure, output, output_with_input, scratch};

#[test]
fn models_that_are_none() {
    let dir = scratch();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let run = |model: &str| output(&["run", model, "x", "-n", "1"]);
    check_failure(&run("no-such-model.gguf"), 1, &["`no-such-model.gguf`"]);
    check_failure(&run("owner/never-fetched"), 1, &["owner/never-fetched"]);
    check_failure(&run(dir.path().to_str().unwrap()), 1, &["config.json"]);
    check_failure(&run(&file("empty.gguf", b"")), 1, &["empty.gguf"]);
    check_failure(&run(&file("text.gguf", b"this is no model at all")), 1, &["text.gguf"]);
    check_failure(&run(&file("cut.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff")), 1, &["cut.gguf"]);
}

#[cfg(unix)]
#[test]
fn paths_that_are_no_files() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let pipe = path("pipe.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe.as_str(), "/dev/null"] {
        check_failure(&output(&["inspect", path]), 1, &[path, "it is a pipe or a device"]);
    }
    let link = path("link.gguf");
    std::os::unix::fs::symlink("nowhere.gguf", &link).unwrap();
    check_failure(&output(&["inspect", &link]), 1, &["is a link to `nowhere.gguf`"]);
    check_failure(&output(&["inspect", "tiny-austin"]), 1, &["does not exist", ", `tiny-austen`"]);
}

/// A limit on the size of files stops writes like a full disk does.
#[cfg(unix)]
#[test]
fn outputs_that_cannot_be_written() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for (verb, name, expected) in [
        ("quantize", "no/q.gguf", "no/q.gguf`: there is no directory"),
        ("convert", "no/model", "no/model`: there is no directory"),
    ] {
        let mut args = vec![verb, "tiny-austen", "-o"];
        let out = path(name);
        args.push(&out);
        args.extend((verb == "quantize").then_some("Q8_0"));
        check_failure(&output(&args), 1, &[expected, "create it first"]);
    }
    let (out, report) = (path("q.gguf"), path("no/report.json"));
    let run =
        |report: &str| output(&["quantize", "tiny-austen", "Q8_0", "-o", &out, "--report", report]);
    check_failure(&run(&report), 1, &["no/report.json`: there is no directory"]);
    check_failure(&run(&out), 1, &["q.gguf` cannot be a model and the report"]);
    fs::write(path("old.json"), "").unwrap();
    check_failure(&run(&path("old.json")), 1, &["old.json` exists", "--force"]);
    fs::remove_file(path("old.json")).unwrap();
    let quantize = crate::bevel(&["quantize", "tiny-austen", "Q8_0", "-o", &out]);
    // The model is in the cache by now.
    let limited = std::process::Command::new("sh")
        .args(["-c", r#"ulimit -f 64; exec "$0" "$@""#])
        .arg(quantize.get_program())
        .args(quantize.get_args())
        .envs(quantize.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .output()
        .unwrap();
    check_failure(&limited, 1, &["q.gguf`: the file grows past", "ulimit -f"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_without_weights() {
    let dir = scratch();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny-austen/config.json");
    fs::copy(source, dir.path().join("config.json")).unwrap();
    check_failure(&output(&["run", dir.path().to_str().unwrap(), "x"]), 1, &["safetensors"]);
}

#[test]
fn prompts_that_are_no_text() {
    let dir = scratch();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, b"caf\xe9").unwrap();
    let run = output(&["run", "tiny-austen", "-f", file.to_str().unwrap()]);
    check_failure(&run, 1, &["prompt.txt", "not UTF-8", "0xE9", "offset 3"]);
    check_failure(&output_with_input(&["run", "tiny-austen"], b"\xff"), 1, &["stdin is not UTF-8"]);
    check_failure(&output(&["run", "tiny-austen", "-f", "no-such.txt"]), 1, &["`no-such.txt`"]);
}

#[cfg(unix)]
#[test]
fn an_argument_that_is_no_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let mut command = crate::bevel(&["run", "tiny-austen"]);
    let output = command.arg(OsStr::from_bytes(b"caf\xe9")).output().unwrap();
    check_failure(&output, 2, &["UTF-8"]);
}

#[test]
fn an_unknown_instruction_set() {
    let output =
        crate::bevel(&["run", "tiny-austen", "x"]).env("BEVEL_ISA", "mmx").output().unwrap();
    check_failure(&output, 1, &["BEVEL_ISA", "mmx"]);
}

#[test]
fn the_embedded_model_needs_no_cache() {
    let dir = scratch();
    // A file where the cache's directory should be.
    let blocked = dir.path().join("file");
    fs::write(&blocked, "").unwrap();
    let output = crate::bevel(&["run", "tiny-austen", "It is", "-n", "2", "--temp", "0"])
        .env("BEVEL_CACHE", blocked.join("cache"))
        .env("TMPDIR", dir.path())
        .output()
        .unwrap();
    crate::stdout(&output);
    assert!(dir.path().join("bevel-tiny-austen/config.json").exists());
}
