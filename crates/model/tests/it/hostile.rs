//! Wrong, broken and hostile models: refused with a message that names the file and what is wrong
//! in it, before anything large is allocated.

use std::path::{Path, PathBuf};

use bevel_base::DType;
use bevel_formats::gguf::{Array, GgufWriter, Metadata, Value};
use bevel_formats::{TensorSpec, safetensors};
use bevel_model::Checkpoint;
use bevel_model::tokenizer::Tokenizer;
use indexmap::IndexMap;
use serde_json::json;
use tempfile::TempDir;

/// Name → type, shape, data.
pub(crate) type Tensors = IndexMap<String, (DType, Vec<usize>, Vec<u8>)>;

pub(crate) fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/families").join(case)
}

fn specs(tensors: &Tensors) -> Vec<TensorSpec> {
    let spec = |(name, (dtype, shape, _)): (&String, &(DType, Vec<usize>, Vec<u8>))| {
        TensorSpec::new(name, *dtype, shape.clone())
    };
    tensors.iter().map(spec).collect()
}

/// A golden directory with changes to its `config.json` and its tensors.
fn hf(case: &str, edit: impl FnOnce(&mut serde_json::Value, &mut Tensors)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read(golden(case).join("config.json")).unwrap();
    let mut config = serde_json::from_slice(&config).unwrap();
    let files = safetensors::Checkpoint::open(&golden(case)).unwrap();
    let mut tensors: Tensors = (files.tensors().iter())
        .map(|(name, info)| {
            let data = files.tensor(name).unwrap().data().to_vec();
            (name.clone(), (info.dtype, info.shape.dims().to_vec(), data))
        })
        .collect();
    edit(&mut config, &mut tensors);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut writer =
        safetensors::SafetensorsWriter::create(&path, &IndexMap::new(), &specs(&tensors), None)
            .unwrap();
    for (name, (.., data)) in &tensors {
        writer.write(name, data).unwrap();
    }
    writer.finish().unwrap();
    dir
}

/// The GGUF file that a golden directory becomes, with changes to its metadata and tensors.
pub(crate) fn gguf(case: &str, edit: impl FnOnce(&mut Metadata, &mut Tensors)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&golden(case)).unwrap();
    let mut metadata = Metadata::new();
    checkpoint.config().to_gguf(&mut metadata);
    let mut tensors: Tensors = (checkpoint.tensors().iter())
        .map(|(name, entry)| {
            let data = checkpoint.read(name).unwrap().into_owned();
            (name.clone(), (entry.dtype, entry.shape.dims().to_vec(), data))
        })
        .collect();
    edit(&mut metadata, &mut tensors);
    let mut writer = GgufWriter::create(&file(&dir), &metadata, &specs(&tensors), None).unwrap();
    for (name, (.., data)) in &tensors {
        writer.write(name, data).unwrap();
    }
    writer.finish().unwrap();
    dir
}

pub(crate) fn file(dir: &TempDir) -> PathBuf {
    dir.path().join("model.gguf")
}

/// Opening fails with a message that names `path` and says all of `words`.
#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let message = Checkpoint::open(path).map(|_| ()).expect_err("it opens").to_string();
    let path = path.display().to_string();
    for word in words.iter().copied().chain([path.as_str()]) {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[track_caller]
fn config_refused(case: &str, key: &str, value: serde_json::Value, words: &[&str]) {
    let dir = hf(case, |config, _| match value {
        serde_json::Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
        value => config[key] = value,
    });
    refused(dir.path(), words);
}

#[test]
fn config_values_no_model_has() {
    #[track_caller]
    fn check(key: &str, value: serde_json::Value, words: &[&str]) {
        config_refused("llama", key, value, words);
    }
    for key in ["hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"] {
        check(key, json!(null), &[key, "is missing", "config.json"]);
        check(key, json!("32"), &[key, "whole number"]);
        check(key, json!(-1), &[key, "-1"]);
        check(key, json!(1.5), &[key, "1.5"]);
        check(key, json!(0), &["is 0"]);
        check(key, json!(u64::MAX), &["18446744073709551615"]);
    }
    check("vocab_size", json!(4_000_000_000u64), &["vocabulary size", "4000000000"]);
    check("num_hidden_layers", json!(1_000_000_000), &["layers", "1000000000"]);
    check("head_dim", json!(0), &["head dimension", "is 0"]);
    check("head_dim", json!(7), &["head dimension", "is 7", "even"]);
    check("head_dim", json!(1 << 26), &["head dimension", "67108864"]);
    check("num_attention_heads", json!(5), &["heads", "5", "2 key-value heads"]);
    check("num_key_value_heads", json!(0), &["key-value heads", "is 0"]);
    check("rms_norm_eps", json!(-1e-5), &["norm epsilon", "-0.00001"]);
    check("rope_parameters", json!({"rope_theta": 0}), &["theta", "is 0"]);
    check("rope_parameters", json!({"partial_rotary_factor": 0.1}), &["rotary dimension", "is 0"]);
    check("rope_parameters", json!({"rope_type": "spiral"}), &["rope_type", "spiral", "yarn"]);
    check("hidden_act", json!("relu"), &["hidden_act", "relu", "silu"]);
    check("model_type", json!("mamba"), &["architecture `mamba`", "llama", "qwen2"]);
    check("model_type", json!(null), &["architecture ``"]);
    check("quantization_config", json!({"quant_method": "gptq"}), &["quantization_config", "bits"]);
    check("quantization_config", json!({"quant_method": "hqq"}), &["hqq", "gptq", "MLX"]);
    check("sliding_window", json!(0), &["sliding window", "is 0"]);
}

#[test]
fn config_values_of_other_families() {
    let check = config_refused;
    check("qwen2", "use_sliding_window", json!("yes"), &["use_sliding_window", "true or false"]);
    let many = json!(2_000_000_000u64);
    let dir = hf("qwen2", |config, _| {
        config["use_sliding_window"] = json!(true);
        config["sliding_window"] = json!(4);
        config["num_hidden_layers"] = many;
        config.as_object_mut().unwrap().remove("layer_types");
    });
    refused(dir.path(), &["layers", "2000000000"]);
    check("gemma3", "layer_types", json!(["full_attention"]), &["layer_types", "1 entries for 3"]);
    check("mixtral", "num_local_experts", json!(0), &["experts", "is 0"]);
    check("mixtral", "num_local_experts", json!(1_000_000), &["experts", "1000000"]);
    check("mixtral", "num_experts_per_tok", json!(5), &["experts", "is 4 with 5 used"]);
    // One expert more than there are, and the most that a configuration may ask for.
    check("mixtral", "num_local_experts", json!(5), &["experts.4", "missing"]);
    let dir = hf("mixtral", |config, _| {
        (config["num_local_experts"], config["num_hidden_layers"]) = (json!(4096), json!(10_000));
    });
    refused(dir.path(), &["experts.4", "missing"]);
    let rope = json!({"rope_type": "longrope", "rope_theta": 1e4,
        "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0, 4.0]});
    check("phi3_long", "rope_parameters", rope, &["short", "4"]);
    let rope = json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": "x"});
    check("phi3_long", "rope_parameters", rope, &["long_factor", "list of numbers"]);
}

#[test]
fn directories_that_are_no_model() {
    let dir = tempfile::tempdir().unwrap();
    refused(dir.path(), &["config.json"]);
    refused(&dir.path().join("absent"), &["no such file"]);

    std::fs::write(dir.path().join("some.gguf"), b"GGUF").unwrap();
    refused(dir.path(), &["config.json", "some.gguf"]);
    std::fs::write(dir.path().join("config.json"), b"{\"model_type\": ").unwrap();
    refused(dir.path(), &["config.json", "JSON"]);
    std::fs::write(dir.path().join("config.json"), b"[]").unwrap();
    refused(dir.path(), &["config.json", "object"]);
    std::fs::copy(golden("llama").join("config.json"), dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["safetensors"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02}q\0.").unwrap();
    refused(dir.path(), &["pytorch_model.bin", "pickle", "safetensors"]);
    let index = json!({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}});
    let path = dir.path().join("model.safetensors.index.json");
    std::fs::write(path, index.to_string()).unwrap();
    refused(dir.path(), &["model-00001-of-00001.safetensors", "no such file"]);

    let message = Tokenizer::from_hf(dir.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
    assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
    std::fs::write(dir.path().join("tokenizer.json"), b"{}").unwrap();
    let message = Tokenizer::from_hf(dir.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains("model"), "{message}");
}

#[test]
fn tensors_of_a_directory_that_do_not_fit() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    let dir = hf("llama", |_, tensors| drop(tensors.shift_remove(Q)));
    refused(dir.path(), &[Q, "missing"]);
    let dir = hf("llama", |_, tensors| drop(tensors.shift_remove("model.embed_tokens.weight")));
    refused(dir.path(), &["model.embed_tokens.weight", "missing"]);
    let dir = hf("llama", |_, tensors| drop(tensors.shift_remove("lm_head.weight")));
    refused(dir.path(), &["lm_head.weight", "missing"]);
    let dir = hf("llama", |_, tensors| tensors[Q].1 = vec![16, 64]);
    refused(dir.path(), &[Q, "[16, 64]", "[32, 32]"]);
    let dir = hf("llama", |_, tensors| tensors[Q].1 = vec![1024]);
    refused(dir.path(), &[Q, "[1024]", "[32, 32]"]);
    let dir = hf("llama", |_, tensors| tensors[Q].0 = DType::I16);
    refused(dir.path(), &[Q, "I16"]);
    let dir = hf("mixtral", |_, tensors| {
        let name = "model.layers.0.block_sparse_moe.experts.2.w1.weight";
        tensors[name].1.reverse();
    });
    refused(dir.path(), &["experts.2.w1"]);
    let dir = hf("llama", |config, _| config["num_hidden_layers"] = json!(3));
    refused(dir.path(), &["model.layers.2.", "missing"]);
    let norm = "model.layers.0.self_attn.q_norm.weight".to_owned();
    let dir = hf("llama", |_, tensors| {
        tensors.insert(norm.clone(), (DType::F32, vec![8], vec![0; 32]));
    });
    refused(dir.path(), &[&norm, "no such tensor"]);

    let dir = hf("llama", |_, _| {});
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    refused(dir.path(), &["model.safetensors", "model."]);
    std::fs::write(&path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    refused(dir.path(), &["model.safetensors", "git-lfs"]);
}

#[test]
fn gguf_files_that_do_not_fit() {
    let set = |case, key: &str, value: Value| {
        gguf(case, |metadata, _| drop(metadata.insert(key.to_owned(), value)))
    };
    let architecture = |name: &str| Value::String(name.to_owned());
    let check = |dir: TempDir, words: &[&str]| refused(&file(&dir), words);
    check(set("llama", "general.architecture", architecture("rwkv7")), &["`rwkv7`", "llama"]);
    check(set("llama", "general.architecture", Value::U32(1)), &["architecture ``"]);
    check(set("llama", "llama.block_count", Value::U32(0)), &["layers", "is 0"]);
    check(set("llama", "llama.block_count", Value::U32(3)), &["blk.2.", "missing"]);
    check(set("llama", "llama.block_count", Value::U64(1 << 40)), &["layers", "1099511627776"]);
    check(set("llama", "llama.block_count", Value::U32(1)), &["blk.1.", "no such tensor"]);
    check(set("llama", "llama.block_count", architecture("2")), &["block_count", "whole number"]);
    check(set("llama", "llama.embedding_length", Value::I32(-32)), &["embedding_length"]);
    check(set("llama", "llama.attention.head_count", Value::U32(0)), &["is 0"]);
    check(set("llama", "llama.attention.key_length", Value::U32(5)), &["attention.value_length"]);
    let nan = Value::F32(f32::NAN);
    check(set("llama", "llama.attention.layer_norm_rms_epsilon", nan), &["norm epsilon", "NaN"]);
    let layers = Value::Array(Array::I32(vec![2, 4]));
    check(set("llama", "llama.attention.head_count_kv", layers), &["differs between layers"]);
    check(set("mixtral", "llama.expert_count", Value::U32(3)), &["blk.0.ffn_gate", "[3, "]);
    check(set("mixtral", "llama.expert_count", Value::U32(0)), &["blk.0.", "missing"]);
    check(set("mixtral", "llama.expert_used_count", Value::U32(9)), &["experts", "9 used"]);

    check(gguf("llama", |m, _| drop(m.shift_remove("llama.context_length"))), &["context_length"]);
    let extra = |name: &'static str, len: usize| {
        gguf("llama", move |_, tensors| {
            tensors.insert(name.to_owned(), (DType::F32, vec![len], vec![0; 4 * len]));
        })
    };
    check(extra("blk.0.attn_norm.bias", 32), &["blk.0.attn_norm.bias", "wrong results"]);
    check(extra("blk.0.attn_q.bias", 31), &["blk.0.attn_q.bias", "[31]", "[32]"]);
    check(extra("rope_freqs.weight", 5), &["rope_freqs.weight", "[5]", "[4]"]);
    check(extra("rope_freqs.weight", 1 << 17), &["rope_freqs.weight", "[131072]", "[4]"]);
    check(
        gguf("llama", |_, tensors| drop(tensors.shift_remove("output_norm.weight"))),
        &["output_norm.weight", "missing"],
    );
    check(
        gguf("llama", |_, tensors| tensors["blk.1.ffn_up.weight"].0 = DType::I16),
        &["blk.1.ffn_up.weight", "I16"],
    );

    let dir = gguf("llama", |_, _| {});
    let bytes = std::fs::read(file(&dir)).unwrap();
    std::fs::write(file(&dir), &bytes[..bytes.len() - 64]).unwrap();
    refused(&file(&dir), &["tensor `"]);
}
