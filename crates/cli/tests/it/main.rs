//! The binary as its users see it: exit codes, stdout, stderr, on the embedded model.

mod adapters;
mod bad_input;
mod chat;
mod eval;
mod finetune;
mod help;
mod imatrix;
mod killed;
mod recipes;
#[path = "../../../../fuzz/replay.rs"]
mod replay;
mod report;
mod run;
mod tour;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use serde_json::Value;
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: replay::Counting = replay::Counting;

/// A directory that all tests of this process share: the cache with the unpacked model.
static CACHE: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

/// The binary with its own cache, no hub and two threads.
pub(crate) fn bevel(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bevel"));
    command
        .args(args)
        .env("BEVEL_CACHE", CACHE.path())
        .env("HF_HOME", CACHE.path())
        .env("HF_HUB_OFFLINE", "1")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    command
}

pub(crate) fn output(args: &[&str]) -> Output {
    bevel(args).output().unwrap()
}

/// Runs the binary with `input` on stdin.
pub(crate) fn output_with_input(args: &[&str], input: &[u8]) -> Output {
    use std::io::Write;
    let mut child = bevel(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// Stdout of a run that must succeed.
#[track_caller]
pub(crate) fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The one JSON object that a run must print.
#[track_caller]
pub(crate) fn json(args: &[&str]) -> Value {
    let value: Value = serde_json::from_str(&stdout(&output(args))).unwrap();
    assert!(value.is_object());
    value
}

/// A run that must fail with `code`, nothing on stdout and one line on stderr that holds every one
/// of `expected`.
#[track_caller]
pub(crate) fn check_failure(output: &Output, code: i32, expected: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    for part in expected {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    if code == 1 {
        assert!(text.starts_with("error: ") && text.trim_end().lines().count() == 1, "{text}");
    }
}

/// A directory for a test's files.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A copy of the embedded model that was given a chat template.
pub(crate) fn chat_model(dir: &TempDir) -> PathBuf {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let model = dir.path().join("chatty");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(file), model.join(file)).unwrap();
    }
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    model
}

/// Sends Ctrl-C to a process.
pub(crate) fn interrupt(child: &std::process::Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}
