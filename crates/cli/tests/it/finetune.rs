//! From a file of examples to an adapter.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::report::check_page;
use crate::{bevel, check_failure, json, output, scratch, stdout};

fn lines() -> String {
    let line = |i: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Number {i}?\"}}, \
             {{\"role\": \"assistant\", \"content\": \"It is {i}, my dear.\"}}]}}\n"
        )
    };
    (0..24).map(line).collect()
}

#[test]
fn a_model_is_taught() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, adapter, events) = (path("data.jsonl"), path("adapter"), path("events"));
    std::fs::write(&data, lines()).unwrap();
    let args = [
        "finetune",
        "tiny-austen",
        &data,
        "-o",
        &adapter,
        "--chat-template",
        "chatml",
        "--lr",
        "5e-3",
        "--epochs",
        "2",
        "--held-out",
        "0.25",
        "--rank",
        "4",
        "--targets",
        "attention,down",
        "--tensorboard",
        &events,
    ];
    let text = stdout(&output(&args));
    assert!(text.contains("held-out loss") && text.contains("tokens/s"), "{text}");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(dir.path().join("adapter").join(file).exists(), "{file}");
    }
    let log = std::fs::read_to_string(dir.path().join("adapter/training.jsonl")).unwrap();
    let steps: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // Eighteen of the examples twice, eight at a time.
    assert_eq!(steps.len(), 5);
    assert!(steps[4]["loss"].as_f64().unwrap() < steps[0]["loss"].as_f64().unwrap());
    let parts = ["tiny-austen, fine-tuned", "held out went from", "5 of 5", "rank 4", "--lr 5e-3"];
    check_page(dir.path().join("adapter/report.html"), &parts);
    assert_eq!(std::fs::read_dir(&events).unwrap().count(), 1);
    check_failure(&output(&args), 1, &["adapter", "--force"]);

    // The same seed gives the same bytes, whatever the number of threads.
    let weights = || std::fs::read(dir.path().join("adapter/adapter_model.safetensors")).unwrap();
    let first = weights();
    let found = json(&[&args[..], &["--force", "--json", "-t", "1"]].concat());
    assert_eq!((weights() == first, &found["steps"]), (true, &5.into()));
    assert!(found["held_out_loss"].as_f64() < found["held_out_loss_before"].as_f64());
    stdout(&output(&[&args[..], &["--force", "--seed", "9"]].concat()));
    assert!(weights() != first, "another seed");
}

#[test]
fn data_that_is_none_is_named() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, adapter) = (path("data.jsonl"), path("adapter"));
    let run = |more: &[&str]| {
        output(&[&["finetune", "tiny-austen", &data, "-o", &adapter][..], more].concat())
    };
    check_failure(&run(&[]), 1, &["data.jsonl"]);
    std::fs::write(&data, "{\"text\": \"x\"}\n{\"txt\": \"x\"}\n").unwrap();
    check_failure(&run(&[]), 1, &["line 2", "`text`"]);
    std::fs::write(&data, "").unwrap();
    check_failure(&run(&[]), 1, &["no example"]);
    check_failure(&run(&["--rank", "0"]), 2, &["--rank"]);
    check_failure(&run(&["--lr", "-1"]), 2, &["--lr"]);
    check_failure(&run(&["--targets", "head"]), 2, &["all-linear"]);
    assert!(!dir.path().join("adapter").exists(), "nothing is left");
    // Before anything is trained.
    std::fs::write(&data, lines()).unwrap();
    std::fs::write(&adapter, "a file").unwrap();
    check_failure(&run(&["--chat-template", "chatml"]), 1, &["cannot make", "adapter"]);
}

#[test]
fn directories_and_files_are_learnt_together() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("data")).unwrap();
    std::fs::write(path("data/a.csv"), "prompt,completion\nWho is she?, Emma.\nAnd he?,\n")
        .unwrap();
    std::fs::write(path("data/b.json"), "[{\"text\": \"She was happy.\"}]").unwrap();
    std::fs::write(path("data/picture.png"), "x").unwrap();
    std::fs::write(path("c.txt"), "It is a truth.").unwrap();
    let (data, text, adapter) = (path("data"), path("c.txt"), path("adapter"));
    let args = ["finetune", "tiny-austen", &data, &text, "-o", &adapter, "--steps", "1"];
    let found = output(&[&args[..], &["--held-out", "0"]].concat());
    let said = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(said.contains("picture.png") && said.contains("1 examples have nothing"), "{said}");
    assert!(said.contains("3 examples, 0 held out"), "{said}");
}

#[test]
fn a_run_that_is_stopped_leaves_what_it_has() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, adapter) = (path("data.jsonl"), path("adapter"));
    std::fs::write(&data, lines()).unwrap();
    let args = ["finetune", "tiny-austen", &data, "-o", &adapter, "--chat-template", "chatml"];
    let args = [&args[..], &["--steps", "100000"]].concat();
    let mut child = bevel(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Steps are written as they are done.
    let log = dir.path().join("adapter/training.jsonl");
    let written = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
    let begin = Instant::now();
    while written() < 2 {
        assert!(begin.elapsed() < Duration::from_secs(120), "no steps are written");
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let stopped = format!("stopped after {} of 100000 steps", written());
    check_page(dir.path().join("adapter/report.html"), &[&stopped]);
    assert!(dir.path().join("adapter/adapter_model.safetensors").exists());
}

/// Killed at any moment and gone on with, a run ends in the bytes of one that was left alone.
#[test]
fn a_run_that_is_killed_goes_on() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let data = path("data.jsonl");
    std::fs::write(&data, lines()).unwrap();
    let args = |adapter: &str, more: &[&str]| -> Vec<String> {
        let adapter = path(adapter);
        let args = ["finetune", "tiny-austen", &data, "-o", &adapter, "--chat-template", "chatml"];
        let options =
            ["--steps", "60", "--batch", "2", "--dropout", "0.1", "--checkpoint-every", "3"];
        [&args[..], &options, more].concat().into_iter().map(str::to_owned).collect()
    };
    let run = |adapter: &str, more: &[&str]| {
        let args = args(adapter, more);
        output(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    stdout(&run("whole", &[]));
    check_failure(&run("none", &["--resume"]), 1, &["no checkpoint", "--resume"]);

    let log = dir.path().join("killed/training.jsonl");
    let written = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
    let saved = dir.path().join("killed/checkpoint.safetensors");
    for (kill, until) in [4, 17, 40].into_iter().enumerate() {
        let args = args("killed", if kill > 0 { &["--resume"] } else { &[] });
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut child = bevel(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begin = Instant::now();
        while !(written() >= until && saved.exists()) {
            assert!(begin.elapsed() < Duration::from_secs(120), "no steps are written");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "killed before it was done");
    }
    check_failure(&run("killed", &[]), 1, &["--resume", "--force"]);
    check_failure(&run("killed", &["--resume", "--lr", "1e-3"]), 1, &["other options"]);
    stdout(&run("killed", &["--resume", "-t", "1"]));
    let weights = |adapter: &str| {
        std::fs::read(dir.path().join(adapter).join("adapter_model.safetensors")).unwrap()
    };
    assert!(weights("whole") == weights("killed"), "the same bytes");
    assert!(!saved.exists(), "the checkpoint is not needed any more");
    // Every step stands there once.
    let steps = std::fs::read_to_string(&log).unwrap();
    let steps: Vec<u64> = steps
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(steps, (1..=60).collect::<Vec<u64>>());
}

#[test]
fn options_of_training_work_together() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, pairs) = (path("data.jsonl"), path("pairs.jsonl"));
    std::fs::write(&data, lines()).unwrap();
    let pair = |i: usize| {
        format!("{{\"prompt\": \"Is it {i}?\", \"chosen\": \" Yes.\", \"rejected\": \" No!\"}}\n")
    };
    std::fs::write(&pairs, (0..12).map(pair).collect::<String>()).unwrap();
    let chat = ["--chat-template", "chatml"];
    let run = |data: &str, name: &str, more: &[&str]| {
        let adapter = path(name);
        let mut args = vec!["finetune", "tiny-austen", data, "-o", &adapter, "--json"];
        if !more.contains(&"--steps") {
            args.extend(["--steps", "4"]);
        }
        json(&[&args[..], more].concat())
    };
    // Memory, order and starts: the loss of the first step is that of the same examples.
    let first = |name: &str, more: &[&str]| {
        run(&data, name, &[&chat[..], &["--in-order", "--held-out", "0"], more].concat());
        let log = std::fs::read_to_string(dir.path().join(name).join("training.jsonl")).unwrap();
        let step: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        step["loss"].as_f64().unwrap()
    };
    let plain = first("plain", &[]);
    assert_eq!(plain, first("recompute", &["--recompute"]));
    assert_eq!(plain, first("paged", &["--page-optimizer", "--optimizer", "adamw8bit"]));
    assert_eq!(plain, first("lion", &["--optimizer", "lion", "--targets", "blk.[01].attn_*"]));
    assert!((plain - first("pissa", &["--init", "pissa", "--exact"])).abs() < 0.02);
    assert!(plain != first("noise", &["--neftune", "5"]));
    let early = run(
        &data,
        "early",
        &[
            &chat[..],
            &[
                "--lr",
                "1",
                "--steps",
                "50",
                "--evaluate-every",
                "1",
                "--patience",
                "2",
                "--keep-best",
            ],
        ]
        .concat(),
    );
    assert!(early["steps"].as_u64().unwrap() < 50, "{early}");

    // Preferences.
    let found = run(&pairs, "dpo", &["--dpo", "--lr", "5e-3", "--held-out", "0.25"]);
    let loss = |name: &str| found[name].as_f64().unwrap();
    assert!((loss("held_out_loss_before") - 2f64.ln()).abs() < 1e-6, "{found}");
    assert!(loss("held_out_loss") < 0.6, "{found}");
    let adapter = path("no");
    let wrong = |more: &[&str]| {
        output(&[&["finetune", "tiny-austen", &data, "-o", &adapter][..], more].concat())
    };
    check_failure(&wrong(&["--dpo"]), 1, &["line 1", "chosen"]);
    check_failure(
        &wrong(&["--targets", "blk.*.nothing", "--chat-template", "chatml"]),
        1,
        &["--targets"],
    );
    check_failure(&wrong(&["--dropout", "1"]), 2, &["--dropout"]);
}

/// Models are trained themselves: all of one, some tensors, from nothing, and for types of few bits.
#[test]
fn models_are_trained() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let data = path("data.jsonl");
    let lines: String =
        (0..16).map(|i| format!("{{\"text\": \"She was {i}, and he was {i}.\"}}\n")).collect();
    std::fs::write(&data, lines).unwrap();
    let run = |model: &str, out: &str, more: &[&str]| {
        let args = ["finetune", model, &data, "-o", out, "--held-out", "0.25", "--exact"];
        output(&[&args[..], more].concat())
    };
    let found = |model: &str, out: &str, more: &[&str]| {
        let more = [more, &["--steps", "6", "--lr", "1e-3", "--json"]].concat();
        serde_json::from_str::<serde_json::Value>(&stdout(&run(model, out, &more))).unwrap()
    };
    let loss = |found: &serde_json::Value, key: &str| found[key].as_f64().unwrap();
    // The model that was written is the one that was trained: its loss is where that ended.
    let check = |found: &serde_json::Value, kind: &str| {
        let (before, after) = (loss(found, "held_out_loss_before"), loss(found, "held_out_loss"));
        assert!(after < before, "{kind}: {before} {after}");
        let model = found["output"].as_str().unwrap();
        let again = loss_of(&data, model, &path(&format!("again-{kind}")));
        assert!((again - after).abs() < 0.01, "{kind}: {after} is written as {again}");
    };
    check(&found("tiny-austen", &path("full"), &["--full"]), "full");
    check(&found("tiny-austen", &path("norms"), &["--train", "norms,blk.3.*"]), "norms");
    for (kind, name) in [("TQ2_0", "model.gguf"), ("Q4_0", "model.gguf"), ("W3", "model")] {
        let result = found("tiny-austen", &path(kind), &["--qat", kind]);
        assert!(result["output"].as_str().unwrap().ends_with(name), "{result}");
        check(&result, kind);
    }
    // From nothing, of a directory without weights.
    std::fs::create_dir(path("blank")).unwrap();
    let assets = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(assets.join(name), dir.path().join("blank").join(name)).unwrap();
    }
    let result = found(&path("blank"), &path("scratch"), &["--scratch", "--type", "Q8_0"]);
    assert!((loss(&result, "held_out_loss_before") - 4096f64.ln()).abs() < 0.2, "{result}");
    check(&result, "scratch");
    check_page(dir.path().join("scratch/report.html"), &["the whole model", "4196608 numbers"]);
    let text = stdout(&output(&["run", &path("scratch/model.gguf"), "She", "-n", "3"]));
    assert!(!text.is_empty());

    let full = path("full");
    check_failure(&run("tiny-austen", &full, &["--full"]), 1, &["has a model", "--force"]);
    check_failure(&run(&path("blank"), &path("x"), &["--full"]), 1, &["blank"]);
    check_failure(&run("tiny-austen", &path("x"), &["--train", "blk.9.*"]), 1, &["`blk.9.*`"]);
    check_failure(&run("tiny-austen", &path("x"), &["--train", "head"]), 1, &["embeddings"]);
    check_failure(&run("tiny-austen", &path("x"), &["--train", "bias"]), 2, &["embeddings"]);
    check_failure(&run("tiny-austen", &path("x"), &["--full", "--rank", "4"]), 2, &["--rank"]);
    check_failure(&run("tiny-austen", &path("x"), &["--qat", "BF16"]), 1, &["BF16", "Q4_0"]);
    check_failure(&run("tiny-austen", &path("x"), &["--qat", "NF4"]), 1, &["NF4", "W4"]);
}

/// The held-out loss of a model.
fn loss_of(data: &str, model: &str, out: &str) -> f64 {
    let args = ["finetune", model, data, "-o", out, "--held-out", "0.25", "--exact"];
    let found = json(&[&args[..], &["--steps", "1", "--json"]].concat());
    found["held_out_loss_before"].as_f64().unwrap()
}

/// What a run would take is told without training, and is about what it takes.
#[test]
fn memory_is_told_before() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (data, out) = (path("data.txt"), path("out"));
    std::fs::write(&data, "She was happy, and he was not, but they were. ".repeat(400)).unwrap();
    for more in [&["--rank", "256", "--batch", "8"][..], &["--full"]] {
        let args = ["finetune", "tiny-austen", &data, "-o", &out, "--held-out", "0", "--json"];
        let args = [&args[..], &["--steps", "2", "--ctx", "512", "--force"], more].concat();
        let plan = json(&[&args[..], &["--dry-run"]].concat());
        assert!(!dir.path().join("out/training.jsonl").exists(), "nothing was trained");
        let parts: u64 =
            plan["memory"].as_object().unwrap().values().filter_map(|v| v.as_u64()).sum();
        let expected = plan["expected_memory_bytes"].as_u64().unwrap();
        assert_eq!(parts, expected);
        let found = json(&args);
        let taken = found["training_memory_bytes"].as_u64().unwrap();
        assert_eq!(found["expected_memory_bytes"].as_u64(), Some(expected));
        let ratio = expected as f64 / taken as f64;
        assert!((0.7..1.4).contains(&ratio), "{more:?}: {expected} expected, {taken} taken");
        std::fs::remove_dir_all(&out).unwrap();
    }
    let text = stdout(&output(&["finetune", "tiny-austen", &data, "-o", &out, "--dry-run"]));
    assert!(text.contains("optimizer's state") && text.contains("MB"), "{text}");
}
