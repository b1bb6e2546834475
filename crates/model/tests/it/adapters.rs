//! Adapters beside the model against the model with W + s B A in the place of W, in both formats, and what is
//! refused.

use std::path::Path;
use std::sync::Arc;

use bevel_base::DType;
use bevel_formats::gguf::{GgufWriter, Metadata, Value};
use bevel_formats::safetensors::SafetensorsWriter;
use bevel_formats::{TensorSpec, safetensors};
use bevel_kernels::{Cpu, Isa, KvType};
use bevel_model::{
    Adapter, AdapterFile, Batch, Checkpoint, KvCache, LowRank, Model, ModelConfig, Part,
    ScaledAdapter, Sequence, State,
};
use serde_json::{Value as Json, json};

use crate::families::{expected_in, golden, logits, relative_error};

/// Every family that has linear layers which are no experts', and one that has both.
const FAMILIES: [&str; 10] = [
    "gemma2",
    "gemma3",
    "granite",
    "llama",
    "llama_biases_tied",
    "olmo2",
    "phi3_short",
    "qwen2",
    "qwen3",
    "qwen3moe",
];

/// Values around zero, the same for the same seed.
fn random(count: usize, seed: &mut u32) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / (1u32 << 24) as f32 * 0.6 - 0.3
    };
    (0..count).map(|_| next()).collect()
}

/// The linear layers of a model's blocks, but for experts'.
fn linear_layers(config: &ModelConfig) -> Vec<(String, [usize; 2])> {
    let names = config.required_tensors().filter(|name| !name.contains("ffn_gate_inp"));
    let shaped = names.filter(|name| name.starts_with("blk.")).filter_map(|name| {
        let shape: [usize; 2] = config.tensor_shape(&name)?.try_into().ok()?;
        Some((name, shape))
    });
    shaped.collect()
}

/// An adapter of all linear layers but some, with two ranks.
fn adapter(config: &ModelConfig, seed: u32) -> AdapterFile {
    let mut file = AdapterFile::new("test");
    let mut seed = seed;
    for (i, (name, [rows, cols])) in linear_layers(config).into_iter().enumerate() {
        // A layer of some stage is left out.
        if i % 5 == 3 {
            continue;
        }
        let rank = if i % 4 == 1 { 5 } else { 3 };
        let (a, b) = (random(rank * cols, &mut seed), random(rows * rank, &mut seed));
        let matrix = LowRank {
            rank,
            alpha: 4.5,
            rank_stabilized: false,
            dtype: DType::F32,
            a,
            b,
            magnitude: None,
        };
        file.insert(config, &name, matrix).unwrap();
    }
    file
}

/// The same with lengths of rows (DoRA).
fn with_lengths(config: &ModelConfig, seed: u32) -> AdapterFile {
    let (plain, mut seed) = (adapter(config, seed), seed + 100);
    let mut file = AdapterFile::new("test");
    for (name, matrix) in plain.matrices() {
        let rows = matrix.b.len() / matrix.rank;
        let magnitude = random(rows, &mut seed).into_iter().map(|v| 1.0 + v).collect();
        let matrix = LowRank { magnitude: Some(magnitude), ..matrix.clone() };
        file.insert(config, name, matrix).unwrap();
    }
    file
}

fn scaled(file: &AdapterFile, model: &Model, cpu: &Cpu, scale: f32) -> ScaledAdapter {
    let adapter = Adapter::new(file, model.checkpoint(), cpu).unwrap();
    ScaledAdapter { adapter: Arc::new(adapter), scale }
}

fn load(checkpoint: Checkpoint, cpu: &Cpu) -> Model {
    Model::load(checkpoint, cpu, &mut |_| {}).unwrap().with_exact_products()
}

fn open(case: &str) -> Checkpoint {
    Checkpoint::open(&golden(case)).unwrap()
}

#[test]
fn an_adapted_model_is_the_merged_one() {
    for case in FAMILIES {
        let (tokens, plain) = expected_in(&golden(case));
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let config = open(case).config().clone();
            let all = [
                [adapter(&config, 1), adapter(&config, 2)],
                [with_lengths(&config, 1), with_lengths(&config, 2)],
            ];
            for files in all.map(|files| files.map(Arc::new)) {
                let merged =
                    open(case).adapted(files[0].clone(), 1.0).adapted(files[1].clone(), -0.5);
                assert!(merged.is_changed());
                let merged = logits(&load(merged, &cpu), &cpu, &tokens, &[tokens.len()]);
                let moved = relative_error(&merged, &plain);
                assert!(moved > 0.03, "{case}: the adapters move the logits by {moved}");
                let model = load(open(case), &cpu);
                let adapters = vec![
                    scaled(&files[0], &model, &cpu, 1.0),
                    scaled(&files[1], &model, &cpu, -0.5),
                ];
                let model = model.with_adapters(adapters);
                for steps in [&[40][..], &[17, 1, 1, 3]] {
                    let error = relative_error(&logits(&model, &cpu, &tokens, steps), &merged);
                    assert!(error < 1e-4, "{case} on {isa}: relative error {error:.2e}");
                }
            }
        }
    }
}

/// The merge above against one written down here: `adapted` is not held against itself alone.
#[test]
fn merging_adds_the_product() {
    let checkpoint = open("llama");
    let (config, name) = (checkpoint.config().clone(), "blk.1.attn_q.weight");
    let before = checkpoint.read_f32(name).unwrap();
    let file = Arc::new(adapter(&config, 3));
    let LowRank { rank, alpha, a, b, .. } = &file.matrices()[name];
    let (rank, cols) = (*rank, a.len() / rank);
    let expected = before.iter().enumerate().map(|(i, w)| {
        let (row, col) = (i / cols, i % cols);
        let product: f32 = (0..rank).map(|r| b[row * rank + r] * a[r * cols + col]).sum();
        w + 2.0 * alpha / rank as f32 * product
    });
    let merged = open("llama").adapted(file.clone(), 2.0);
    assert_eq!(merged.entry(name).unwrap().dtype, DType::F32);
    assert_eq!(merged.stored_dtype(name), checkpoint.entry(name).unwrap().dtype);
    let again = merged.reopened().unwrap().read_f32(name).unwrap();
    for ((found, again), expected) in merged.read_f32(name).unwrap().iter().zip(again).zip(expected)
    {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        assert_eq!(found.to_bits(), again.to_bits());
    }
    // A rotated model computes the same, merged or not.
    let (cpu, (tokens, _)) = (Cpu::new(2).unwrap(), expected_in(&golden("llama")));
    let straight = logits(&load(merged.reopened().unwrap(), &cpu), &cpu, &tokens, &[40]);
    let rotated = load(merged.rotated(5).unwrap(), &cpu);
    assert!(relative_error(&logits(&rotated, &cpu, &tokens, &[40]), &straight) < 1e-4);
}

/// Lengths against ones written down here.
#[test]
fn rows_of_a_merged_matrix_have_the_lengths_that_were_learnt() {
    let checkpoint = open("llama");
    let (config, name) = (checkpoint.config().clone(), "blk.1.attn_q.weight");
    let file = Arc::new(with_lengths(&config, 3));
    let plain = Arc::new(adapter(&config, 3));
    let magnitude = file.matrices()[name].magnitude.as_ref().unwrap();
    let cols = config.dim;
    let directions = open("llama").adapted(plain, 1.0).read_f32(name).unwrap();
    let merged = open("llama").adapted(file.clone(), 1.0).read_f32(name).unwrap();
    let half = open("llama").adapted(file.clone(), 0.5).read_f32(name).unwrap();
    let before = checkpoint.read_f32(name).unwrap();
    for (row, (merged, direction)) in merged.chunks(cols).zip(directions.chunks(cols)).enumerate() {
        let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        assert!((norm(merged) - f64::from(magnitude[row])).abs() < 1e-5);
        let growth = norm(merged) / norm(direction);
        for (i, (merged, direction)) in merged.iter().zip(direction).enumerate() {
            assert!((f64::from(*merged) - growth * f64::from(*direction)).abs() < 1e-5);
            let middle = 0.5 * (before[row * cols + i] + merged);
            assert!((half[row * cols + i] - middle).abs() < 1e-5);
        }
    }
}

/// Tensors of an adapter stand in the place of the model's, merged and beside it.
#[test]
fn whole_tensors_replace_the_models() {
    let cpu = Cpu::new(2).unwrap();
    for case in ["llama", "gemma3"] {
        let (tokens, plain) = expected_in(&golden(case));
        let config = open(case).config().clone();
        let mut file = adapter(&config, 4);
        for name in ["output_norm.weight", "token_embd.weight"] {
            let own = open(case).read_f32(name).unwrap();
            let moved = random(own.len(), &mut 9);
            let values = own.iter().zip(moved).map(|(own, moved)| own + 0.3 * moved).collect();
            file.insert_tensor(&config, name, values).unwrap();
        }
        let file = Arc::new(file);
        let merged = open(case).adapted(file.clone(), 1.0);
        for (name, values) in file.tensors() {
            assert_eq!(merged.read_f32(name).unwrap()[..], values[..]);
        }
        let merged = logits(&load(merged, &cpu), &cpu, &tokens, &[40]);
        assert!(relative_error(&merged, &plain) > 0.05, "{case}");
        // Beside the model: the matrices alone, after the tensors have taken their place.
        let error = Adapter::new(&file, &open(case), &cpu).unwrap_err().to_string();
        assert!(error.contains("whole tensors") && error.contains("merge"), "{error}");
        let model = load(open(case).adapted(Arc::new(file.without_matrices()), 1.0), &cpu);
        let beside = scaled(&file, &model, &cpu, 1.0);
        let model = model.with_adapters(vec![beside]);
        assert!(relative_error(&logits(&model, &cpu, &tokens, &[40]), &merged) < 1e-4, "{case}");
    }
}

/// Biases and experts have no place in adapters.
#[test]
fn only_weights_of_single_modules_are_kept_whole() {
    for (case, name) in [("mixtral", "blk.0.ffn_gate_exps.weight"), ("qwen2", "blk.0.attn_q.bias")]
    {
        let config = open(case).config().clone();
        let len = config.tensor_shape(name).unwrap().iter().product();
        let inserted = AdapterFile::new("test").insert_tensor(&config, name, vec![0.0; len]);
        let error = inserted.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("merge"), "{error}");
    }
}

/// Logits of several sequences in one batch, a token at a time after a prompt.
fn together(model: &Model, cpu: &Cpu, adapters: &[Vec<ScaledAdapter>]) -> Vec<Vec<f32>> {
    let config = model.config();
    let vocabulary = config.vocab_size;
    let mut cache = KvCache::new(config, KvType::F32, 64 * adapters.len()).unwrap();
    let mut state = State::new(config, 64);
    let mut sequences: Vec<Sequence> = adapters.iter().map(|_| Sequence::new()).collect();
    let mut found = vec![Vec::new(); adapters.len()];
    for (step, count) in [7, 1, 1].into_iter().enumerate() {
        for sequence in &mut sequences {
            cache.extend(sequence, count).unwrap();
        }
        let tokens: Vec<u32> =
            (0..count * adapters.len()).map(|i| (i % count * 3 + step + 2) as u32).collect();
        let parts: Vec<Part<'_>> = sequences
            .iter()
            .zip(adapters)
            .map(|(sequence, adapters)| Part { adapters, ..sequence.part(count) })
            .collect();
        let outputs: Vec<usize> = (1..=adapters.len()).map(|i| i * count - 1).collect();
        let batch = Batch { tokens: &tokens, parts: &parts, outputs: &outputs };
        let logits = model.forward(cpu, &batch, cache.pool(), &mut state).unwrap();
        for (found, logits) in found.iter_mut().zip(logits.chunks(vocabulary)) {
            found.extend_from_slice(logits);
        }
    }
    found
}

#[test]
fn each_sequence_of_a_batch_has_its_own() {
    for case in ["llama", "phi3_short", "qwen3moe"] {
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let model = Model::load(open(case), &cpu, &mut |_| {}).unwrap();
            let files = [adapter(model.config(), 1), with_lengths(model.config(), 2)];
            let [one, two] = files.each_ref().map(|file| scaled(file, &model, &cpu, 1.0));
            let half = ScaledAdapter { scale: 0.5, ..one.clone() };
            let all = [
                vec![],
                vec![one.clone()],
                vec![one.clone()],
                vec![two.clone()],
                vec![],
                vec![two, half],
                vec![one],
            ];
            let found = together(&model, &cpu, &all);
            for (adapters, found) in all.iter().zip(&found) {
                let alone = together(&model, &cpu, std::slice::from_ref(adapters));
                assert!(alone[0] == *found, "{case} on {isa} with {}", adapters.len());
            }
            assert!(found[0] == found[4] && found[1] == found[2] && found[1] == found[6]);
            for pair in [(0, 1), (1, 3), (3, 5)] {
                assert!(relative_error(&found[pair.0], &found[pair.1]) > 0.05, "{case}: {pair:?}");
            }
        }
    }
}

#[track_caller]
fn assert_same(found: &AdapterFile, expected: &AdapterFile) {
    assert_eq!(found.matrices().len(), expected.matrices().len());
    for (name, matrix) in expected.matrices() {
        let other = &found.matrices()[name];
        assert_eq!((other.rank, other.dtype), (matrix.rank, matrix.dtype), "{name}");
        let error = |a: &[f32], b: &[f32]| relative_error(a, b);
        assert_eq!((&other.a, &other.magnitude), (&matrix.a, &matrix.magnitude), "{name}");
        let scaled = |m: &LowRank| m.b.iter().map(|b| b * m.scale()).collect::<Vec<f32>>();
        assert!(error(&scaled(other), &scaled(matrix)) < 1e-6, "{name}");
    }
}

#[test]
fn both_formats_keep_what_an_adapter_is() {
    for case in FAMILIES {
        let config = open(case).config().clone();
        let file = adapter(&config, 7);
        let temp = tempfile::tempdir().unwrap();
        let (dir, gguf) = (temp.path().join("peft"), temp.path().join("adapter.gguf"));
        file.write_peft(&dir, case, &config).unwrap();
        assert_same(&AdapterFile::open(&dir, &config).unwrap(), &file);
        file.write_gguf(&gguf, &config).unwrap();
        assert_same(&AdapterFile::open(&gguf, &config).unwrap(), &file);
        // Lengths and whole tensors have a place in PEFT's directories alone.
        let mut more = with_lengths(&config, 8);
        let tensors = ["token_embd.weight", "output_norm.weight", "blk.1.attn_norm.weight"];
        let shaped = tensors.iter().filter_map(|name| Some((*name, config.tensor_shape(name)?)));
        let names = config.required_tensors().collect::<Vec<String>>();
        for (name, shape) in shaped.filter(|(name, _)| names.iter().any(|n| n == name)) {
            let values = random(shape.iter().product(), &mut 5);
            more.insert_tensor(&config, name, values).unwrap();
        }
        let whole = temp.path().join("whole");
        more.write_peft(&whole, case, &config).unwrap();
        let again = AdapterFile::open(&whole, &config).unwrap();
        assert_same(&again, &more);
        assert_eq!(again.tensors().len(), more.tensors().len(), "{case}");
        for (name, values) in more.tensors() {
            assert!(relative_error(&again.tensors()[name], values) < 1e-6, "{case}: {name}");
        }
        let error = more.write_gguf(&gguf, &config).unwrap_err().to_string();
        assert!(error.contains("DoRA") && error.contains("merge"), "{error}");
        // As halves, which the kernels read as they are.
        file.clone().rounded(DType::F16).unwrap().write_gguf(&gguf, &config).unwrap();
        let halves = AdapterFile::open(&gguf, &config).unwrap();
        halves.write_peft(&dir, case, &config).unwrap();
        assert_same(&AdapterFile::open(&dir, &config).unwrap(), &halves);
        for (name, matrix) in halves.matrices() {
            assert_eq!(matrix.dtype, DType::F16);
            assert!(relative_error(&matrix.a, &file.matrices()[name].a) < 1e-3);
        }
    }
}

/// An adapter directory: changes to its configuration, and its tensors.
fn write(dir: &Path, changes: &Json, tensors: &[(&str, [usize; 2])]) {
    let mut config = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": false });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, shape)| {
            TensorSpec::new(format!("base_model.model.model.{name}"), DType::F32, *shape)
        })
        .collect();
    let path = dir.join("adapter_model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &Default::default(), &specs, None).unwrap();
    for spec in &specs {
        let bytes: Vec<u8> = (0..spec.shape.len()).flat_map(|_| 0.5f32.to_le_bytes()).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    assert!(safetensors::Checkpoint::open(&path).is_ok());
}

#[test]
fn patterns_say_what_single_modules_have() {
    let config = open("qwen3").config().clone();
    let (dim, q) = (config.dim, config.q_dim());
    let dir = tempfile::tempdir().unwrap();
    let changes = json!({
        "rank_pattern": { "layers.1.self_attn.q_proj": 3 },
        "alpha_pattern": { "^model.layers.0.self_attn.q_proj": 16, "nothing": 5 },
        "use_rslora": true,
    });
    let tensors = [
        ("layers.0.self_attn.q_proj.lora_A.weight", [2, dim]),
        ("layers.0.self_attn.q_proj.lora_B.weight", [q, 2]),
        ("layers.1.self_attn.q_proj.lora_A.weight", [3, dim]),
        ("layers.1.self_attn.q_proj.lora_B.weight", [q, 3]),
    ];
    write(dir.path(), &changes, &tensors);
    let file = AdapterFile::open(dir.path(), &config).unwrap();
    let scale = |name: &str| file.matrices()[name].scale();
    assert_eq!(scale("blk.0.attn_q.weight"), 16.0 / 2f32.sqrt());
    assert_eq!(scale("blk.1.attn_q.weight"), 4.0 / 3f32.sqrt());
}

#[track_caller]
fn refused(changes: Json, tensors: &[(&str, [usize; 2])], expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &changes, tensors);
    let error = AdapterFile::open(dir.path(), open("qwen3").config()).unwrap_err().to_string();
    for expected in expected {
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let config = open("qwen3").config().clone();
    let (dim, q) = (config.dim, config.q_dim());
    let a = ("layers.0.self_attn.q_proj.lora_A.weight", [2, dim]);
    let b = ("layers.0.self_attn.q_proj.lora_B.weight", [q, 2]);
    for (changes, expected) in [
        (json!({ "use_dora": true }), "no lengths"),
        (json!({ "bias": "all" }), "`bias`"),
        (json!({ "kasa_config": { "beta": 1 } }), "`kasa_config`"),
        (json!({ "peft_type": "IA3" }), "`IA3`"),
        (json!({ "r": null }), "`r`"),
        (json!({ "r": 4 }), "the rank is 4"),
        (json!({ "alpha_pattern": { "layers.[0-3].q": 3 } }), "`layers.[0-3].q`"),
    ] {
        refused(changes, &[a, b], &[expected]);
    }
    let none = json!({});
    let magnitude = ("layers.0.self_attn.q_proj.lora_magnitude_vector", [q, 1]);
    refused(none.clone(), &[a, b, magnitude], &["self_attn.q_proj", "DoRA", "`use_dora`"]);
    let short = ("layers.0.self_attn.q_proj.lora_magnitude_vector", [q - 1, 1]);
    refused(json!({ "use_dora": true }), &[a, b, short], &["DoRA", "another model"]);
    let saved = json!({ "modules_to_save": ["embed_tokens"] });
    let rows = ("embed_tokens.weight", [config.vocab_size, dim]);
    let (size, problem) = match config.tied {
        true => (rows, "`ensure_weight_tying`"),
        false => (("embed_tokens.weight", [2, dim]), "another one"),
    };
    refused(saved.clone(), &[a, b, size], &[problem]);
    refused(saved, &[a, b, ("visual.weight", [2, dim])], &["visual.weight"]);
    refused(none.clone(), &[a], &["lora_A", "without", "lora_B"]);
    let short = ("layers.0.self_attn.q_proj.lora_B.weight", [q - 1, 2]);
    let shapes = [format!("[{}, 2]", q - 1), format!("[{q}, {dim}]")];
    refused(none.clone(), &[a, short], &["q_proj.lora_A", &shapes[0], &shapes[1]]);
    let other = [
        ("layers.99.self_attn.q_proj.lora_A.weight", [2, dim]),
        ("layers.99.self_attn.q_proj.lora_B.weight", [q, 2]),
    ];
    refused(none.clone(), &other, &["layers.99", "another model"]);
    let embedding = [
        ("embed_tokens.lora_A.weight", [2, dim]),
        ("embed_tokens.lora_B.weight", [config.vocab_size, 2]),
    ];
    refused(none.clone(), &embedding, &["embed_tokens", "embeddings"]);
    refused(none.clone(), &[("embed_tokens.lora_embedding_A", [2, dim])], &["embedding"]);
    refused(none.clone(), &[("embed_tokens.weight", [2, dim])], &["modules_to_save"]);
    refused(none, &[], &["no matrices"]);

    let dir = tempfile::tempdir().unwrap();
    let error = |dir: &Path| AdapterFile::open(dir, &config).unwrap_err().to_string();
    assert!(error(dir.path()).contains("adapter_config.json"));
    std::fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    assert!(error(dir.path()).contains("adapter_model.safetensors"));
    std::fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
    assert!(error(dir.path()).contains("pickle"));
}

#[test]
fn gguf_files_of_other_models_are_refused() {
    let config = open("qwen3").config().clone();
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("a.gguf");
    let (dim, q) = (config.dim, config.q_dim());
    let check = |changes: &[(&str, Value)], names: [&str; 2], expected: &str| {
        let mut metadata = Metadata::new();
        for (key, value) in [
            ("general.architecture", "qwen3"),
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
        ] {
            metadata.insert(key.to_owned(), value.into());
        }
        metadata.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let specs: Vec<TensorSpec> = names
            .iter()
            .zip([[2, dim], [q, 2]])
            .map(|(name, shape)| TensorSpec::new(*name, DType::F32, shape))
            .collect();
        let mut writer = GgufWriter::create(&path, &metadata, &specs, None).unwrap();
        for spec in &specs {
            writer.write(&spec.name, &vec![0; spec.shape.len() * 4]).unwrap();
        }
        writer.finish().unwrap();
        let file = AdapterFile::open(&path, &config);
        match expected {
            // Without an α, B A is added as it is.
            "" => assert_eq!(file.unwrap().matrices()["blk.0.attn_q.weight"].scale(), 1.0),
            _ => {
                let error = file.unwrap_err().to_string();
                assert!(error.contains(expected), "{error}");
            }
        }
    };
    let names = ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"];
    check(&[], names, "");
    check(&[("general.type", "model".into())], names, "`general.type` is `model`");
    check(&[("general.architecture", "llama".into())], names, "`llama`");
    check(&[], [names[0], "blk.1.attn_q.weight.lora_b"], "no half of a pair");
    check(&[], [names[0], "blk.0.attn_norm.weight"], "no half of a pair");
    check(
        &[],
        ["token_embd.weight.lora_a", "token_embd.weight.lora_b"],
        "`token_embd.weight.lora_a` adapts",
    );
    check(&[], ["blk.0.attn_k.weight.lora_a", "blk.0.attn_k.weight.lora_b"], "another model");
}
