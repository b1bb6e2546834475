//! Calibration tokens: from texts, records and data sets, and sampled from the model.

use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bevel_compress::{Calibration, CalibrationConfig, Error, Result, Source};
use bevel_kernels::Cpu;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Checkpoint, Model};
use tempfile::TempDir;

use crate::support::tiny_austen;

static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Checkpoint::open(&tiny_austen()).unwrap().tokenizer().unwrap());

fn tour() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tour.txt")
}

fn config(samples: usize, tokens: usize) -> CalibrationConfig {
    CalibrationConfig { samples, tokens, ..CalibrationConfig::default() }
}

fn read(config: &CalibrationConfig, path: &Path) -> Result<Calibration> {
    config.read(&[path.to_owned()], &TOKENIZER)
}

/// Writes one file and reads it.
fn read_file(config: &CalibrationConfig, name: &str, bytes: &[u8]) -> Result<Calibration> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, bytes).unwrap();
    read(config, &path)
}

#[track_caller]
fn refused(result: Result<Calibration>, parts: &[&str]) {
    let message = match result {
        Ok(found) => {
            panic!("{} sequences, expected an error with {parts:?}", found.sequences.len())
        }
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// What the sequences say, without marks.
fn text_of(found: &Calibration) -> String {
    found.sequences.iter().map(|tokens| TOKENIZER.decode(tokens, true)).collect()
}

/// Records whose texts tell which of them they are.
fn numbered(count: usize) -> Vec<u8> {
    let line = |i| format!("{{\"id\": {i}, \"text\": \"Emma walked {i} miles to Highbury.\"}}\n");
    (0..count).map(line).collect::<String>().into_bytes()
}

#[test]
fn a_text_is_cut_all_over() {
    let found = read(&config(4, 32), &tour()).unwrap();
    assert_eq!(found.sequences.len(), 4);
    assert!(found.warnings.is_empty(), "{:?}", found.warnings);
    assert!(found.description.contains("4 × 32") && found.description.contains("tour.txt"));
    let whole = fs::read_to_string(tour()).unwrap();
    let quarter = whole.len() / 4;
    let bos = TOKENIZER.bos().filter(|_| TOKENIZER.adds_bos());
    for (i, tokens) in found.sequences.iter().enumerate() {
        assert_eq!(tokens.len(), 32);
        assert_eq!(bos.is_some_and(|bos| tokens[0] == bos), bos.is_some());
        let text = TOKENIZER.decode(tokens, true);
        let at = whole.find(text.trim()).expect("a part of the text");
        // Parts are equal in tokens, nearly so in bytes.
        assert!(at + 1000 > i * quarter && at < (i + 1) * quarter + 1000, "{i}: {at}");
    }
    // The same seed gives the same sequences, another one others.
    assert_eq!(read(&config(4, 32), &tour()).unwrap(), found);
    let other = read(&CalibrationConfig { seed: 1, ..config(4, 32) }, &tour()).unwrap();
    assert_ne!(other.fingerprint, found.fingerprint);
    assert_eq!(found.tokens(), 128);
}

#[test]
fn a_whole_text_comes_in_order_and_complete() {
    let found = read(&config(100_000, 64), &tour()).unwrap();
    let whole = fs::read_to_string(tour()).unwrap();
    let text = text_of(&found);
    assert!(whole.starts_with(&text) && text.len() + 400 > whole.len());
    let warning = format!("holds {} of the 100000", found.sequences.len());
    assert!(found.warnings[0].contains(&warning), "{:?}", found.warnings);
}

/// The calibration sequences of `config`, and those that are held out.
fn with_held_out(config: &CalibrationConfig, count: usize) -> (Calibration, Calibration) {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let cpu = Cpu::new(2).unwrap();
    let mut fetch = |_: &_| unreachable!("nothing is fetched");
    let mut last = (0, 0);
    let mut go_on = |done: usize, total: usize| {
        assert!(done >= last.0 && done <= total && (last.1 == 0 || total == last.1));
        last = (done, total);
        ControlFlow::Continue(())
    };
    config.load_with_held_out(&checkpoint, &cpu, count, &mut fetch, &mut go_on).unwrap()
}

#[test]
fn what_is_held_out_was_not_used() {
    let files =
        |samples| CalibrationConfig { source: Source::Files(vec![tour()]), ..config(samples, 64) };
    let sampled = config(4, 32);
    for config in [files(16), files(200), sampled.clone()] {
        let (used, held_out) = with_held_out(&config, 6);
        assert_eq!(held_out.sequences.len(), 6, "{config:?}");
        for sequence in &held_out.sequences {
            assert_eq!(sequence.len(), config.tokens);
            let half = &sequence[8..24];
            let is_used = used.sequences.iter().any(|s| s.windows(16).any(|run| run == half));
            assert!(!is_used, "{}", TOKENIZER.decode(sequence, true));
        }
        assert_eq!(used, with_held_out(&config, 0).0, "what is held out changes nothing");
    }
    assert_eq!(with_held_out(&sampled, 3).1.sequences, with_held_out(&sampled, 3).1.sequences);
    // Of a text that was used up nothing is left.
    let (used, held_out) = with_held_out(&files(100_000), 6);
    assert!(used.sequences.len() > 250 && held_out.sequences.is_empty());
}

#[test]
fn of_a_long_text_only_pieces_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("long.txt");
    let mut file = fs::File::create(&path).unwrap();
    for i in 0..200_000 {
        writeln!(file, "Line {i} of a text that is long.").unwrap();
    }
    let found = read(&config(16, 64), &path).unwrap();
    assert_eq!(found.sequences.len(), 16);
    for (i, tokens) in found.sequences.iter().enumerate() {
        assert_eq!(tokens.len(), 64);
        let text = TOKENIZER.decode(tokens, true);
        let number = text.trim_start().strip_prefix("Line ").expect("the begin of a line");
        let number: usize = number.split(' ').next().unwrap().parse().unwrap();
        // The lines grow longer, so the parts of the file are not exactly of equal lines.
        assert!(number.abs_diff(200_000 * i / 16) < 25_000, "{i}: {number}");
    }
    assert_eq!(read(&config(16, 64), &path).unwrap(), found);

    // A hole of 20 GB takes neither time nor memory.
    file.set_len(20 << 30).unwrap();
    match read(&config(4, 16), &path) {
        Ok(found) => assert_eq!(found.sequences.len(), 4),
        Err(error) => assert!(error.to_string().contains("less than one"), "{error}"),
    }
}

#[test]
fn too_little_text_and_numbers_without_sense() {
    refused(read_file(&config(4, 512), "a.txt", b"A few words."), &["a.txt", "512 tokens"]);
    refused(read_file(&config(4, 512), "a.txt", b""), &["a.txt", "less than one"]);
    refused(read_file(&config(0, 512), "a.txt", b"x"), &["at least 1"]);
    refused(read_file(&config(1, 1), "a.txt", b"x"), &["at least 8"]);
    refused(read_file(&config(1 << 20, 1 << 20), "a.txt", b"x"), &["too many"]);
    refused(read(&config(1, 8), Path::new("/nowhere/a.txt")), &["/nowhere/a.txt", "No such file"]);
    let words = "It is a truth universally acknowledged. ".repeat(40);
    let mut latin = words.clone().into_bytes();
    latin[100] = 0xe9;
    refused(read_file(&config(1, 8), "a.txt", &latin), &["a.txt", "byte 100", "UTF-8"]);
    refused(read_file(&config(1, 8), "a.txt.gz", words.as_bytes()), &["a.txt.gz", "unpack"]);
}

#[test]
fn marks_spelt_in_a_text_are_text() {
    let eos = TOKENIZER.token(TOKENIZER.eos().unwrap()).unwrap().to_owned();
    let words = format!("Said {eos} she. ").repeat(100);
    let found = read_file(&config(2, 64), "a.txt", words.as_bytes()).unwrap();
    let inner = found.sequences.iter().flat_map(|tokens| &tokens[1..]);
    assert!(inner.into_iter().all(|id| !TOKENIZER.is_special(*id)));
    assert!(text_of(&found).contains(&eos));
}

#[test]
fn records_are_chosen_from_all_over() {
    let found = read_file(&config(8, 64), "a.jsonl", &numbered(20_000)).unwrap();
    assert_eq!(found.sequences.len(), 8);
    let lines: Vec<String> =
        found.sequences.iter().map(|tokens| TOKENIZER.decode(tokens, true)).collect();
    // A number that is cut in two by a sequence's end does not parse.
    let text = lines.join("|");
    let numbers = text.split("walked ").skip(1);
    let numbers: Vec<usize> =
        numbers.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect();
    assert!(numbers.len() > 20 && numbers.is_sorted(), "{numbers:?}");
    assert!(numbers[0] < 7000 && *numbers.last().unwrap() > 13_000, "{numbers:?}");
    // Few records are all taken.
    let found = read_file(&config(1000, 16), "a.jsonl", &numbered(50)).unwrap();
    assert!((0..45).all(|i| text_of(&found).contains(&format!("walked {i} "))));
}

#[test]
fn every_container_gives_the_same_records() {
    let lines = numbered(400);
    let array = format!("[{}]", str::from_utf8(&lines).unwrap().trim().replace('\n', ",\n"));
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&lines).unwrap();
    let zst = |lines: &[u8]| {
        ruzstd::encoding::compress_to_vec(lines, ruzstd::encoding::CompressionLevel::Fastest)
    };
    // As what is appended to a file makes it, with a frame in between that is to be skipped.
    let (head, tail) = lines.split_at(lines.len() / 3);
    let skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00any";
    let frames = [zst(head).as_slice(), skipped, &zst(tail)].concat();
    let marked = [b"\xef\xbb\xbf".as_slice(), &lines].concat();
    let expected = read_file(&config(8, 32), "a.jsonl", &lines).unwrap();
    for (name, bytes) in [
        ("b.ndjson", marked.as_slice()),
        ("b.json", &lines),
        ("b.json", array.as_bytes()),
        ("b.jsonl.gz", &gz.finish().unwrap()),
        ("b.jsonl.zst", &zst(&lines)),
        ("frames.jsonl.zst", &frames),
    ] {
        let found = read_file(&config(8, 32), name, bytes).unwrap();
        assert_eq!(found.fingerprint, expected.fingerprint, "{name}");
    }
}

#[test]
fn parquet_gives_what_json_lines_give() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/goldens/parquet");
    let rows = fs::read(goldens.join("rows.json")).unwrap();
    for field in ["text", "needed", "messages"] {
        let config = CalibrationConfig { field: Some(field.to_owned()), ..config(8, 16) };
        let expected = read_file(&config, "rows.json", &rows).unwrap();
        let found = read(&config, &goldens.join("small-pages.parquet")).unwrap();
        assert_eq!(found.sequences, expected.sequences, "{field}");
        assert_eq!(found.warnings, expected.warnings, "{field}");
    }
    let by_itself = read(&config(4, 16), &goldens.join("plain.parquet")).unwrap();
    assert!(by_itself.warnings.concat().contains("of 40 records hold no text"));
    let cut = fs::read(goldens.join("plain.parquet")).unwrap();
    refused(read_file(&config(4, 16), "a.parquet", &cut[..500]), &["a.parquet", "end is missing"]);
    let wrong = CalibrationConfig { field: Some("body".to_owned()), ..config(4, 16) };
    refused(read(&wrong, &goldens.join("plain.parquet")), &["plain.parquet", "`body`", "needed"]);
}

#[test]
fn bad_records_are_named_by_file_and_line() {
    let check = |name: &str, bytes: &[u8], parts: &[&str]| {
        refused(read_file(&config(1, 8), name, bytes), parts);
    };
    check("a.jsonl", b"{\"text\": \"x\"}\n\n{\"text\": \n", &["a.jsonl, line 3", "no JSON"]);
    check("a.jsonl", b"{\"body\": \"x\"}\n", &["a.jsonl, line 1", "`body`", "--calib-field"]);
    check("a.jsonl", b"{\"text\": \"\xff\"}\n", &["a.jsonl, line 1", "no UTF-8"]);
    check("a.jsonl", b"{\"text\": 7}\n", &["a.jsonl, line 1", "neither a string nor"]);
    check("a.jsonl", b"", &["a.jsonl", "less than one"]);
    check("a.json", b"[{\"text\": \"x\"}, {\"text\": ]", &["a.json", "no JSON"]);
    check("a.json", b"[{\"text\": \"x\"}, {\"body\": 1}]", &["a.json, record 2", "`body`"]);
    check("a.json", b"[{\"text\": \"x\"}", &["a.json", "no JSON", "EOF"]);
    check("a.jsonl.gz", b"no gzip at all", &["a.jsonl.gz"]);
    check("a.jsonl.zst", b"no zstd at all", &["a.jsonl.zst", "zstd"]);
    let deep = format!("{{\"text\": {}1", "[".repeat(100_000));
    check("a.jsonl", deep.as_bytes(), &["a.jsonl, line 1", "recursion"]);
}

#[test]
fn an_endless_line_ends_in_an_error() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"{\"text\": \"").unwrap();
    let zeros = vec![b'0'; 1 << 20];
    (0..66).for_each(|_| gz.write_all(&zeros).unwrap());
    let bytes = gz.finish().unwrap();
    refused(read_file(&config(1, 8), "a.jsonl.gz", &bytes), &["a.jsonl.gz, line 1", "longer than"]);
    refused(read_file(&config(1, 8), "a.json.gz", &bytes), &["a.json.gz", "record of over"]);
}

#[test]
fn a_directory_stands_for_its_files() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("deep")).unwrap();
    refused(read(&config(2, 16), directory.path()), &["has no .txt"]);
    fs::write(at("deep/b.txt"), "Second comes this. ".repeat(30)).unwrap();
    fs::write(at("a.txt"), "First comes this. ".repeat(30)).unwrap();
    fs::write(at("picture.png"), b"\x89PNG").unwrap();
    let found = read(&config(1000, 16), directory.path()).unwrap();
    assert!(text_of(&found).starts_with("First") && text_of(&found).contains("Second"));
    // Where there are records, a text beside them describes them.
    fs::write(at("rows.jsonl"), numbered(50)).unwrap();
    let found = read(&config(4, 16), directory.path()).unwrap();
    assert!(!text_of(&found).contains("First"));
    let both = [at("a.txt"), at("rows.jsonl")];
    refused(config(4, 16).read(&both, &TOKENIZER), &["a.txt", "files of one kind"]);
}

#[test]
fn conversations_go_through_the_template() {
    let directory = TempDir::new().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tiny_austen().join(file), directory.path().join(file)).unwrap();
    }
    let template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}({{ strftime_now('%Y') }})";
    fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
    let chatty = Tokenizer::from_hf(directory.path()).unwrap();
    let path = directory.path().join("a.jsonl");
    let line = |role: &str, i: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"{role}\", \"content\": \"How is {i}?\"}}, {{\"role\": \"assistant\", \"content\": \"Well.\"}}]}}\n"
        )
    };
    let lines: String = (0..40).map(|i| line(if i == 7 { "system" } else { "user" }, i)).collect();
    fs::write(&path, lines).unwrap();
    let paths = [path];
    let found = config(1000, 16).read(&paths, &chatty).unwrap();
    let said: String = found.sequences.iter().map(|tokens| chatty.decode(tokens, true)).collect();
    assert!(said.contains("[user] How is 12?\n[assistant] Well.\n(2025)"), "{said}");
    assert!(!said.contains("How is 7?"));
    let warned = found.warnings.concat();
    assert!(warned.contains("1 of 40 conversations") && warned.contains("no system"), "{warned}");

    // A model without a template reads them as text, and says so.
    let plain = config(1000, 16).read(&paths, &TOKENIZER).unwrap();
    assert!(text_of(&plain).contains("How is 7?\n\nWell."), "{}", text_of(&plain));
    assert!(plain.warnings.concat().contains("plain text"));
}

#[test]
fn sources_are_named_as_on_the_command_line() {
    for name in ["self", "dir/a.txt", "hub:owner/name", "hub:owner/name@v1:en/train"] {
        assert_eq!(name.parse::<Source>().unwrap().to_string(), name);
    }
    assert!(matches!("hub:name".parse::<Source>(), Err(Error::Hub(_))));
}

#[test]
fn a_data_set_comes_through_the_caller() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("train-0.jsonl");
    fs::write(&file, numbered(100)).unwrap();
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let config =
        CalibrationConfig { source: "hub:owner/name:train".parse().unwrap(), ..config(4, 32) };
    let mut asked = Vec::new();
    let mut fetch = |repo: &bevel_formats::hub::RepoId| {
        asked.push(repo.to_string());
        Ok(vec![file.clone()])
    };
    let cpu = Cpu::new(1).unwrap();
    let go_on = &mut |_: usize, _: usize| ControlFlow::Continue(());
    let found = config.load(&checkpoint, &cpu, &mut fetch, go_on).unwrap();
    assert_eq!(found.sequences.len(), 4);
    assert!(found.description.contains("hub:owner/name:train"), "{}", found.description);
    let long = CalibrationConfig { tokens: 4096, ..config };
    refused(long.load(&checkpoint, &cpu, &mut fetch, go_on), &["4096", "context of 1024"]);
    assert_eq!(asked, ["owner/name:train"; 2]);
}

#[test]
fn a_model_writes_its_own() {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let sample = |threads: usize, seed: u64| {
        let cpu = Cpu::new(threads).unwrap();
        let config = CalibrationConfig { seed, ..config(6, 40) };
        let mut last = 0;
        let mut on_tokens = |done: usize, total: usize| {
            assert!(done > last && total == 240, "{done} after {last}");
            last = done;
            ControlFlow::Continue(())
        };
        config.load(&checkpoint, &cpu, &mut |_| panic!("nothing to fetch"), &mut on_tokens).unwrap()
    };
    let found = sample(1, 3);
    assert_eq!(found.sequences.len(), 6);
    assert!(found.sequences.iter().all(|tokens| tokens.len() == 40));
    assert!(found.sequences.windows(2).all(|pair| pair[0] != pair[1]));
    assert_eq!(sample(3, 3), found, "threads change nothing");
    assert_ne!(sample(1, 4).fingerprint, found.fingerprint);
    // English of a kind: most words are those of the novels that the model has read.
    let text = text_of(&found);
    let known = fs::read_to_string(tour()).unwrap().to_lowercase();
    let words: Vec<&str> = text.split_whitespace().collect();
    let common = words.iter().filter(|word| known.contains(&word.to_lowercase())).count();
    assert!(common * 2 > words.len(), "{common} of {}: {text}", words.len());
}

#[test]
fn sampling_stops_when_told() {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let cpu = Cpu::new(1).unwrap();
    let model = Model::load(checkpoint, &cpu, &mut |_| ()).unwrap();
    let mut steps = 0;
    let mut on_tokens = |_: usize, _: usize| {
        steps += 1;
        if steps == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome = config(2, 64).sample(&model, &cpu, &tokenizer, &mut on_tokens);
    assert!(matches!(outcome, Err(Error::Stopped)));
    let go_on = &mut |_: usize, _: usize| ControlFlow::Continue(());
    refused(config(2, 2000).sample(&model, &cpu, &tokenizer, go_on), &["2000", "context of 1024"]);
}
