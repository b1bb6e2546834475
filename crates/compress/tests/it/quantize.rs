use std::ops::ControlFlow;
use std::path::Path;

use bevel_base::DType;
use bevel_compress::{Error, Options, Preview, Progress, Recipe, Stage};
use bevel_formats::gguf::GgufFile;
use bevel_kernels::Cpu;
use bevel_model::{Checkpoint, ModelConfig};
use sha2::{Digest, Sha256};

use crate::support::{
    convert, convert_with, hf_config, listing, recipe, tiny_austen, write_gguf, write_llama,
};

fn go_on(_: Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn the_same_source_and_recipe_give_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let recipe = recipe("type = \"Q4_K_M\"");
    let files = [1, 2, 5].map(|threads| {
        let out = directory.path().join(format!("{threads}.gguf"));
        let (options, cpu) = (Options::default(), Cpu::new(threads).unwrap());
        bevel_compress::quantize(&checkpoint, &recipe, None, &out, &options, &cpu, &mut go_on)
            .unwrap();
        std::fs::read(out).unwrap()
    });
    assert!(files[0] == files[1] && files[0] == files[2]);
}

#[test]
fn the_output_tells_where_it_comes_from() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    write_llama(&source, DType::F16);
    let recipe = recipe("type = \"Q5_K_S\"\noutput_type = \"Q8_0\"");
    convert(&source, &recipe, &out).unwrap();
    let file = GgufFile::open(&out).unwrap();
    let text = |key: &str| file.metadata()[key].as_str().unwrap().to_owned();
    assert_eq!(text("bevel.recipe").parse::<Recipe>().unwrap(), recipe);
    let digest = Sha256::digest(std::fs::read(&source).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(text("bevel.source.sha256"), digest);
    assert_eq!(text("bevel.version"), env!("CARGO_PKG_VERSION"));
    assert_eq!(file.metadata()["general.file_type"].as_usize(), Some(16));
    assert_eq!(file.metadata()["general.quantization_version"].as_usize(), Some(2));
    assert_eq!(text("somebody.else"), "keeps this");
}

#[test]
fn the_report_adds_up() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    write_llama(&source, DType::F32);
    let report = convert(&source, &recipe("type = \"Q8_0\""), &out).unwrap();
    let file = GgufFile::open(&out).unwrap();
    let stored: u64 = file.tensors().values().map(|t| t.byte_len() as u64).sum();
    assert_eq!(report.totals.bytes_after, stored);
    assert_eq!(report.tensors.len(), file.tensors().len());
    assert_eq!(report.totals.bits_per_weight_before, 32.0);
    for tensor in &report.tensors {
        let packed = tensor.to == DType::Q8_0;
        assert_eq!(packed, tensor.shape.dims().len() > 1, "{}", tensor.name);
        // Values spread evenly over a block and rounded to one of 255 steps: 1/255 ÷ √12 of the
        // range, which is about √3 of their root mean square.
        let expected = if packed { 0.002..0.006 } else { 0.0..1e-30 };
        let found = tensor.relative_error;
        assert!(expected.contains(&found), "{}: {found}", tensor.name);
    }
    let worst = report.worst(3);
    assert!(worst.len() == 3 && worst[0].relative_error >= worst[2].relative_error);
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
}

#[track_caller]
fn check_plan(toml: &str, expected: &[(&str, DType)]) {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let plan = Preview::new(&checkpoint, &recipe(toml)).unwrap();
    for (name, dtype) in expected {
        let planned = plan.tensors.iter().find(|t| t.name == *name).unwrap();
        assert_eq!(planned.to, *dtype, "{name} with {toml}");
    }
    assert!(plan.warnings.is_empty(), "{toml}: {:?}", plan.warnings);
}

#[test]
fn recipes_decide_about_tensors() {
    use DType::*;
    let (up, norm, embedding) =
        ("blk.1.ffn_up.weight", "blk.1.ffn_norm.weight", "token_embd.weight");
    check_plan("type = \"Q4_K_S\"", &[(up, Q4_K), (norm, F32), (embedding, Q6_K)]);
    check_plan("type = \"q4_k_s\"\npure = true", &[(up, Q4_K), (embedding, Q4_K)]);
    check_plan("type = \"Q4_0\"\noutput_type = \"F16\"", &[(up, Q4_0), (embedding, F16)]);
    check_plan("type = \"Q4_0\"\nembedding_type = \"Q5_1\"", &[(embedding, Q5_1)]);
    check_plan(
        "type = \"Q4_0\"\nkeep = [\"blk.1.*\"]",
        &[(up, BF16), ("blk.2.ffn_up.weight", Q4_0)],
    );
    let overridden = "type = \"Q4_0\"
        tensor = [{ pattern = \"*.1.ffn_*\", type = \"Q6_K\" }, { pattern = \"*up*\", type = \"Q8_0\" }]";
    check_plan(overridden, &[(up, Q6_K), (norm, F32), ("blk.2.ffn_up.weight", Q8_0)]);
    check_plan("type = \"keep\"", &[(up, BF16), (norm, F32), (embedding, BF16)]);
}

#[test]
fn recipes_that_ask_for_nonsense_are_refused() {
    for (toml, reason) in [
        ("type = \"Q9\"", "unknown type `Q9`; known are F32"),
        ("type = \"q4km\"", "did you mean `Q4_K_M`? known are F32"),
        ("type = \"Q6-K\"", "did you mean `Q6_K`?"),
        ("type = \"IQ4_LN\"", "did you mean `IQ4_NL`?"),
        ("type = \"Q4_0\"\noutput_type = \"I32\"", "weights are floating point or packed"),
        ("type = \"Q4_0\"\ntypo = 1", "typo"),
        ("pure = true", "type"),
        ("type = \"Q4_0\"\n[gptq]\ndamping = nan", "damping = NaN: it is a part, from 0 to 1"),
        ("type = \"Q4_0\"\ngroup_size = 32", "`group_size` is for codes in a directory"),
        ("type = \"Q4_0\"\nsymmetric = false", "`symmetric` is for codes in a directory"),
        ("type = \"Q4_K_M\"\nformat = \"awq\"", "`format` is for codes in a directory"),
        ("type = \"W4\"\npure = true", "`pure` is for the mixes of GGUF files"),
        ("type = \"Q4_0\"\n[gptq]\ndrift = -1.0", "drift = -1: it is a part, from 0 to 1"),
    ] {
        let error = toml.parse::<Recipe>().unwrap_err().to_string();
        assert!(error.contains(reason), "{toml}: {error}");
    }
}

/// A model whose rows of 288 values K-quants do not fit.
fn write_narrow(path: &Path) {
    let mut json = hf_config("llama");
    json["hidden_size"] = 288.into();
    let config = ModelConfig::from_hf(&json, "test").unwrap();
    write_gguf(path, &config, DType::F16, |_, len| vec![0.5; len]);
}

#[test]
fn strict_refuses_what_would_be_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    write_narrow(&source);
    let k_quants = recipe("type = \"Q4_K_S\"");
    let strict = Options { strict: true, ..Options::default() };
    let error = convert_with(&source, &k_quants, &out, &strict).unwrap_err();
    assert!(matches!(&error, Error::Strict(_)), "{error}");
    assert!(
        error.to_string().contains("`token_embd.weight`, become Q5_0 instead of Q4_K"),
        "{error}"
    );
    assert_eq!(listing(directory.path()), ["a.gguf"]);

    let report = convert(&source, &k_quants, &out).unwrap();
    // q, k, v, gate and up of both layers; the output's rule asks for Q8_0 itself.
    assert_eq!(report.totals.fallbacks, 11);
    assert!(report.warnings[0].starts_with("9 tensors"), "{:?}", report.warnings);

    let typo = recipe("type = \"Q8_0\"\nkeep = [\"blk.9.*\"]");
    let report = convert(&source, &typo, &directory.path().join("c.gguf")).unwrap();
    assert!(report.warnings[0].contains("`blk.9.*` matches no tensor"), "{:?}", report.warnings);
}

#[test]
fn values_that_are_no_numbers_are_named() {
    for (value, text) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        for toml in ["type = \"Q8_0\"", "type = \"keep\""] {
            let directory = tempfile::tempdir().unwrap();
            let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
            write_llama(&source, DType::F32);
            // Damage value 40,000 of a tensor, far behind the first chunk.
            let range = GgufFile::open(&source).unwrap().tensors()["blk.1.ffn_up.weight"].range();
            let mut bytes = std::fs::read(&source).unwrap();
            bytes[range.start + 160_000..][..4].copy_from_slice(&value.to_le_bytes());
            std::fs::write(&source, bytes).unwrap();
            let error = convert(&source, &recipe(toml), &out).unwrap_err().to_string();
            let expected = format!("tensor `blk.1.ffn_up.weight`: value 40000 is {text}");
            assert!(error.contains(&expected), "{toml}: {error}");
            assert_eq!(listing(directory.path()), ["a.gguf"]);
        }
    }
}

#[test]
fn what_exists_is_not_replaced_by_accident() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    write_llama(&source, DType::F16);
    std::fs::write(&out, "precious").unwrap();
    let recipe = recipe("type = \"Q4_0\"");
    let force = Options { force: true, ..Options::default() };
    let error = convert(&source, &recipe, &out).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error}");
    assert_eq!(std::fs::read(&out).unwrap(), b"precious");
    convert_with(&source, &recipe, &out, &force).unwrap();
    assert!(std::fs::read(&out).unwrap().starts_with(b"GGUF"));

    let before = std::fs::read(&source).unwrap();
    let detour = directory.path().join(".").join("a.gguf");
    let error = convert_with(&source, &recipe, &detour, &force).unwrap_err();
    assert!(matches!(error, Error::OverwritesInput(_)), "{error}");
    assert!(std::fs::read(&source).unwrap() == before);
}

#[test]
fn a_run_that_is_stopped_leaves_nothing() {
    for stage in [Stage::Hash, Stage::Write] {
        for name in ["b.gguf", "b"] {
            let directory = tempfile::tempdir().unwrap();
            let (source, out) = (directory.path().join("a.gguf"), directory.path().join(name));
            write_llama(&source, DType::F16);
            let checkpoint = Checkpoint::open(&source).unwrap();
            let mut stop = |p: Progress<'_>| {
                if p.stage == stage && p.done > p.total / 2 {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            };
            let (options, cpu) = (Options::default(), Cpu::new(2).unwrap());
            let recipe = recipe("type = \"F32\"");
            let outcome =
                bevel_compress::convert(&checkpoint, &recipe, &out, &options, &cpu, &mut stop);
            assert!(matches!(outcome, Err(Error::Stopped)), "{stage:?} {name}");
            assert_eq!(listing(directory.path()), ["a.gguf"], "{stage:?} {name}");
        }
    }
}

#[test]
fn what_is_quantized_already_is_copied_or_warned_about() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write_llama(&path("a.gguf"), DType::F32);
    let pure = recipe("type = \"Q4_0\"\npure = true");
    convert(&path("a.gguf"), &pure, &path("b.gguf")).unwrap();
    let same = convert(&path("b.gguf"), &pure, &path("c.gguf")).unwrap();
    assert_eq!(same.totals.requantized, 0);
    assert!(same.tensors.iter().all(|t| t.relative_error == 0.0));
    let again = convert(&path("b.gguf"), &recipe("type = \"Q8_0\""), &path("d.gguf")).unwrap();
    assert_eq!(again.totals.requantized, 16);
    assert!(
        again.warnings[0].contains("16 of them to as many bits or more"),
        "{:?}",
        again.warnings
    );
}

#[test]
fn halves_that_overflow_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    let config = ModelConfig::from_hf(&hf_config("llama"), "test").unwrap();
    write_gguf(&source, &config, DType::F32, |name, len| {
        let mut values = vec![0.5; len];
        if name == "blk.0.attn_v.weight" {
            (values[7], values[9000]) = (-70_000.0, 1e30);
        }
        values
    });
    let recipe = recipe("type = \"F16\"");
    let report = convert(&source, &recipe, &out).unwrap();
    assert_eq!(report.totals.saturated, 2);
    assert!(report.warnings[0].contains("`blk.0.attn_v.weight`: 2 values are too large for F16"));
    let strict = Options { strict: true, force: true, ..Options::default() };
    let error = convert_with(&source, &recipe, &directory.path().join("c.gguf"), &strict);
    assert!(matches!(error, Err(Error::Strict(_))));
}

#[test]
fn codebook_types_are_worth_calibration_and_that_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("a.gguf"), directory.path().join("b.gguf"));
    write_llama(&source, DType::F32);
    let toml = "type = \"Q4_K\"\n[[tensor]]\npattern = \"blk.*\"\ntype = \"IQ3_S\"";
    let report = convert(&source, &recipe(toml), &out).unwrap();
    assert!(report.tensors.iter().any(|t| t.to == DType::IQ3_S));
    assert!(report.warnings.iter().any(|w| w.contains("--method importance")));
}
