use std::fs;

use serde_json::Value;

use crate::{bevel, check_failure, output, scratch, stderr, stdout};

#[test]
fn the_whole_way_on_the_embedded_model() {
    let dir = scratch();
    let out = dir.path().join("new/tour");
    let args = ["tour", "tiny-austen", "--quick", "--json", "-o", out.to_str().unwrap()];
    let output = output(&args);
    let value: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let variants = value["variants"].as_array().unwrap();
    let names: Vec<_> = variants.iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["tiny-austen", "Q8_0", "Q4_K_M"]);
    let size = |i: usize| variants[i]["bytes"].as_u64().unwrap();
    assert!(size(0) > size(1) && size(1) > size(2));
    let perplexity = |i: usize| variants[i]["perplexity"]["perplexity"].as_f64().unwrap();
    assert!((perplexity(1) / perplexity(0) - 1.0).abs() < 0.01, "8 bits change next to nothing");
    assert!((perplexity(2) / perplexity(0) - 1.0).abs() < 0.1, "4 bits change little");
    assert!(out.join("tiny-austen.Q4_K_M.gguf").is_file());

    let page = fs::read_to_string(out.join("report.html")).unwrap();
    for part in ["<svg", "Q4_K_M", "prefers-color-scheme: dark", "Pride and Prejudice"] {
        assert!(page.contains(part), "no `{part}` in the report");
    }
    for outside in ["http://", "https://", "<script", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the report reaches out by `{outside}`");
    }
    assert_eq!(page.matches("<circle").count(), 2 * variants.len());
}

#[test]
fn without_any_network_the_embedded_model_stands_in() {
    let dir = scratch();
    let out = dir.path().join("tour");
    let output = bevel(&["tour", "--offline", "--quick", "-o", out.to_str().unwrap()])
        .env("BEVEL_CACHE", dir.path().join("cache"))
        .output()
        .unwrap();
    let text = stdout(&output);
    assert!(text.contains("tiny-austen") && text.contains("report.html"), "{text}");
    assert!(stderr(&output).contains("goes on with tiny-austen"), "{}", stderr(&output));
}

#[test]
fn a_directory_that_cannot_be_written_is_noticed_first() {
    let dir = scratch();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let out = file.join("tour");
    let refused = output(&["tour", "tiny-austen", "-o", out.to_str().unwrap()]);
    check_failure(&refused, 1, &["cannot create", "file/tour"]);
}
