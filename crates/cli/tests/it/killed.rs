//! Runs that are killed, at any moment, and started again. `BEVEL_SLOW=1` kills many more.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{bevel, check_failure, output, scratch, stdout};

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tour.txt");

/// A command that quantizes to `out`.
fn command(what: &[&str], out: &Path) -> Vec<String> {
    let calib = ["--calib", TEXT, "--calib-samples", "6", "--calib-tokens", "64", "--no-eval"];
    let all = [&["quantize", "tiny-austen"], what, &calib, &["-o", out.to_str().unwrap()]].concat();
    all.into_iter().map(str::to_owned).collect()
}

fn start(args: &[String]) -> Child {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    bevel(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[track_caller]
fn finish(args: &[String]) {
    stdout(&output(&args.iter().map(String::as_str).collect::<Vec<_>>()));
}

/// The bytes of a file, or of all files in a directory but the report, by name.
fn contents(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    if out.is_file() {
        return [(PathBuf::new(), fs::read(out).unwrap())].into();
    }
    let names = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.filter(|name| !name.to_str().unwrap().starts_with("report."));
    names.map(|name| (name.clone().into(), fs::read(out.join(name)).unwrap())).collect()
}

/// What a report says of the tensors, without how long each took.
fn tensors(out: &Path) -> Value {
    let report = match out.is_dir() {
        true => out.join("report.json"),
        false => out.with_extension("report.json"),
    };
    let mut report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let mut tensors = report["tensors"].take();
    for tensor in tensors.as_array_mut().unwrap() {
        for solved in tensor["solved"].as_array_mut().into_iter().flatten() {
            solved["seconds"].take();
        }
    }
    tensors
}

/// Waits until a run has begun to keep what it finds.
#[track_caller]
fn wait_for(record: &Path) {
    let begin = Instant::now();
    while !record.exists() {
        assert!(begin.elapsed() < Duration::from_secs(120), "no record of the run");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// Numbers in [0, 1), the same each time.
fn numbers(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Kills runs of a command `kills` times, each at a moment of the time that one takes, and lets one
/// come to its end.
#[track_caller]
fn check(what: &[&str], name: &str, kills: usize) {
    let dir = scratch();
    let whole = dir.path().join(format!("whole-{name}"));
    let args = command(what, &whole);
    // The first command also unpacks the model.
    stdout(&output(&["inspect", "tiny-austen"]));
    let begin = Instant::now();
    finish(&args);
    let duration = begin.elapsed().as_secs_f64();
    let (expected, reported) = (contents(&whole), tensors(&whole));
    assert!(reported.as_array().unwrap().iter().filter(|t| !t["solved"].is_null()).count() >= 28);

    let out = dir.path().join(name);
    let unfinished = dir.path().join(format!("{name}.unfinished"));
    let args = command(what, &out);
    let mut number = numbers(7);
    let (mut left, mut completed) = (0, 0);
    for kill in 0..kills {
        let mut child = start(&args);
        // A run that goes on is shorter than a whole one; late kills meet its end.
        std::thread::sleep(Duration::from_secs_f64(duration * number()));
        child.kill().unwrap();
        if !child.wait().unwrap().success() {
            left += usize::from(unfinished.join("part-0000.safetensors").exists());
        }
        if out.exists() {
            // It has its name: it is complete, whatever became of the report.
            assert!(contents(&out) == expected, "{name}: other bytes after kill {kill}");
            completed += 1;
            remove(&out);
            remove(&unfinished);
            remove(&out.with_extension("report.json"));
            remove(&out.with_extension("report.html"));
        }
    }
    eprintln!(
        "{name}: {kills} kills in runs of {duration:.2} s; {left} left parts, {completed} came too late"
    );
    finish(&args);
    assert!(contents(&out) == expected, "{name}: other bytes after {kills} kills");
    assert_eq!(tensors(&out), reported, "{name}: the report of a run that went on");
    assert!(!unfinished.exists());
}

/// True where a test may take its time.
fn is_slow() -> bool {
    std::env::var_os("BEVEL_SLOW").is_some_and(|value| value == "1")
}

#[test]
fn a_killed_run_goes_on_and_ends_in_the_same_bytes() {
    check(&["Q4_K_M", "--method", "gptq"], "small.gguf", if is_slow() { 60 } else { 4 });
    if is_slow() {
        check(&["Q4_0", "--method", "gptaq", "--rotate"], "rotated.gguf", 30);
    }
}

#[test]
fn a_killed_run_to_a_directory_goes_on_too() {
    check(&["W4", "--method", "gptq"], "small", if is_slow() { 40 } else { 3 });
    if is_slow() {
        check(&["W4", "--format", "awq", "--method", "awq"], "awq", 30);
    }
}

#[test]
fn a_run_that_is_asked_to_end_cleans_up() {
    let dir = scratch();
    let out = dir.path().join("small.gguf");
    let args = command(&["Q4_0", "--method", "gptq"], &out);
    let mut child = start(&args);
    let record = dir.path().join("small.gguf.unfinished/run.json");
    wait_for(&record);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["small.gguf.unfinished"]);
    finish(&args);
    assert!(out.exists() && !record.exists());
}

#[test]
fn what_a_killed_run_left_is_not_taken_up_by_another() {
    let dir = scratch();
    let out = dir.path().join("small.gguf");
    let args = command(&["Q4_0", "--method", "gptq"], &out);
    let mut child = start(&args);
    let record = dir.path().join("small.gguf.unfinished/run.json");
    wait_for(&record);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = fs::read(&record).unwrap();
    let other = |more: &[&str]| {
        let mut all: Vec<&str> = args.iter().map(String::as_str).collect();
        all.extend(more);
        output(&all)
    };
    for (more, what) in [(&["--keep", "blk.0.*"][..], "recipe"), (&["--seed", "3"], "recipe")] {
        check_failure(&other(more), 1, &["small.gguf.unfinished", what, "--restart"]);
    }
    assert_eq!(fs::read(&record).unwrap(), before, "what is there was touched");
    stdout(&other(&["--keep", "blk.0.*", "--restart"]));
    assert!(out.exists() && !record.exists());
}
