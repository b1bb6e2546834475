//! An adapter beside a model, in the other format, and merged.

use crate::report::check_page;
use crate::{check_failure, json, output, scratch, stdout};

#[test]
fn an_adapter_is_run_converted_and_merged() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, adapter, text) = (path("data.jsonl"), path("adapter"), path("text.txt"));
    let line = "{\"prompt\": \"Who is she?\", \"completion\": \" She is the bevel of Meryton.\"}\n";
    std::fs::write(&data, line.repeat(24)).unwrap();
    let sentence = "It is a truth universally acknowledged, that a single man must want a wife. ";
    std::fs::write(&text, sentence.repeat(40)).unwrap();
    let train = ["finetune", "tiny-austen", &data, "-o", &adapter, "--lr", "1e-2"];
    stdout(&output(&[&train[..], &["--steps", "12", "--targets", "all-linear"]].concat()));

    let ask = |adapters: &[&str]| {
        let args = ["run", "tiny-austen", "--raw", "Who is she?", "--temp", "0", "-n", "6"];
        stdout(&output(&[&args[..], adapters].concat()))
    };
    let taught = ask(&["--adapter", &adapter]);
    assert!(taught.contains("bevel"), "{taught}");
    assert!(!ask(&[]).contains("bevel"));
    assert_eq!(ask(&["--adapter", &format!("{adapter}=0")]), ask(&[]));

    // As a GGUF file, and back.
    let (gguf, back) = (path("adapter.gguf"), path("back"));
    stdout(&output(&["convert", &adapter, "--base", "tiny-austen", "-o", &gguf]));
    assert_eq!(ask(&["--adapter", &gguf]), taught);
    stdout(&output(&["convert", &gguf, "--base", "tiny-austen", "-o", &back]));
    assert_eq!(ask(&["--adapter", &back]), taught);
    check_failure(
        &output(&["convert", &gguf, "--base", "tiny-austen", "-o", &back]),
        1,
        &["back", "--force"],
    );

    // Merged in single precision it is the adapted model, in four bits it is not quite.
    let merged = path("merged.gguf");
    let merge = ["merge", "tiny-austen", &adapter, "F32", "-o", &merged, "--eval", &text];
    let found = json(&[&merge[..], &["--json"]].concat());
    let kl = |found: &serde_json::Value| found["measured"]["kl"]["value"].as_f64().unwrap();
    assert!(kl(&found) < 1e-4, "{found}");
    let small = path("small.gguf");
    let quantize = ["quantize", "tiny-austen", "Q4_0", "-o", &small, "--adapter", &adapter];
    let found = json(&[&quantize[..], &["--eval", &text, "--json"]].concat());
    assert!((1e-4..0.5).contains(&kl(&found)), "{found}");
    let against = ["eval", &small, "--against", "tiny-austen", "--text", &text, "--json"];
    let adapted = json(&[&against[..], &["--base-adapter", &adapter]].concat());
    let plain = json(&against);
    let of = |found: &serde_json::Value| found["kl"]["value"].as_f64().unwrap();
    assert!(of(&adapted) < of(&plain) / 2.0, "{} {}", of(&adapted), of(&plain));

    // A directory too, whose tensors Hugging Face's programs know.
    let merged = path("directory");
    let merge = ["merge", "tiny-austen", &format!("{gguf}=0.5"), "-o", &merged, "--no-eval"];
    assert!(stdout(&output(&merge)).contains("directory"));
    let run = ["run", &merged, "--raw", "Who is she?", "--temp", "0", "-n", "6"];
    let half = format!("{adapter}=0.5");
    assert_eq!(stdout(&output(&run)), ask(&["--adapter", &half]));
    check_failure(&output(&["run", "tiny-austen", "x", "--adapter", &data]), 1, &["data.jsonl"]);
}

/// An adapter with lengths of rows (DoRA) and with the embedding beside its matrices.
#[test]
fn lengths_and_whole_tensors_are_run_and_merged() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, adapter, text) = (path("data.jsonl"), path("adapter"), path("text.txt"));
    let line = "{\"prompt\": \"Who is she?\", \"completion\": \" She is the bevel of Meryton.\"}\n";
    std::fs::write(&data, line.repeat(24)).unwrap();
    std::fs::write(&text, "Who is she? She is the bevel of Meryton, and of all. ".repeat(40))
        .unwrap();
    let train = ["finetune", "tiny-austen", &data, "-o", &adapter, "--lr", "3e-3", "--steps", "12"];
    let more = ["--dora", "--modules-to-save", "embeddings,norms", "--targets", "attention"];
    stdout(&output(&[&train[..], &more].concat()));
    check_page(dir.path().join("adapter/report.html"), &["DoRA", "token_embd.weight"]);
    let ask = |more: &[&str]| {
        let args = ["run", "tiny-austen", "--raw", "Who is she?", "--temp", "0", "-n", "6"];
        stdout(&output(&[&args[..], more].concat()))
    };
    let taught = ask(&["--adapter", &adapter]);
    assert!(taught.contains("bevel") && !ask(&[]).contains("bevel"), "{taught}");
    let merged = path("merged.gguf");
    let merge = ["merge", "tiny-austen", &adapter, "F32", "-o", &merged, "--eval", &text, "--json"];
    let kl = json(&merge)["measured"]["kl"]["value"].as_f64().unwrap();
    assert!(kl < 1e-4, "{kl}");
    let convert = ["convert", &adapter, "--base", "tiny-austen", "-o", &path("a.gguf")];
    check_failure(&output(&convert), 1, &["DoRA", "merge"]);
    // It goes on from there.
    let again = path("again");
    let from = ["finetune", "tiny-austen", &data, "-o", &again, "--steps", "1", "--from", &adapter];
    stdout(&output(&[&from[..], &more].concat()));
    check_failure(
        &output(&[&from[..], &["--force", "--targets", "attention"]].concat()),
        1,
        &["--dora"],
    );
}

/// LoftQ: an adapter that begins with what few bits lost.
#[test]
fn an_adapter_begins_with_what_was_lost() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (text, small, adapter) = (path("text.txt"), path("small.gguf"), path("adapter"));
    let say = ["run", "tiny-austen", "It is a truth", "-n", "900", "--temp", "1", "--seed", "1"];
    std::fs::write(&text, stdout(&output(&say))).unwrap();
    stdout(&output(&["quantize", "tiny-austen", "Q2_K", "--pure", "-o", &small, "--no-eval"]));
    // A step that changes nothing.
    let args = ["finetune", &small, &text, "-o", &adapter, "--steps", "1", "--lr", "1e-12"];
    let loftq = [&args[..], &["--loftq", "tiny-austen", "--rank", "64", "--ctx", "64"]].concat();
    stdout(&output(&loftq));
    let eval = ["eval", &small, "--against", "tiny-austen", "--text", &text, "--json"];
    let kl = |more: &[&str]| json(&[&eval[..], more].concat())["kl"]["value"].as_f64().unwrap();
    let (plain, beside) = (kl(&[]), kl(&["--adapter", &adapter]));
    assert!(beside < 0.8 * plain, "{plain} {beside}");
    check_failure(&output(&[&loftq[..], &["--init", "pissa"]].concat()), 2, &["--init"]);
}
