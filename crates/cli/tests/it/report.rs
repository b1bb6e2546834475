//! The report that every run of `quantize` leaves.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::{check_failure, output, scratch, stdout};

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tour.txt");

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

#[track_caller]
fn quantize(what: &[&str], out: &str) -> String {
    stdout(&output(&[&["quantize", "tiny-austen"], what, &["-o", out]].concat()))
}

/// A calibrated run.
#[track_caller]
fn calibrated(what: &[&str], out: &str) -> String {
    let calib = ["--calib", TEXT, "--calib-samples", "12", "--calib-tokens", "128"];
    quantize(&[what, &calib].concat(), out)
}

#[track_caller]
fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A page that needs nothing beside it and holds `parts`.
#[track_caller]
pub(crate) fn check_page(path: impl AsRef<Path>, parts: &[&str]) {
    let page = fs::read_to_string(path).unwrap();
    for part in parts {
        assert!(page.contains(part), "no `{part}` in the page");
    }
    for outside in ["http://", "https://", "<script", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page reaches out by `{outside}`");
    }
    for tag in ["section", "table", "details", "svg", "tr", "td", "p", "code", "ul"] {
        let count = |start: &str| page.matches(start).count();
        let opened = count(&format!("<{tag}>")) + count(&format!("<{tag} "));
        assert_eq!(opened, count(&format!("</{tag}>")), "<{tag}>");
    }
}

#[test]
fn a_budgets_report_has_the_prediction_beside_the_measurement() {
    let dir = scratch();
    let (measured, blind) = (path(&dir, "a.gguf"), path(&dir, "b.gguf"));
    let budget = ["--target-bpw", "4.5", "--types", "Q3_K,Q5_K"];
    let text = calibrated(&budget, &measured);
    assert!(text.contains("predicted loss in all"), "{text}");
    let report = read(path(&dir, "a.report.json"));
    let predicted = report["allocation"]["predicted_kl"].as_f64().unwrap();
    let found = report["measured"]["kl"]["value"].as_f64().unwrap();
    assert!((0.3..3.0).contains(&(predicted / found)), "{predicted} for {found}");
    let lines =
        [">predicted ", "the sum of what each tensor’s type costs alone", " lines</summary>"];
    check_page(path(&dir, "a.report.html"), &lines);
    calibrated(&[&budget[..], &["--no-eval"]].concat(), &blind);
    check_page(path(&dir, "b.report.html"), &["KL divergence, predicted"]);
}

#[test]
fn a_calibrated_run_tells_what_was_lost() {
    let dir = scratch();
    let text = calibrated(&["Q4_K_M", "--method", "gptq"], &path(&dir, "a<b>.gguf"));
    assert!(
        text.contains("KL divergence from the source") && text.contains("report.html"),
        "{text}"
    );
    let report = read(path(&dir, "a<b>.report.json"));
    let tensors = report["tensors"].as_array().unwrap();
    let solved: Vec<&Value> = tensors.iter().filter_map(|t| t["solved"].get(0)).collect();
    assert_eq!(solved.len(), 4 * 7 + 1);
    let number = |value: &Value| value.as_f64().unwrap();
    let better = solved.iter().filter(|s| number(&s["error"]) < number(&s["rtn_error"])).count();
    assert!(better > 25, "{better} of {} matrices are better than rounded", solved.len());
    assert!(solved.iter().all(|s| s["tokens"] == 12 * 128));
    let steps: Vec<&str> = report["times"]["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s[0].as_str().unwrap())
        .collect();
    for step in ["hash", "statistics", "solve", "compare", "forward", "keep", "write"] {
        assert!(steps.contains(&step), "no `{step}` in {steps:?}");
    }
    assert_eq!(report["calibration"]["tokens"], 12 * 128);
    assert!(number(&report["statistics"]["operations_per_second"]) > 1e6);
    let measured = &report["measured"];
    assert!(
        measured["text"].as_str().unwrap().ends_with("tour.txt, apart from what calibration used")
    );
    let kl = number(&measured["kl"]["value"]);
    assert!((1e-4..0.1).contains(&kl), "{kl}");
    assert!(number(&measured["decode_tokens_per_second"]) > 0.0);
    assert!(report["not_measured"].is_null());
    check_page(
        path(&dir, "a<b>.report.html"),
        &["Q4_K_M, by gptq", "a&lt;b&gt;", "attn_q", "same likeliest token", "12 × 128 tokens of"],
    );

    // Two runs on the same data can be compared.
    calibrated(&["Q8_0", "--method", "gptq"], &path(&dir, "b.gguf"));
    let page = path(&dir, "page.html");
    let all = [path(&dir, "a<b>.report.json"), path(&dir, "b.report.json")];
    let compared = stdout(&output(&["compare", &all[0], &all[1], "-o", &page, "--json"]));
    let compared: Value = serde_json::from_str(&compared).unwrap();
    assert_eq!(compared["runs"][1]["kl"]["value"], measured["kl"]["value"]);
    assert!(compared["runs"][0]["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
    check_page(&page, &["2 models against tiny-austen", "Size and divergence"]);
}

#[test]
fn a_run_without_calibration_says_why_it_was_not_measured() {
    let dir = scratch();
    let out = path(&dir, "small");
    quantize(&["W4"], &out);
    let report = read(PathBuf::from(&out).join("report.json"));
    assert!(report["measured"].is_null());
    assert!(report["not_measured"].as_str().unwrap().contains("--eval"), "{report}");
    check_page(PathBuf::from(&out).join("report.html"), &["were not measured", "weights moved, %"]);
    let page = path(&dir, "page.html");
    let json = format!("{out}/report.json");
    check_failure(&output(&["compare", &json, "-o", &page]), 1, &["tells of no quality", "--eval"]);
    // A directory with a report is a model still, for bevel and to be replaced.
    stdout(&output(&["inspect", &out]));
    quantize(&["W4", "--force", "--eval", TEXT], &out);
    let report = read(&json);
    assert!(report["measured"]["kl"]["value"].as_f64().unwrap() > 0.0);
    assert_eq!(report["measured"]["text"], TEXT);
}

#[test]
fn reports_go_where_they_are_wanted() {
    let dir = scratch();
    let files = || {
        let names = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
        let mut names: Vec<String> = names.map(|n| n.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let out = path(&dir, "a.gguf");
    quantize(&["Q8_0", "--no-report"], &out);
    assert_eq!(files(), ["a.gguf"]);
    quantize(&["Q8_0", "--force", "--report", &path(&dir, "why.json")], &out);
    assert_eq!(files(), ["a.gguf", "why.html", "why.json"]);
    let printed: Value =
        serde_json::from_str(&quantize(&["Q8_0", "--force", "--json"], &out)).unwrap();
    assert_eq!(files(), ["a.gguf", "a.report.html", "a.report.json", "why.html", "why.json"]);
    assert_eq!(read(path(&dir, "a.report.json")), printed);
    fs::remove_file(&out).unwrap();
    let again = output(&["quantize", "tiny-austen", "Q8_0", "-o", &out]);
    check_failure(&again, 1, &["a.report.json` exists", "--no-report", "--force"]);
    let missing =
        output(&["quantize", "tiny-austen", "Q8_0", "-o", &out, "--no-report", "--eval", "no.txt"]);
    assert_eq!(missing.status.code(), Some(2));
    let missing =
        output(&["quantize", "tiny-austen", "Q8_0", "-o", &out, "--force", "--eval", "no.txt"]);
    check_failure(&missing, 1, &["cannot read `no.txt`"]);
    assert!(!Path::new(&out).exists(), "what is missing is noticed first");
}
