use crate::{check_failure, json, output, output_with_input, scratch, stdout};

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tour.txt");

#[test]
fn both_conventions() {
    let common =
        ["eval", "tiny-austen", "--text", TEXT, "--ctx", "64", "--tokens", "256", "--json"];
    let llama = json(&common);
    assert_eq!(llama["convention"], "llama.cpp");
    assert_eq!((&llama["windows"], &llama["scored_tokens"]), (&4.into(), &124.into()));
    let strided = json(&[&common[..], &["--stride", "32"]].concat());
    assert_eq!(strided["convention"], "strided");
    assert_eq!((&strided["windows"], &strided["scored_tokens"]), (&7.into(), &255.into()));
    for value in [&llama, &strided] {
        let number = |key: &str| value[key].as_f64().unwrap();
        assert!((number("perplexity").ln() - number("nats_per_token")).abs() < 1e-9);
        // The model has perplexity 54 on unseen Austen; this is a short and easy piece of it.
        assert!((15.0..150.0).contains(&number("perplexity")), "{value}");
        assert!((1.0..3.0).contains(&number("bits_per_byte")), "{value}");
    }
}

#[test]
fn figures_for_people() {
    let args = ["eval", "tiny-austen", "--text", TEXT, "--ctx", "64", "--tokens", "128"];
    let text = stdout(&output(&args));
    for part in ["perplexity ", " ± ", "95 %", "bits per byte", "62 tokens", "2 windows of 64"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[test]
fn texts_that_cannot_be_used() {
    let dir = scratch();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let eval = |text: &str| output(&["eval", "tiny-austen", "--text", text]);
    check_failure(&eval("no-such.txt"), 1, &["`no-such.txt`"]);
    check_failure(&eval(dir.path().to_str().unwrap()), 1, &["cannot read"]);
    check_failure(&eval(&file("empty.txt", b"")), 1, &["is empty"]);
    check_failure(&eval(&file("short.txt", b"Too short.")), 1, &["a window takes 512"]);
    let broken = eval(&file("broken.txt", b"fine\nnot \xfffine"));
    check_failure(&broken, 1, &["0xFF", "offset 9", "line 2"]);
    let piped = output_with_input(&["eval", "tiny-austen", "--text", "-"], b"\xc3");
    check_failure(&piped, 1, &["stdin is not UTF-8"]);
    let stride = output(&["eval", "tiny-austen", "--text", TEXT, "--stride", "600"]);
    check_failure(&stride, 1, &["a stride of 600"]);
}

#[test]
fn speed_as_a_table_and_as_json() {
    let args = ["bench", "tiny-austen", "-p", "32", "-n", "4", "-r", "2"];
    let text = stdout(&output(&args));
    for part in ["prefill", "decode", "median", "memory", "threads"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    let value = json(&[&args[..], &["--json", "-d", "10"]].concat());
    assert_eq!(value["depth"], 10);
    assert_eq!(value["parameters"], 4_196_608);
    for what in ["prefill", "decode"] {
        assert_eq!(value[what]["samples"].as_array().unwrap().len(), 2);
        for key in ["mean", "deviation", "median", "min", "max"] {
            assert!(value[what][key].as_f64().unwrap() >= 0.0, "{what} {key}");
        }
    }
    assert!(value["machine"]["isa"].is_string() && value["machine"]["threads"].is_number());
}
