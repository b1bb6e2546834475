use std::path::Path;

use bevel_base::DType;
use bevel_compress::{Error, Options};
use bevel_formats::gguf::GgufFile;
use bevel_formats::safetensors;
use bevel_model::Checkpoint;
use bevel_model::tokenizer::Tokenizer;
use serde_json::Value;

use crate::support::{
    contents, convert, convert_with, listing, recipe, tiny_austen, write_hf, write_llama,
};

/// Every stored tensor of a Hugging Face directory: name, type, bytes.
fn stored(dir: &Path) -> Vec<(String, DType, Vec<u8>)> {
    let files = safetensors::Checkpoint::open(dir).unwrap();
    let tensor = |name: &String| {
        let view = files.tensor(name).unwrap();
        (name.clone(), view.dtype(), view.data().to_vec())
    };
    let mut all: Vec<_> = files.tensors().keys().map(tensor).collect();
    all.sort();
    all
}

#[track_caller]
fn check_round_trip(model_type: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write_hf(&path("hf"), model_type, 17);
    let (keep, bf16) = (recipe("type = \"keep\""), recipe("type = \"BF16\""));
    convert(&path("hf"), &keep, &path("a.gguf")).unwrap();
    convert(&path("a.gguf"), &bf16, &path("back")).unwrap();
    assert!(stored(&path("hf")) == stored(&path("back")), "{model_type}: safetensors differ");
    let config = |path: &Path| format!("{:?}", Checkpoint::open(path).unwrap().config());
    assert_eq!(config(&path("hf")), config(&path("back")), "{model_type}");
    // What is kept as it is makes the same file again.
    convert(&path("a.gguf"), &keep, &path("kept")).unwrap();
    convert(&path("kept"), &keep, &path("b.gguf")).unwrap();
    assert!(contents(&path("a.gguf")) == contents(&path("b.gguf")), "{model_type}: GGUF differs");
}

#[test]
fn hugging_face_to_gguf_and_back() {
    for model_type in ["llama", "mixtral", "qwen2", "gemma2", "phi3", "olmo2"] {
        check_round_trip(model_type);
    }
}

#[test]
fn a_real_model_keeps_its_tokenizer_and_its_tensors() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    convert(&tiny_austen(), &recipe("type = \"keep\""), &path("a.gguf")).unwrap();
    convert(&path("a.gguf"), &recipe("type = \"BF16\""), &path("hf")).unwrap();
    assert!(stored(&tiny_austen()) == stored(&path("hf")));
    let files = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(listing(&path("hf")), files);
    let generation = std::fs::read(path("hf").join("generation_config.json")).unwrap();
    let generation: Value = serde_json::from_slice(&generation).unwrap();
    assert_eq!(generation["bos_token_id"], 0);
    let text = "It is a truth universally acknowledged <|im_end|>";
    let tokens = |tokenizer: Tokenizer| tokenizer.encode(text, true, true).unwrap();
    let expected = tokens(Tokenizer::from_hf(&tiny_austen()).unwrap());
    assert_eq!(tokens(Tokenizer::from_hf(&path("hf")).unwrap()), expected);
    let file = GgufFile::open(&path("a.gguf")).unwrap();
    assert_eq!(tokens(Tokenizer::from_gguf(file.metadata()).unwrap()), expected);
    assert_eq!(file.metadata()["general.file_type"].as_usize(), Some(32));
}

#[test]
fn splitting_and_joining_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write_llama(&path("a.gguf"), DType::F16);
    let keep = recipe("type = \"keep\"");
    let split = Options { shard_bytes: Some(300_000), ..Options::default() };
    let report = convert_with(&path("a.gguf"), &keep, &path("b.gguf"), &split).unwrap();
    assert!(report.files.len() > 3, "{:?}", report.files);
    assert!(!path("b.gguf").exists());
    // Joined beside its shards, under their common name.
    convert(&report.files[0], &keep, &path("b.gguf")).unwrap();
    assert!(contents(&path("a.gguf")) == contents(&path("b.gguf")));
    let error = convert_with(&report.files[0], &keep, &path("b.gguf"), &split).unwrap_err();
    assert!(matches!(error, Error::OverwritesInput(_)), "{error}");

    let sharded = convert_with(&path("a.gguf"), &keep, &path("hf"), &split).unwrap();
    assert!(sharded.files.iter().all(|file| file.is_file()), "{:?}", sharded.files);
    convert(&path("hf"), &keep, &path("c.gguf")).unwrap();
    assert!(contents(&path("a.gguf")) == contents(&path("c.gguf")));
}

#[test]
fn a_directory_to_another_type_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write_hf(&path("a"), "gemma2", 3);
    std::fs::write(path("a").join("notes.txt"), "mine").unwrap();
    std::fs::write(path("a").join("pytorch_model.bin"), "not this").unwrap();
    convert(&path("a"), &recipe("type = \"F32\""), &path("b")).unwrap();
    assert_eq!(listing(&path("b")), ["config.json", "model.safetensors", "notes.txt"]);
    let config = std::fs::read(path("b").join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["torch_dtype"], "float32");
    assert!(stored(&path("b")).iter().all(|t| t.1 == DType::F32));
    convert(&path("b"), &recipe("type = \"BF16\""), &path("c")).unwrap();
    assert!(stored(&path("a")) == stored(&path("c")));
}

#[test]
fn packed_weights_become_floats_in_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write_llama(&path("a.gguf"), DType::Q8_0);
    convert(&path("a.gguf"), &recipe("type = \"keep\""), &path("kept")).unwrap();
    assert!(stored(&path("kept")).iter().any(|t| t.1 == DType::F16));
    convert(&path("a.gguf"), &recipe("type = \"F32\""), &path("wide")).unwrap();
    assert!(stored(&path("wide")).iter().all(|t| t.1 == DType::F32));
    let error = convert(&path("a.gguf"), &recipe("type = \"Q4_0\""), &path("no")).unwrap_err();
    assert!(error.to_string().contains("cannot hold Q4_0"), "{error}");
}

#[test]
fn a_directory_is_not_named_like_a_file() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "pytorch_model.BIN"] {
        let out = directory.path().join(name);
        let error = convert(&tiny_austen(), &recipe("type = \"keep\""), &out).unwrap_err();
        assert!(error.to_string().contains("choose a directory's name"), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn a_directory_with_other_things_in_it_is_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (keep, force) = (recipe("type = \"keep\""), Options { force: true, ..Options::default() });
    write_llama(&path("a.gguf"), DType::F16);
    std::fs::create_dir(path("home")).unwrap();
    std::fs::write(path("home").join("thesis.tex"), "years").unwrap();
    let error = convert_with(&path("a.gguf"), &keep, &path("home"), &force).unwrap_err();
    assert!(error.to_string().contains("`thesis.tex` and no model"), "{error}");
    assert_eq!(listing(&path("home")), ["thesis.tex"]);

    convert(&path("a.gguf"), &keep, &path("hf")).unwrap();
    let error = convert(&path("a.gguf"), &keep, &path("hf")).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error}");
    convert_with(&path("a.gguf"), &recipe("type = \"F32\""), &path("hf"), &force).unwrap();
    assert!(stored(&path("hf")).iter().all(|t| t.1 == DType::F32));
    assert_eq!(listing(directory.path()), ["a.gguf", "hf", "home"]);
}
