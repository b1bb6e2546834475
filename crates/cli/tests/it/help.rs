use crate::{check_failure, output, scratch, stdout};

const VERBS: [&str; 13] = [
    "inspect",
    "convert",
    "quantize",
    "finetune",
    "imatrix",
    "eval",
    "bench",
    "run",
    "chat",
    "serve",
    "tour",
    "completions",
    "man",
];

#[test]
fn every_verb_explains_itself() {
    let all = stdout(&output(&["--help"]));
    for verb in VERBS {
        assert!(all.contains(&format!("\n  {verb} ")), "{verb}");
        let help = stdout(&output(&[verb, "--help"]));
        assert!(help.contains(&format!("Usage: bevel {verb}")), "{help}");
        assert!(help.contains("--threads"), "global options are options of `{verb}`");
    }
}

#[test]
fn version() {
    assert_eq!(stdout(&output(&["--version"])), concat!("bevel ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn wrong_usage_exits_with_2() {
    for (args, expected) in [
        (&[][..], "Usage: bevel"),
        (&["frobnicate"][..], "frobnicate"),
        (&["run"][..], "<MODEL>"),
        (&["eval", "tiny-austen"][..], "--text"),
        (&["run", "tiny-austen", "x", "--tmep", "1"][..], "--temp"),
        (&["run", "tiny-austen", "x", "--temp", "-1"][..], "from 0 up"),
        (&["run", "tiny-austen", "x", "--top-p", "1.5"][..], "from 0 to 1"),
        (&["run", "tiny-austen", "x", "--temp", "nan"][..], "from 0 up"),
        (&["run", "tiny-austen", "x", "--stop", ""][..], "--stop"),
        (&["run", "tiny-austen", "x", "--kv", "q4"][..], "f16"),
        (&["run", "tiny-austen", "x", "-f", "y"][..], "--file"),
        (&["run", "tiny-austen", "x", "-t", "100000"][..], "0 to 1024"),
        (&["run", "tiny-austen", "x", "-q", "-v"][..], "--verbose"),
        (&["run", "tiny-austen", "x", "--ctx", "-5"][..], "invalid value '-5' for '--ctx"),
        (&["run", "tiny-austen", "x", "--seed", "-1"][..], "invalid value '-1' for '--seed"),
        (&["quantize", "tiny-austen", "q4km"][..], "did you mean `Q4_K_M`?"),
        (&["bench", "tiny-austen", "-r", "0"][..], "1..=10000"),
    ] {
        check_failure(&output(args), 2, &[expected]);
    }
}

#[test]
fn completions_and_manual_come_from_the_same_definition() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = stdout(&output(&["completions", shell]));
        assert!(script.contains("repeat-penalty"), "{shell}");
    }
    assert!(stdout(&output(&["man"])).starts_with(".ie"));
    let dir = scratch();
    let pages = dir.path().join("man1");
    stdout(&output(&["man", "--dir", pages.to_str().unwrap()]));
    for verb in VERBS {
        let page = std::fs::read_to_string(pages.join(format!("bevel-{verb}.1"))).unwrap();
        assert!(page.contains("Global options") || page.contains("GLOBAL OPTIONS"), "{verb}");
    }
}
