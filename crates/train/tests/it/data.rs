//! Every kind of file gives the same examples, and what is wrong in one is named.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bevel_base::Pool;
use bevel_formats::records::{self, DataFile, Kind};
use bevel_model::chat::{CHATML, ChatTemplate};
use bevel_model::tokenizer::Tokenizer;
use bevel_train::Result;
use bevel_train::data::{Cached, Example, Examples, Pair, Reader};

use crate::training::tiny_austen;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| tiny_austen().tokenizer().unwrap());
static TEMPLATE: LazyLock<ChatTemplate> =
    LazyLock::new(|| ChatTemplate::new(CHATML, TOKENIZER.special_texts()).unwrap());

fn reader() -> Reader<'static> {
    Reader { tokenizer: &TOKENIZER, template: Some(&TEMPLATE), context: 128, whole: false }
}

/// A file of a name and bytes, in a directory that lives as long.
struct Written {
    directory: tempfile::TempDir,
    files: Vec<DataFile>,
}

fn written(name: &str, bytes: &[u8]) -> Written {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let kind = records::kind(&path).unwrap_or(Kind::JsonLines);
    Written { directory, files: vec![DataFile { path, kind }] }
}

fn examples(name: &str, bytes: &[u8]) -> Result<Examples> {
    reader().examples(&written(name, bytes).files, &Pool::new(2))
}

fn pairs(name: &str, bytes: &[u8]) -> Result<Examples<Pair>> {
    reader().pairs(&written(name, bytes).files, &Pool::new(2))
}

/// What is learnt of an example, and what is only read.
fn learnt_and_read(example: &Example) -> (String, String) {
    let pick = |learnt: bool| {
        let tokens = example.tokens.iter().zip(&example.learnt);
        let picked: Vec<u32> = tokens.filter(|t| *t.1 == learnt).map(|t| *t.0).collect();
        TOKENIZER.decode(&picked, false)
    };
    (pick(true), pick(false))
}

#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

const LINES: &str = r#"{"prompt": "Who is she?", "completion": " Emma, \"the\" one.", "id": "1"}
{"prompt": "Two,\nlines", "completion": " yes", "id": "2"}
"#;

#[test]
fn every_kind_of_file_gives_the_same_examples() {
    let expected = examples("a.jsonl", LINES.as_bytes()).unwrap();
    assert_eq!(expected.all.len(), 2);
    let array = format!("[{}]", LINES.trim().replace("}\n{", "},\r\n{"));
    let csv = "prompt,completion,id\nWho is she?,\" Emma, \"\"the\"\" one.\",1\n\n\"Two,\nlines\", yes,2\n";
    let marked = |text: &str| [b"\xef\xbb\xbf", text.as_bytes()].concat();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(csv.as_bytes()).unwrap();
    for (name, bytes) in [
        ("a.json", array.clone().into_bytes()),
        ("a.json", marked(&array)),
        ("a.ndjson", marked(&LINES.replace('\n', "\r\n"))),
        ("no_ending", LINES.as_bytes().to_vec()),
        ("a.csv", csv.as_bytes().to_vec()),
        ("A.CSV", marked(&csv.replace("1\n\n", "1\r\n").replace("id\n", "id\r\n"))),
        ("a.csv", csv.replace("prompt,completion", " prompt, completion ").into_bytes()),
        ("a.csv.gz", packed.finish().unwrap()),
    ] {
        assert_eq!(examples(name, &bytes).unwrap(), expected, "{name}");
    }
}

#[test]
fn columns_of_parquet_are_members() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/goldens/parquet");
    let file = |name: &str| DataFile { path: goldens.join(name), kind: Kind::Parquet };
    let found = reader().examples(&[file("datasets.parquet")], &Pool::new(3)).unwrap();
    assert_eq!(found.all.len(), 20);
    for (i, example) in found.all.iter().enumerate() {
        let (learnt, read) = learnt_and_read(example);
        assert_eq!(learnt, format!("answer {i}<|im_end|>\n"));
        assert!(read.contains(&format!("user\nquestion {i}<|im_end|>")), "{read}");
    }
    // Rows without a text have messages, or neither.
    let mixed = reader().examples(&[file("plain.parquet")], &Pool::new(2)).unwrap();
    assert!(mixed.all.len() + mixed.empty == 40 && mixed.empty > 0, "{mixed:?}");
    assert!(mixed.all.iter().any(|e| learnt_and_read(e).1.contains("<|im_start|>user")));
    refused(
        reader().pairs(&[file("plain.parquet")], &Pool::new(2)),
        &["plain.parquet", "`chosen`", "needed"],
    );
    refused(
        reader().examples(&[file("tools.parquet")], &Pool::new(2)),
        &["tools.parquet", "tool_calls.list.element.function", "JSON Lines"],
    );
}

#[test]
fn a_directory_may_hold_every_kind() {
    let Written { directory, .. } = written("c.csv", b"text\nthird\n");
    let write = |name: &str, text: &str| {
        let path: PathBuf = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("a.jsonl", "{\"text\": \"first\"}\n");
    write("b/deep.txt", "second");
    write("README.md", "About these.");
    write("dataset_info.json", "{}");
    write(".cache/d.jsonl", "no JSON");
    write("z.bin", "x");
    let found = records::directory(directory.path()).unwrap();
    assert_eq!(found.left_out, [directory.path().join("z.bin")]);
    let examples = reader().examples(&found.files, &Pool::new(2)).unwrap();
    let texts = examples.all.iter().map(|e| TOKENIZER.decode(&e.tokens, true));
    let texts: Vec<String> = texts.map(|text| text.trim().to_owned()).collect();
    assert_eq!(texts, ["first", "second", "third"]);
}

#[test]
fn what_is_wrong_is_named_with_its_place() {
    let check = |name, bytes: &[u8], parts: &[&str]| refused(examples(name, bytes), parts);
    let line = |line: &str| format!("{{\"text\": \"x\"}}\n\n{line}\n").into_bytes();
    for (text, parts) in [
        ("{", ["a.jsonl, line 3: ", "no JSON"]),
        ("[1]", ["line 3", "an object with members, and not a list"]),
        (
            r#"{"body": "x", "id": 1}"#,
            ["line 3: expected the members `text`", "it has `body`, `id`"],
        ),
        ("{}", ["line 3", "it has none"]),
        (r#"{"text": 7}"#, ["line 3", "`text` is a number; expected a text"]),
        (
            r#"{"prompt": "x", "completion": ["y"]}"#,
            ["line 3", "`prompt` is a text; expected a list"],
        ),
        (r#"{"prompt": "x", "completion": {"a": 1}}"#, ["line 3", "`completion` is an object"]),
        (r#"{"messages": "x"}"#, ["line 3", "`messages` is a text; expected a list of messages"]),
        (r#"{"prompt": [], "completion": []}"#, ["line 3", "`prompt` has no message"]),
        (
            r#"{"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}"#,
            ["message 2", "`role`"],
        ),
        (r#"{"messages": [{"role": "user", "content": 5}]}"#, ["message 1", "is a number"]),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, ["line 3", "the assistant's"]),
        (r#"{"conversations": [{"from": "bot", "value": "x"}]}"#, ["`from` is `bot`", "gpt"]),
        (r#"{"instruction": "x"}"#, ["line 3", "`instruction` and `output`; it has"]),
        (r#"{"chosen": "x", "rejected": "y"}"#, ["line 3", "it has `chosen`, `rejected`"]),
        (
            r#"{"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}"#,
            ["`tools`", "no JSON"],
        ),
        (
            r#"{"messages": [{"role": "assistant", "content": "x"}], "tools": [{}]}"#,
            ["line 3", "no place for `tools`"],
        ),
    ] {
        check("a.jsonl", &line(text), &parts);
    }
    check("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": \"\xe9\"}", &["a.jsonl, line 2", "iconv"]);
    check("a.json", b"[{\"text\": \"x\"}, {\"body\": 1}]", &["a.json, record 2", "`body`"]);
    check("a.csv", b"text,text\nx,y\n", &["a.csv", "`text` twice"]);
    check("a.csv", b"body\nx\n", &["a.csv, row 1: ", "it has `body`"]);
    check("a.csv", b"text,id\r\n\"a\r\nb\",1\r\nx\r\n", &["a.csv, row 2: ", "1 cells"]);
    check("a.csv", b"text,id\nx,1\n\xe9,2\n", &["a.csv, row 2: ", "`text`", "iconv"]);
    check("a.txt", b"one\ntwo \xe9\n", &["a.txt", "line 2", "iconv"]);
    check("a.txt.gz", b"", &["a.txt.gz", "unpack"]);
    // The first thing that is wrong, though the second is found earlier.
    check("a.jsonl", b"{\"text\": 1}\n{", &["line 1", "a number"]);
}

#[test]
fn a_quote_that_is_never_closed_ends_in_an_error() {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(b"text,id\n\"").unwrap();
    let words = vec![b'a'; 1 << 20];
    (0..66).for_each(|_| packed.write_all(&words).unwrap());
    let bytes = packed.finish().unwrap();
    refused(examples("a.csv.gz", &bytes), &["a.csv.gz, row 1", "record of over"]);
}

#[test]
fn what_is_blank_is_counted_and_not_learnt() {
    let lines = r#"{"text": ""}
{"text": " \n"}
{"prompt": "x", "completion": " "}
{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}
{"instruction": "x", "input": null, "output": "\t"}
{"instruction": "x", "output": null}
{"messages": []}
{"prompt": "", "completion": "y"}"#;
    let found = examples("a.jsonl", lines.as_bytes()).unwrap();
    assert_eq!((found.all.len(), found.empty, found.cut), (1, 7, 0));
    assert_eq!(examples("a.csv", b"").unwrap(), Examples::default());
    assert_eq!(examples("a.csv", b"text\n").unwrap(), Examples::default());
    assert_eq!(examples("a.json", b"[]").unwrap(), Examples::default());
    // A cell without quotes that is empty is a text.
    assert_eq!(examples("a.csv", b"prompt,completion\n,y\nx,\n").unwrap().empty, 1);
}

#[test]
fn only_the_completion_of_a_conversation_is_learnt() {
    let line = r#"{"prompt": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Emma."}, {"role": "user", "content": "And he?"}], "completion": [{"role": "assistant", "content": "George."}]}"#;
    let found = examples("a.jsonl", line.as_bytes()).unwrap();
    let (learnt, read) = learnt_and_read(&found.all[0]);
    assert_eq!(learnt, "George.<|im_end|>\n");
    assert!(read.contains("Emma.") && read.contains("And he?"), "{read}");
}

#[test]
fn tools_are_shown_to_the_template() {
    let source = format!("{{% if tools %}}[{{{{ tools[0].name }}}}]{{% endif %}}{CHATML}");
    let template = ChatTemplate::new(&source, TOKENIZER.special_texts()).unwrap();
    let reader = Reader { template: Some(&template), ..reader() };
    let messages =
        r#""messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]"#;
    let lines = format!(
        "{{{messages}, \"tools\": [{{\"name\": \"walk\"}}]}}\n{{{messages}, \"tools\": \"[{{\\\"name\\\": \\\"walk\\\"}}]\"}}\n{{{messages}, \"tools\": []}}"
    );
    let found = reader.lines(&lines, "data").unwrap();
    let read: Vec<String> = found.all.iter().map(|e| learnt_and_read(e).1).collect();
    assert!(read[0].contains("[walk]") && !read[2].contains("[walk]"), "{read:?}");
    assert_eq!(read[0], read[1], "a list written as a text is the list");
}

/// What both answers of a pair say, and the prompt.
fn said(pair: &Pair) -> [String; 3] {
    let (chosen, prompt) = learnt_and_read(&pair.chosen);
    let (rejected, same) = learnt_and_read(&pair.rejected);
    assert_eq!(prompt, same, "the prompt is one");
    [prompt, chosen, rejected]
}

#[test]
fn pairs_have_one_prompt() {
    let user = r#"{"role": "user", "content": "Who?"}"#;
    let says = |text: &str| format!(r#"{{"role": "assistant", "content": "{text}"}}"#);
    let (good, bad) = (says("Emma."), says("Nobody."));
    let chats = [
        format!(r#"{{"prompt": [{user}], "chosen": [{good}], "rejected": [{bad}]}}"#),
        format!(r#"{{"chosen": [{user}, {good}], "rejected": [{user}, {bad}]}}"#),
        format!(r#"{{"prompt": "Who?", "chosen": [{user}, {good}], "rejected": [{user}, {bad}]}}"#),
        format!(r#"{{"prompt": "Who?", "chosen": [{good}], "rejected": [{bad}]}}"#),
    ];
    let found = pairs("a.jsonl", chats.join("\n").as_bytes()).unwrap();
    assert_eq!(found.all.len(), 4);
    for pair in &found.all {
        assert_eq!(pair, &found.all[0]);
    }
    let [prompt, chosen, rejected] = said(&found.all[0]);
    assert!(prompt.ends_with("assistant\n") && prompt.contains("Who?"), "{prompt}");
    assert_eq!((chosen.as_str(), rejected.as_str()), ("Emma.<|im_end|>\n", "Nobody.<|im_end|>\n"));

    let csv = "prompt,chosen,rejected\nShe is, Emma, no one\nShe is, Emma, Emma\nShe is, ,x\n";
    let found = pairs("a.csv", csv.as_bytes()).unwrap();
    assert_eq!(
        (found.all.len(), found.empty),
        (1, 2),
        "equal answers and blank ones teach nothing"
    );
    let [prompt, chosen, rejected] = said(&found.all[0]);
    assert!(
        prompt.ends_with("She is") && chosen.starts_with(" Emma") && rejected.starts_with(" no")
    );
    let short = Reader { context: 4, ..reader() };
    let found = short.pairs(&written("a.csv", csv.as_bytes()).files, &Pool::new(1)).unwrap();
    assert!(found.cut >= 1, "{found:?}");

    for (line, part) in [
        (r#"{"prompt": "x", "chosen": "y"}"#.to_owned(), "`chosen` and `rejected`; it has"),
        (r#"{"chosen": "x", "rejected": "y"}"#.to_owned(), "expected `prompt`"),
        (format!(r#"{{"chosen": [{good}], "rejected": [{bad}]}}"#), "both begin with"),
        (
            format!(r#"{{"prompt": "x", "chosen": [{good}], "rejected": "y"}}"#),
            "`rejected` is a text",
        ),
        (r#"{"prompt": 1, "chosen": "x", "rejected": "y"}"#.to_owned(), "`prompt` is a number"),
    ] {
        refused(pairs("a.jsonl", line.as_bytes()), &["line 1", part]);
    }
    refused(pairs("a.txt", b"x"), &["a.txt", "`chosen`"]);
}

#[test]
fn the_order_is_that_of_the_files_on_any_number_of_threads() {
    let lines: String = (0..1500).map(|i| format!("{{\"text\": \"number {i}\"}}\n")).collect();
    let Written { directory: _directory, files } = written("a.jsonl", lines.as_bytes());
    let read = |threads| reader().examples(&files, &Pool::new(threads)).unwrap();
    let (one, three) = (read(1), read(3));
    assert!(one == three && one.all.len() == 1500);
    assert!(TOKENIZER.decode(&one.all[1234].tokens, true).contains("number 1234"));
}

#[test]
fn tokens_are_found_again() {
    let line = |i: usize| format!("{{\"text\": \"{i} {}\"}}\n", "She was happy. ".repeat(70));
    let lines: String = (0..4200).map(line).collect();
    let data = written("a.jsonl", lines.as_bytes());
    let cache = data.directory.path().join("cache");
    let read = |reader: Reader<'_>, files: &[DataFile]| {
        reader.cached_examples(files, &Pool::new(2), &cache).unwrap()
    };
    let (made, first) = read(reader(), &data.files);
    let (found, second) = read(reader(), &data.files);
    assert!(matches!((first, second), (Cached::Written, Cached::Found)));
    assert!(made == found && made.all.len() == 4200 && made.cut == 4200);
    // What is not what was written is made again.
    let file = std::fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let (again, outcome) = read(reader(), &data.files);
    assert!(matches!(outcome, Cached::Written) && again == made);
    assert!(std::fs::read(&file).unwrap() == bytes);
    // Other options, another template and other data are others.
    let chat = Reader { template: None, ..reader() };
    for other in [Reader { context: 12, ..reader() }, Reader { whole: true, ..reader() }, chat] {
        assert!(matches!(read(other, &data.files).1, Cached::Written));
    }
    let mut changed = lines.into_bytes();
    changed[11] = b'7';
    let changed = written("a.jsonl", &changed);
    assert!(matches!(read(reader(), &changed.files).1, Cached::Written));
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 5);
    // Where there is no room for it, the examples are the same.
    let nowhere = file.join("in a file");
    let (made, outcome) = Reader { context: 9, ..reader() }
        .cached_examples(&data.files, &Pool::new(2), &nowhere)
        .unwrap();
    assert!(matches!(outcome, Cached::Failed(_)) && made.all.len() == 4200);
    let few = written("b.jsonl", b"{\"text\": \"few\"}");
    assert!(matches!(read(reader(), &few.files).1, Cached::Unused));
}
