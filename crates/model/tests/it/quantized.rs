//! Checkpoints that other programs quantized, against transformers' logits with the weights as those
//! programs unpack them. `goldens/quantized/make_quantized_models.py` made them.

use std::path::{Path, PathBuf};

use bevel_base::DType;
use bevel_kernels::{Cpu, Isa};
use bevel_model::{Checkpoint, Model, Precision};

use crate::families::{blockwise_logits, expected_in, logits, relative_error, write_gguf};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/quantized").join(case)
}

/// What a checkpoint's logits may be away from others, as parts of their norm.
struct Near {
    /// From transformers', with weights as f32: a program may have rounded what it unpacked to half
    /// precision.
    unpacked: f64,
    /// From those with weights as f32: kernels may round activations to int8.
    kernels: f64,
}

const EXACT: f64 = 1e-4;
const HALVES: f64 = 1e-2;
const INT8: f64 = 2e-2;
/// Where levels are rounded to integers too.
const INTEGER_LEVELS: f64 = 3e-2;

#[track_caller]
fn check(case: &str, scheme: &str, near: Near) {
    let dir = golden(case);
    let (tokens, want) = expected_in(&dir);
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("model.gguf");
    write_gguf(&Checkpoint::open(&dir).unwrap(), &file);
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let name = checkpoint.scheme().unwrap().name();
        assert!(name.starts_with(scheme), "{case}: {name}");
        assert_eq!(checkpoint.unused(), [""; 0], "{case}");
        let unpacked = blockwise_logits(&checkpoint, &cpu, &tokens, Precision::Single);
        let check = |what: &str, found: &[f32], want: &[f32], limit: f64| {
            let error = relative_error(found, want);
            assert!(error < limit, "{case} on {isa}, {what}: relative error {error:.2e}");
        };
        check("block by block", &unpacked, &want, near.unpacked);
        let model = Model::load(checkpoint, &cpu, &mut |_| {}).unwrap();
        assert_eq!(model.weights().warnings(), [""; 0], "{case}");
        // Tensors that are not quantized are bf16.
        let rounded = if isa.has_bf16_products() { HALVES } else { EXACT };
        for steps in [&[40][..], &[17, 1, 1, 3]] {
            let found = logits(&model, &cpu, &tokens, steps);
            check("from codes", &found, &unpacked, near.kernels.max(rounded));
        }
        let model = model.with_exact_products();
        check("from codes, exact", &logits(&model, &cpu, &tokens, &[40]), &unpacked, EXACT);
        let model = Model::load(Checkpoint::open(&file).unwrap(), &cpu, &mut |_| {}).unwrap();
        check("as a GGUF file", &logits(&model, &cpu, &tokens, &[40]), &unpacked, rounded);
    }
}

#[test]
fn gptq_with_columns_in_an_order_of_each_modules_own() {
    check(
        "llama_gptq_act_order",
        "GPTQ, 4 bits, groups of 32",
        Near { unpacked: HALVES, kernels: INT8 },
    );
}

#[test]
fn awq() {
    check("qwen2_awq", "AWQ, 4 bits, groups of 32", Near { unpacked: HALVES, kernels: INT8 });
}

#[test]
fn compressed_tensors_of_experts() {
    check(
        "qwen3moe_pack_quantized",
        "compressed-tensors",
        Near { unpacked: HALVES, kernels: INT8 },
    );
}

#[test]
fn nvfp4_has_groups_of_half_a_register() {
    check("llama_nvfp4", "compressed-tensors", Near { unpacked: HALVES, kernels: INT8 });
}

#[test]
fn float8_of_fused_projections() {
    check("phi3_float8", "compressed-tensors", Near { unpacked: HALVES, kernels: EXACT });
}

#[test]
fn nf4_with_scales_that_are_quantized_too() {
    check("llama_nf4", "bitsandbytes", Near { unpacked: EXACT, kernels: INTEGER_LEVELS });
}

#[test]
fn mlx_quantizes_the_embedding_that_is_the_head_too() {
    check("llama_mlx_tied", "MLX, 4 bits, groups of 32", Near { unpacked: EXACT, kernels: INT8 });
}

#[test]
fn mlx_with_fused_projections_and_a_head() {
    check("phi3_mlx", "MLX, 4 bits, groups of 32", Near { unpacked: EXACT, kernels: INT8 });
}

#[test]
fn sizes_are_those_of_the_files() {
    let checkpoint = Checkpoint::open(&golden("llama_mlx_tied")).unwrap();
    let entry = checkpoint.entry("blk.0.ffn_up.weight").unwrap();
    assert_eq!((entry.dtype, entry.shape.dims()), (DType::F32, &[96, 64][..]));
    // Two groups of 32 in a row, each with an f32 scale and minimum.
    assert_eq!(entry.stored_len(), 96 * (64 / 2 + 2 * 8));
    assert_eq!(entry.byte_len(), 96 * 64 * 4);
    assert!(entry.is_coded());
    assert!(!checkpoint.entry("output_norm.weight").unwrap().is_coded());
    let layer = 4 * 64 * 64 - 2 * 32 * 64 + 3 * 64 * 96;
    assert_eq!(checkpoint.parameters(), 80 * 64 + layer + 3 * 64);
    let norms = 3 * 64 * 2;
    let coded = (80 * 64 + layer) / 64 * (32 + 16);
    assert_eq!(checkpoint.tensor_bytes() - coded, norms * 2);
}

#[test]
fn a_module_without_its_scales_is_named_as_in_the_files() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::copy(golden("llama_nvfp4").join("config.json"), temp.path().join("config.json"))
        .unwrap();
    let file = temp.path().join("model.safetensors");
    let name = b"model.layers.0.mlp.up_proj.weight_scale\"";
    let mut bytes = std::fs::read(golden("llama_nvfp4").join("model.safetensors")).unwrap();
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at + name.len() - 2] = b'x';
    std::fs::write(&file, bytes).unwrap();
    let read = |checkpoint: Checkpoint| checkpoint.read("blk.0.ffn_up.weight").map(|_| ());
    let error = Checkpoint::open(temp.path()).and_then(read).unwrap_err().to_string();
    assert!(error.contains("model.layers.0.mlp.up_proj.weight_scale"), "{error}");
}
