//! Every mix gives every tensor the type that llama.cpp gives it.

use bevel_base::DType;
use bevel_compress::{MIXES, Preview};
use bevel_model::{Checkpoint, ModelConfig};
use serde_json::{Value, json};

use crate::support::{recipe, write_gguf};

/// Made by `tests/goldens/make_mixes.py`.
fn golden() -> Value {
    serde_json::from_str(include_str!("../goldens/mixes.json")).unwrap()
}

/// The configuration of a model of the golden file.
fn config(model: &Value) -> ModelConfig {
    let (dim, heads) = (model["dim"].as_u64().unwrap(), model["heads"].as_u64().unwrap());
    let experts = model["experts"].as_u64().unwrap();
    let model_type = match model["architecture"].as_str().unwrap() {
        "llama" if experts > 0 => "mixtral",
        "qwen3moe" => "qwen3_moe",
        other => other,
    };
    let json = json!({
        "model_type": model_type, "hidden_size": dim, "num_hidden_layers": model["layers"],
        "num_attention_heads": heads, "num_key_value_heads": model["kv_heads"],
        "head_dim": dim / heads, "intermediate_size": dim, "moe_intermediate_size": dim,
        "max_position_embeddings": 128, "vocab_size": 64, "num_experts": experts,
        "num_local_experts": experts, "num_experts_per_tok": 2,
        "tie_word_embeddings": model["tied"],
    });
    ModelConfig::from_hf(&json, "golden").unwrap()
}

#[track_caller]
fn check(name: &str) {
    let golden = golden();
    let model = &golden[name];
    let config = config(model);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    // As small a type as fits, for the files' sake; only names and shapes matter.
    let source = if config.dim.is_multiple_of(32) { DType::Q4_0 } else { DType::F16 };
    write_gguf(&path, &config, source, |_, len| vec![0.0; len]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut checked = 0;
    let mixes = model["mixes"].as_object().unwrap();
    let both =
        mixes.iter().flat_map(|mix| ["rtn", "importance", "gptq"].map(|method| (mix, method)));
    for ((mix, kinds), method) in both {
        let toml = format!("type = \"{mix}\"\nmethod = \"{method}\"");
        let plan = Preview::new(&checkpoint, &recipe(&toml)).unwrap();
        let weighed = &model["with_importance"][mix];
        for (kind, runs) in kinds.as_object().unwrap() {
            let runs = weighed.get(kind).filter(|_| method != "rtn").unwrap_or(runs);
            let expected: Vec<&str> = runs
                .as_str()
                .unwrap()
                .split(' ')
                .flat_map(|run| {
                    let (count, dtype) = run.split_once('x').unwrap();
                    std::iter::repeat_n(dtype, count.parse().unwrap())
                })
                .collect();
            let of_kind = |name: &str| name == kind || name.ends_with(&format!(".{kind}"));
            let of_this = plan.tensors.iter().filter(|t| of_kind(&t.name));
            let found: Vec<String> = of_this.map(|t| t.to.to_string()).collect();
            // The file of a router or norm keeps its own type, which differs from the golden's.
            if kind != "ffn_gate_inp.weight" {
                assert_eq!(found, expected, "{name}, {mix}, {kind}, {method}");
                checked += found.len();
            }
        }
    }
    assert!(checked > 1000, "only {checked} types were compared");
}

#[test]
fn llama() {
    check("plain");
}

#[test]
fn shared_values_and_tied_head() {
    check("shared");
}

#[test]
fn seventy_billion() {
    check("70b");
    check("qwen-72b");
}

#[test]
fn mixtures_of_experts() {
    check("experts");
    check("many-experts");
}

#[test]
fn rows_that_blocks_do_not_divide() {
    check("narrow");
    check("odd");
}

#[test]
fn fused_projections() {
    check("fused");
}

#[test]
fn every_mix_of_the_golden_file_is_known_and_the_other_way_round() {
    let golden = golden();
    let golden = golden["plain"]["mixes"].as_object().unwrap();
    for mix in &MIXES {
        // llama.cpp has no such name; the type itself is ggml's.
        assert!(golden.contains_key(mix.name) || mix.name == "MXFP4", "{}", mix.name);
    }
    assert_eq!(golden.len() + 1, MIXES.len());
}
