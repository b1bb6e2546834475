//! Importance matrices, from a text to a smaller model.

use crate::{check_failure, json, output, scratch, stderr, stdout};

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tour.txt");

#[test]
fn a_matrix_is_made_and_quantized_with() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (matrix, model) = (path("m.gguf"), path("small.gguf"));
    let data = ["--calib", TEXT, "--calib-samples", "8", "--calib-tokens", "64"];
    let make = |out: &str, more: &[&str]| {
        output(&[&["imatrix", "tiny-austen", "-o", out][..], &data, more].concat())
    };
    let text = stdout(&make(&matrix, &[]));
    for part in ["28 tensors, 512 tokens", "8 × 64 tokens of", "tour.txt", "wrote "] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    check_failure(&make(&matrix, &[]), 1, &["exists", "--force"]);
    let made = json(
        &[&["imatrix", "tiny-austen", "-o", &matrix, "--force", "--json"][..], &data].concat(),
    );
    assert_eq!((&made["tensors"], &made["tokens"]), (&28.into(), &512.into()));

    let quantize = |dtype: &str, out: &str, more: &[&str]| {
        output(&[&["quantize", "tiny-austen", dtype, "-o", out, "--strict"][..], more].concat())
    };
    let plain = path("plain.gguf");
    stdout(&quantize("Q2_K", &plain, &[]));
    stdout(&quantize("Q2_K", &model, &["--imatrix", &matrix]));
    let size = |path: &str| std::fs::metadata(path).unwrap().len();
    // As many blocks, other ones, and a recipe that names the matrix.
    assert!((1..2048).contains(&(size(&model) - size(&plain))));
    let measure = |model: &str| {
        let args = ["eval", model, "--against", "tiny-austen", "--text", TEXT, "--ctx", "64"];
        json(&[&args[..], &["--tokens", "1024", "--json"]].concat())
    };
    let divergence = |found: &serde_json::Value| found["kl"]["value"].as_f64().unwrap();
    let with = measure(&model);
    let carried = with["file"]["provenance"]["recipe"].as_str().unwrap();
    for part in ["[imatrix]", "m.gguf", "sha256 = ", "method = \"importance\""] {
        assert!(carried.contains(part), "no `{part}` in: {carried}");
    }
    assert_ne!(divergence(&with), divergence(&measure(&plain)));

    // The older format says the same, but for roundings.
    let (older, other) = (path("m.dat"), path("other.gguf"));
    stdout(&make(&older, &[]));
    stdout(&quantize("Q2_K", &other, &["--imatrix", &older]));
    let (found, expected) = (divergence(&measure(&other)), divergence(&with));
    assert!((found - expected).abs() < 0.05 * expected, "{found} and {expected}");

    let refused = quantize("Q2_K", &path("x.gguf"), &["--imatrix", &matrix, "--calib", TEXT]);
    check_failure(&refused, 2, &["--imatrix", "--calib"]);
    let refused = quantize("Q2_K", &path("x.gguf"), &["--imatrix", &matrix, "--method", "gptq"]);
    check_failure(&refused, 1, &["`importance`, not with `gptq`"]);
    let refused = quantize("W4", &path("x"), &["--imatrix", &matrix]);
    check_failure(&refused, 1, &["for W4 use calibration data"]);
    let refused = quantize("Q2_K", &path("x.gguf"), &["--imatrix", &model]);
    check_failure(&refused, 1, &["small.gguf", "importance matrix"]);
    let planned =
        output(&["quantize", "tiny-austen", "Q2_K", "--dry-run", "--imatrix", &path("no")]);
    check_failure(&planned, 1, &["cannot read"]);
}

#[test]
fn where_a_matrix_can_go() {
    let dir = scratch();
    let out = dir.path().join("m.safetensors");
    let refused = output(&["imatrix", "tiny-austen", "-o", out.to_str().unwrap(), "--calib", TEXT]);
    check_failure(&refused, 1, &["m.safetensors", "`.gguf` or `.dat`"]);
    let refused = output(&["imatrix", "tiny-austen"]);
    assert!(stderr(&refused).contains("--output"), "{}", stderr(&refused));
}
