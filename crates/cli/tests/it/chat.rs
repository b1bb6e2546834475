use std::io::{Read, Write};
use std::process::Stdio;

use serde_json::Value;

use crate::{
    bevel, chat_model, check_failure, interrupt, output, output_with_input, scratch, stderr, stdout,
};

#[test]
fn a_model_without_a_template_is_for_run() {
    check_failure(&output(&["chat", "tiny-austen"]), 1, &["no chat template", "bevel run"]);
}

#[test]
fn a_conversation_through_a_pipe() {
    let dir = scratch();
    let model = chat_model(&dir);
    let args = ["chat", model.to_str().unwrap(), "-n", "6", "--seed", "1", "--json"];
    let output = output_with_input(&args, b"Hello\n\nTwo \\\nlines\n/regen\n/exit\nnever read\n");
    let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let messages = value["messages"].as_array().unwrap();
    let roles: Vec<_> = messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(messages[2]["content"], "Two \nlines");
    let answers = value["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 3, "one was given again");
    assert_eq!(answers[0]["cached_tokens"], 0);
    assert!(answers[1]["cached_tokens"].as_u64() > Some(5), "the first turn was not read again");
    assert_eq!(answers[2]["prompt_tokens"], answers[1]["prompt_tokens"]);
}

#[test]
fn a_conversation_is_saved_and_loaded() {
    let dir = scratch();
    let model = chat_model(&dir);
    let file = dir.path().join("saved.json");
    let file = file.to_str().unwrap();
    let args = ["chat", model.to_str().unwrap(), "-n", "3", "--temp", "0", "--json"];
    let input = format!("/system Be kind.\nHello\n/save {file}\n");
    stdout(&output_with_input(&args, input.as_bytes()));
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(saved["messages"][0]["content"], "Be kind.");
    let input = format!("/load {file}\nAgain\n");
    let loaded = output_with_input(&args, input.as_bytes());
    let value: Value = serde_json::from_str(&stdout(&loaded)).unwrap();
    let saved = &saved["messages"].as_array().unwrap()[1..];
    assert_eq!(&value["messages"].as_array().unwrap()[..2], saved);
    assert_eq!(value["messages"][2]["content"], "Again");
}

#[test]
fn mistakes_end_a_script() {
    let dir = scratch();
    let model = chat_model(&dir);
    let args = ["chat", model.to_str().unwrap(), "-n", "3"];
    for (input, expected) in [
        (&b"/frobnicate\n"[..], "/help"),
        (b"/regen\n", "no answer yet"),
        (b"/load /no/such/file.json\n", "/no/such/file.json"),
        (b"/save /no/such/dir/file.json\n", "/no/such/dir"),
        (b"broken \xff text\n", "UTF-8"),
    ] {
        check_failure(&output_with_input(&args, input), 1, &[expected]);
    }
}

#[test]
fn the_oldest_turns_make_room() {
    let dir = scratch();
    let model = chat_model(&dir);
    let args = ["chat", model.to_str().unwrap(), "-n", "8", "--ctx", "64", "--temp", "0", "--json"];
    let input = "My dear Mr. Bennet, have you heard that Netherfield Park is let?\n".repeat(5);
    let output = output_with_input(&args, input.as_bytes());
    let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert!(value["dropped"].as_u64() > Some(1));
    assert_eq!(value["messages"][0]["role"], "user");
    assert!(stderr(&output).contains("the oldest"), "{}", stderr(&output));
    let too_long = output_with_input(&args, "very ".repeat(200).as_bytes());
    check_failure(&too_long, 1, &["the message is too long"]);
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let dir = scratch();
    let model = chat_model(&dir);
    // No end of text is ever drawn at temperature 0, so the first answer would take long.
    let args = ["chat", model.to_str().unwrap(), "--temp", "0", "--ctx", "60000", "-n", "50000"];
    let mut child = bevel(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut out = child.stdout.take().unwrap();
    stdin.write_all(b"Hello\n").unwrap();
    out.read_exact(&mut [0; 30]).unwrap();
    interrupt(&child);
    stdin.write_all(b"/stats\n").unwrap();
    drop(stdin);
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("(stopped)") && text.contains("of 60000 tokens"), "{text}");
}
