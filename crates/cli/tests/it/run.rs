use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use crate::{
    bevel, chat_model, check_failure, interrupt, json, output, output_with_input, scratch, stderr,
    stdout,
};

const PROMPT: &str = "It is a truth universally acknowledged";

#[test]
fn an_answer_on_stdout_and_nothing_else() {
    let output = output(&["run", "tiny-austen", PROMPT, "-n", "12", "--seed", "1"]);
    let text = stdout(&output);
    assert!(text.len() > 10 && text.ends_with('\n'), "{text:?}");
    assert_eq!(stderr(&output), "");
}

#[test]
fn the_same_seed_gives_the_same_text_on_any_number_of_threads() {
    let text = |seed: &str, threads: &str| {
        stdout(&output(&["run", "tiny-austen", PROMPT, "-n", "24", "--seed", seed, "-t", threads]))
    };
    assert_eq!(text("7", "1"), text("7", "2"));
    assert_ne!(text("7", "1"), text("8", "1"));
}

#[test]
fn json_holds_what_was_printed() {
    let args = ["run", "tiny-austen", PROMPT, "-n", "10", "--seed", "5"];
    let printed = stdout(&output(&args));
    let value = json(&[&args[..], &["--json"]].concat());
    assert_eq!(
        printed.trim_end_matches('\n'),
        value["text"].as_str().unwrap().trim_end_matches('\n')
    );
    assert_eq!(value["tokens"].as_array().unwrap().len(), 10);
    assert_eq!(value["answer_tokens"], 10);
    assert_eq!(value["finish"], "max-tokens");
    assert_eq!(value["seed"], 5);
    for rate in ["prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds"] {
        assert!(value[rate].as_f64().unwrap() > 0.0, "{rate}");
    }
}

#[test]
fn prompts_come_from_arguments_files_and_pipes() {
    let dir = scratch();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, PROMPT).unwrap();
    let rest = ["-n", "8", "--temp", "0"];
    let by_argument = stdout(&output(&[&["run", "tiny-austen", PROMPT], &rest[..]].concat()));
    let file = file.to_str().unwrap();
    let by_file = stdout(&output(&[&["run", "tiny-austen", "-f", file], &rest[..]].concat()));
    let by_pipe = [&["run", "tiny-austen"], &rest[..]].concat();
    let by_pipe = stdout(&output_with_input(&by_pipe, PROMPT.as_bytes()));
    assert_eq!(by_argument, by_file);
    assert_eq!(by_argument, by_pipe);
}

#[test]
fn echo_repeats_the_prompt_and_stats_go_to_stderr() {
    let args = ["run", "tiny-austen", PROMPT, "-n", "4", "--temp", "0", "--echo", "--stats"];
    let output = output(&args);
    assert!(stdout(&output).starts_with(PROMPT));
    assert!(stderr(&output).contains("answer 4 tokens at"), "{}", stderr(&output));
}

#[test]
fn stop_strings_end_the_answer_and_are_no_part_of_it() {
    let args = ["run", "tiny-austen", PROMPT, "-n", "40", "--temp", "0", "--json"];
    let whole = json(&args);
    let whole = whole["text"].as_str().unwrap();
    let stop = &whole[whole.find(' ').unwrap()..][..4];
    let value = json(&[&args[..], &["--stop", "no such text", "--stop", stop]].concat());
    assert_eq!(value["finish"], "stop-string");
    assert_eq!(value["text"], whole[..whole.find(stop).unwrap()]);
}

#[test]
fn an_empty_prompt_begins_a_text() {
    let value = json(&["run", "tiny-austen", "", "-n", "5", "--ignore-eos", "--json"]);
    assert_eq!(
        (value["prompt_tokens"].as_u64(), value["answer_tokens"].as_u64()),
        (Some(1), Some(5))
    );
}

#[test]
fn a_chat_template_makes_the_prompt_a_message() {
    let dir = scratch();
    let model = chat_model(&dir);
    let model = model.to_str().unwrap();
    let tokens = |more: &[&str]| {
        let args = [&["run", model, "Hello", "-n", "1", "--json"], more].concat();
        json(&args)["prompt_tokens"].as_u64().unwrap()
    };
    let (message, raw, system) =
        (tokens(&[]), tokens(&["--raw"]), tokens(&["--system", "Be kind"]));
    assert!(raw < message && message < system, "{raw} {message} {system}");
    let refused = output(&["run", "tiny-austen", "Hello", "--system", "Be kind"]);
    check_failure(&refused, 1, &["no chat template"]);
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let long = "It is a truth. ".repeat(600);
    let refused = output(&["run", "tiny-austen", &long]);
    check_failure(&refused, 1, &["the context holds 1024", "shorten it"]);
    let refused = output(&["run", "tiny-austen", PROMPT, "--ctx", "3"]);
    check_failure(&refused, 1, &["the context holds 3", "--ctx"]);
    check_failure(&output(&["run", "tiny-austen", PROMPT, "--ctx", "0"]), 1, &["--ctx"]);
}

#[test]
fn contexts_beyond_the_model_are_warned_of() {
    let output = output(&["run", "tiny-austen", PROMPT, "--ctx", "2000", "-n", "2"]);
    stdout(&output);
    assert!(
        stderr(&output).contains("warning: the model was trained on 1024"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_full_context_ends_the_answer() {
    let args = ["run", "tiny-austen", PROMPT, "--ctx", "16", "--ignore-eos", "--json"];
    let output = output(&args);
    let value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(value["finish"], "context-full");
    assert!(stderr(&output).contains("cut off"), "{}", stderr(&output));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    for (args, read) in [
        (&["run", "tiny-austen", PROMPT, "--ignore-eos", "-n", "900"][..], 1),
        (&["inspect", "tiny-austen", "--tensors"][..], 0),
        (&["quantize", "tiny-austen", "Q8_0", "--dry-run"][..], 0),
    ] {
        let mut child = bevel(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stdout.take().unwrap();
        pipe.read_exact(&mut vec![0; read]).unwrap();
        drop(pipe);
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""), "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_stdout_is_told() {
    for args in [&["inspect", "tiny-austen"][..], &["run", "tiny-austen", PROMPT, "-n", "2"][..]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = bevel(args).stdout(full).stderr(Stdio::piped()).output().unwrap();
        crate::check_failure(&output, 1, &["cannot write to stdout: No space left"]);
    }
}

#[test]
fn ctrl_c_keeps_what_there_is() {
    // The context is far larger than what is generated before the signal arrives.
    let args = ["run", "tiny-austen", PROMPT, "--ignore-eos", "--ctx", "60000", "-q"];
    let mut child = bevel(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = BufReader::new(child.stdout.take().unwrap());
    let mut text = vec![0; 20];
    pipe.read_exact(&mut text).unwrap();
    interrupt(&child);
    while pipe.read_until(b'\n', &mut text).unwrap() > 0 {}
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(text.ends_with(b"\n"));
}
