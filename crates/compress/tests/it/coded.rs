//! Checkpoints whose linear layers are codes and scales in tensors of their own, as other programs
//! write them: inspected, converted, quantized again.

use std::path::{Path, PathBuf};

use bevel_base::DType;
use bevel_compress::inspect;
use bevel_formats::safetensors;
use bevel_model::Checkpoint;
use serde_json::Value;

use crate::support::{convert, listing, recipe};

/// What GPTQModel, MLX and others wrote; the script that made them lies beside them.
fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens/quantized").join(case)
}

const CASES: [&str; 4] =
    ["llama_gptq_act_order", "llama_mlx_tied", "qwen3moe_pack_quantized", "llama_nf4"];

#[test]
fn sizes_and_parameters_are_those_of_the_weights() {
    let gptq = inspect(&golden("llama_gptq_act_order")).unwrap();
    assert_eq!(gptq.note, None);
    assert!(gptq.quantization.unwrap().starts_with("GPTQ, 4 bits"));
    let layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96;
    assert_eq!(gptq.parameters, 2 * 80 * 64 + layer + 3 * 64);
    let stored: u64 = gptq.tensors.iter().map(|t| t.bytes).sum();
    assert_eq!(gptq.tensor_bytes, stored);
    assert_eq!(gptq.bits_per_weight, stored as f64 * 8.0 / gptq.parameters as f64);
    // Of two experts one is used.
    let moe = inspect(&golden("qwen3moe_pack_quantized")).unwrap();
    assert_eq!(moe.active_parameters, Some(moe.parameters - 3 * 64 * 32));
    assert!(moe.quantization.unwrap().starts_with("compressed-tensors"));
}

#[test]
fn a_directory_of_plain_weights_says_nothing_of_codes() {
    for case in CASES {
        let directory = tempfile::tempdir().unwrap();
        let (from, out) = (directory.path().join("in"), directory.path().join("out"));
        std::fs::create_dir(&from).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden(case).join(file), from.join(file)).unwrap();
        }
        // GPTQ's and AWQ's programs repeat the configuration.
        for file in ["quantize_config.json", "quant_config.json", "generation_config.json"] {
            std::fs::write(from.join(file), "{\"bits\": 4}").unwrap();
        }
        convert(&from, &recipe("type = \"F32\""), &out).unwrap();
        assert_eq!(
            listing(&out),
            ["config.json", "generation_config.json", "model.safetensors"],
            "{case}"
        );
        let config: Value =
            serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let keys: Vec<&String> = config.as_object().unwrap().keys().collect();
        assert!(keys.iter().all(|key| !key.contains("quantization")), "{case}: {keys:?}");
        assert_eq!(config["torch_dtype"], "float32");

        let (coded, plain) = (Checkpoint::open(&from).unwrap(), Checkpoint::open(&out).unwrap());
        assert!(plain.scheme().is_none());
        assert_eq!(plain.unused(), [""; 0], "{case}");
        assert_eq!(coded.parameters(), plain.parameters(), "{case}");
        for name in coded.tensors().keys() {
            assert!(!plain.entry(name).unwrap().is_coded());
            assert_eq!(
                coded.read_f32(name).unwrap(),
                plain.read_f32(name).unwrap(),
                "{case}: {name}"
            );
        }
    }
}

#[test]
fn codes_become_halves_where_no_type_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let coded = golden("llama_mlx_tied");
    for out in ["hf", "a.gguf"] {
        convert(&coded, &recipe("type = \"keep\""), &path(out)).unwrap();
        let plain = Checkpoint::open(&path(out)).unwrap();
        assert_eq!(plain.entry("token_embd.weight").unwrap().dtype, DType::F16, "{out}");
        assert_eq!(plain.entry("blk.0.ffn_down.weight").unwrap().dtype, DType::F16, "{out}");
    }
    let files = safetensors::Checkpoint::open(&path("hf")).unwrap();
    assert!(files.tensors().keys().all(|name| name.ends_with(".weight")));
    assert_eq!(files.tensors()["model.norm.weight"].dtype, DType::BF16);
}

#[test]
fn quantizing_codes_again_is_told_with_what_they_took() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("a.gguf");
    let from = golden("llama_gptq_act_order");
    let report = convert(&from, &recipe("type = \"Q8_0\""), &out).unwrap();
    let told = report.warnings.iter().any(|w| w.contains("quantized before") && w.contains("GPTQ"));
    assert!(told, "{:?}", report.warnings);
    assert_eq!(report.totals.requantized, 7);
    assert_eq!(report.totals.bytes_before, Checkpoint::open(&from).unwrap().tensor_bytes());
    let (coded, packed) = (Checkpoint::open(&from).unwrap(), Checkpoint::open(&out).unwrap());
    let name = "blk.0.attn_k.weight";
    let (w, v) = (coded.read_f32(name).unwrap(), packed.read_f32(name).unwrap());
    let most = w.iter().fold(0f32, |most, w| most.max(w.abs()));
    assert!(w.iter().zip(&v).all(|(w, v)| (w - v).abs() <= most / 127.0));
    assert!(w != v);
}
