//! The fuzz targets of this crate, replayed and mutated for a short time.

use std::time::Duration;

use crate::replay::{corpus, replay};

#[path = "../../../../fuzz/model.rs"]
mod model;

const TIME: Duration = Duration::from_secs(3);

/// Checks that the target accepts its seeds, and that it withstands all other inputs while it holds
/// no more than `overhead` bytes beside what it holds for each byte of input.
fn check(name: &str, seeds: &[&str], overhead: usize, target: fn(&[u8]) -> bool) {
    for seed in seeds {
        let bytes = std::fs::read(corpus(name).join(seed)).unwrap();
        assert!(target(&bytes), "`{seed}` is refused");
    }
    replay(name, TIME, overhead, |bytes| {
        target(bytes);
    });
}

/// Compiled expressions take megabytes at most, whatever they look like.
const EXPRESSIONS: usize = 64 << 20;

#[test]
fn tokenizer_json() {
    let seeds = ["byte_level.json", "split.json", "sentence_piece.json"];
    check("tokenizer_json", &seeds, EXPRESSIONS, model::tokenizer_json);
}

#[test]
fn tokenizer_config() {
    let seeds = ["full.json", "template.json"];
    check("tokenizer_config", &seeds, EXPRESSIONS, model::tokenizer_config);
}

#[test]
fn tokenizer_gguf() {
    let seeds = ["gpt2.gguf", "sentence_piece.gguf"];
    check("tokenizer_gguf", &seeds, EXPRESSIONS, model::tokenizer_gguf);
}

#[test]
fn chat_templates() {
    let seeds = ["chatml.jinja", "macro.jinja", "tools.jinja"];
    check("chat_template", &seeds, 64 << 20, model::chat_template);
}

#[test]
fn config_json() {
    let seeds = ["llama3.json", "gemma3.json", "phi3.json", "qwen3_moe.json"];
    check("config_json", &seeds, 1 << 20, model::config_json);
}

#[test]
fn model_gguf() {
    let seeds = [
        "llama.gguf",
        "super_blocks.gguf",
        "codebooks.gguf",
        "experts.gguf",
        "gemma3.gguf",
        "phi3.gguf",
    ];
    check("model_gguf", &seeds, 1 << 20, model::model_gguf);
}
