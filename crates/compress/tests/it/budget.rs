//! Mixed precision: what a type costs, and what a budget is spent on.

use std::ops::ControlFlow;
use std::path::Path;

use bevel_base::{DType, pack};
use bevel_compress::{
    AllocatedTensor, Allocation, Calibration, Error, Options, Progress, Recipe, Report, Result,
    Storage, allocate, quantize,
};
use bevel_kernels::{Cpu, KvType, kl_divergence};
use bevel_model::{Batch, Checkpoint, KvCache, Model, Sequence, State};

use crate::support::{Values, recipe, tiny_austen, write_gguf, write_hf};

/// Token sequences that follow from nothing but their numbers.
fn calibration(samples: usize, tokens: usize, vocab: usize) -> Calibration {
    let mut values = Values::new(9);
    let token = |v: f32| ((v + 1.0) * 64.0 * 37.0) as u32 % vocab as u32;
    let sequences: Vec<Vec<u32>> =
        (0..samples).map(|_| values.take(tokens).into_iter().map(token).collect()).collect();
    Calibration::new(sequences, "numbers".to_owned(), Vec::new())
}

fn spend(model: &Path, recipe: &Recipe, data: &Calibration) -> Result<(Allocation, Recipe)> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let cpu = Cpu::new(2).unwrap();
    let mut go_on = |_: Progress<'_>| ControlFlow::Continue(());
    allocate(&checkpoint, recipe, Some(data), directory.path(), &cpu, &mut go_on)
}

fn written(model: &Path, recipe: &Recipe, data: &Calibration, out: &Path) -> Result<Report> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let cpu = Cpu::new(2).unwrap();
    let options = Options { force: true, ..Options::default() };
    let mut go_on = |_: Progress<'_>| ControlFlow::Continue(());
    quantize(&checkpoint, recipe, Some(data), out, &options, &cpu, &mut go_on)
}

/// Logits after every token of the sequences.
fn logits(model: &Path, sequences: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let cpu = Cpu::new(2).unwrap();
    let model = Model::load(Checkpoint::open(model).unwrap(), &cpu, &mut |_| {}).unwrap();
    let model = model.with_exact_products();
    let config = model.config();
    let mut rows = Vec::new();
    for tokens in sequences {
        let mut cache = KvCache::new(config, KvType::F32, tokens.len()).unwrap();
        let mut sequence = Sequence::new();
        cache.extend(&mut sequence, tokens.len()).unwrap();
        let parts = [sequence.part(tokens.len())];
        let outputs: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch { tokens, parts: &parts, outputs: &outputs };
        let mut state = State::new(config, tokens.len());
        let logits = model.forward(&cpu, &batch, cache.pool(), &mut state).unwrap();
        rows.extend(logits.chunks_exact(config.vocab_size).map(<[f32]>::to_vec));
    }
    rows
}

/// The model in single precision, with one tensor rounded to a type.
fn with_one_rounded(tensor: &str, dtype: DType, out: &Path) {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    write_gguf(out, checkpoint.config(), DType::F32, |name, len| {
        let values = checkpoint.read_f32(name).unwrap();
        assert_eq!(values.len(), len);
        if name != tensor {
            return values;
        }
        let mut packed = vec![0; dtype.row_bytes(len).unwrap()];
        pack::quantize(dtype, &values, None, &mut packed).unwrap();
        let mut rounded = vec![0.0; len];
        pack::dequantize(dtype, &packed, &mut rounded).unwrap();
        rounded
    });
}

fn kl_of(tensor: &AllocatedTensor, dtype: DType) -> f64 {
    tensor.options.iter().find(|o| o.dtype == dtype).unwrap().kl
}

#[test]
fn a_types_cost_is_the_divergence_of_the_model_with_it() {
    let data = calibration(3, 40, 4096);
    let recipe = recipe("type = \"keep\"\n[budget]\nbits_per_weight = 4.5");
    let (allocation, _) = spend(&tiny_austen(), &recipe, &data).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.gguf");
    with_one_rounded("none", DType::F32, &path);
    let base = logits(&path, &data.sequences);
    let cpu = Cpu::new(1).unwrap();
    // The type nearest to the budget is the one that was run. An embedding that is the head too is
    // measured at one place after the other, and the sum taken.
    for (name, tolerance) in [
        ("blk.0.attn_q.weight", 0.001),
        ("blk.1.attn_output.weight", 0.001),
        ("blk.2.ffn_up.weight", 0.001),
        ("blk.3.ffn_down.weight", 0.001),
        ("token_embd.weight", 0.2),
    ] {
        with_one_rounded(name, DType::Q4_K, &path);
        let other = logits(&path, &data.sequences);
        let rows = base.iter().zip(&other).map(|(p, q)| kl_divergence(&cpu, p, q).kl);
        let expected = rows.sum::<f64>() / base.len() as f64;
        let tensor = allocation.tensors.iter().find(|t| t.name == name).unwrap();
        let found = kl_of(tensor, DType::Q4_K);
        assert!(expected > 1e-5, "{name}: {expected} is no divergence to compare with");
        assert!((found / expected - 1.0).abs() < tolerance, "{name}: {found} for {expected}");
    }
}

#[test]
fn a_budget_is_kept_and_spent_and_no_single_type_is_better() {
    let data = calibration(4, 64, 4096);
    for bits in [3.2, 4.5, 6.0] {
        let toml =
            format!("type = \"keep\"\nmethod = \"gptq\"\n[budget]\nbits_per_weight = {bits}");
        let (allocation, concrete) = spend(&tiny_austen(), &recipe(&toml), &data).unwrap();
        let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
        let plan = bevel_compress::Preview::new(&checkpoint, &concrete).unwrap();
        let spent = plan.totals.bits_per_weight_after;
        assert!(spent <= bits && spent > 0.995 * bits, "{spent} of {bits} bits");
        let types: std::collections::BTreeSet<_> =
            allocation.tensors.iter().map(|t| t.dtype.name()).collect();
        assert!(types.len() > 1, "{types:?}");
        let sum: f64 = allocation.tensors.iter().map(|t| kl_of(t, t.dtype)).sum();
        assert!((allocation.predicted_kl / sum - 1.0).abs() < 1e-9);
        for dtype in [DType::Q2_K, DType::Q3_K, DType::IQ4_XS, DType::Q4_K, DType::Q5_K] {
            let alone: f64 = allocation.tensors.iter().map(|t| kl_of(t, dtype)).sum();
            let fits = dtype.bits_per_weight() < bits - 0.01;
            assert!(!fits || allocation.predicted_kl < alone, "{dtype} alone is better");
        }
    }
}

#[test]
fn a_file_is_no_larger_than_asked_for() {
    let data = calibration(2, 32, 4096);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("small.gguf");
    let toml =
        "type = \"keep\"\nkeep = [\"blk.3.*\"]\noutput_type = \"Q6_K\"\n[budget]\nbytes = 4000000";
    let report = written(&tiny_austen(), &recipe(toml), &data, &out).unwrap();
    let size = std::fs::metadata(&out).unwrap().len();
    assert!(size <= 4_000_000 && size > 3_960_000, "{size} bytes");
    let storage = |name: &str| report.tensors.iter().find(|t| t.name == name).unwrap().to;
    assert_eq!(storage("blk.3.ffn_up.weight"), Storage::Type(DType::BF16));
    assert_eq!(storage("token_embd.weight"), Storage::Type(DType::Q6_K));
    assert_eq!(report.allocation.unwrap().tensors.len(), 3 * 7);
    assert!(!directory.path().join("small.gguf.unfinished").exists());
    // What was chosen is what the recipe of the output says.
    let again = directory.path().join("again.gguf");
    written(&tiny_austen(), &report.provenance.recipe.parse().unwrap(), &data, &again).unwrap();
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&again).unwrap());
}

#[test]
fn experts_and_rows_of_odd_lengths_have_their_costs() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("mixtral");
    write_hf(&model, "mixtral", 3);
    let data = calibration(2, 24, 96);
    let toml = "type = \"keep\"\nmethod = \"gptq\"\n[budget]\nbits_per_weight = 5.0\ntypes = [\"Q4_0\", \"Q8_0\"]";
    let (allocation, _) = spend(&model, &recipe(toml), &data).unwrap();
    let stacked = allocation.tensors.iter().filter(|t| t.name.contains("_exps"));
    assert_eq!(stacked.clone().count(), 2 * 3);
    for tensor in stacked {
        let costs: Vec<f64> = tensor.options.iter().map(|o| o.kl).collect();
        assert!(costs[0] > costs[1] && costs[1] > 0.0, "{}: {costs:?}", tensor.name);
    }
}

#[test]
fn a_type_that_loses_nothing_tells_nothing_of_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    // Weights on the grid of the type that is closest to the budget.
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    write_gguf(&path("rounded.gguf"), checkpoint.config(), DType::Q4_0, |name, _| {
        checkpoint.read_f32(name).unwrap()
    });
    let rounded = Checkpoint::open(&path("rounded.gguf")).unwrap();
    write_gguf(&path("full.gguf"), checkpoint.config(), DType::F32, |name, _| {
        rounded.read_f32(name).unwrap()
    });
    let data = calibration(2, 32, 4096);
    let toml =
        "type = \"keep\"\n[budget]\nbits_per_weight = 4.6\ntypes = [\"Q2_K\", \"Q4_0\", \"Q8_0\"]";
    let (allocation, _) = spend(&path("full.gguf"), &recipe(toml), &data).unwrap();
    for tensor in &allocation.tensors {
        assert!(kl_of(tensor, DType::Q2_K) > 1e-5, "{}", tensor.name);
        assert!(kl_of(tensor, DType::Q4_0) < 1e-6, "{}", tensor.name);
        assert_eq!(tensor.dtype, DType::Q4_0, "{}", tensor.name);
    }
}

#[test]
fn a_mixture_is_written_by_every_calibrated_method() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("mixtral");
    write_hf(&model, "mixtral", 3);
    let data = calibration(2, 24, 96);
    for method in ["importance", "awq", "gptq", "gptaq"] {
        let toml = format!("type = \"Q4_0\"\nmethod = \"{method}\"");
        let out = directory.path().join("small.gguf");
        let report = written(&model, &recipe(&toml), &data, &out).unwrap();
        let solved = report.tensors.iter().filter(|t| t.name.contains("_exps"));
        assert!(solved.clone().all(|t| t.solved.len() == 4), "{method}");
        assert_eq!(solved.count(), 2 * 3, "{method}");
    }
}

#[track_caller]
fn check_refused(toml: &str, reason: &str) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("a.gguf");
    let data = calibration(1, 8, 4096);
    let error = written(&tiny_austen(), &recipe(toml), &data, &out).unwrap_err().to_string();
    assert!(error.contains(reason), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "something was left");
}

#[test]
fn budgets_that_cannot_be_kept_to_are_refused() {
    check_refused("type = \"keep\"\n[budget]\nbits_per_weight = 2.0", "smallest types");
    check_refused("type = \"keep\"\n[budget]\nbytes = 1000", "metadata alone");
    check_refused("type = \"Q4_K_M\"\n[budget]\nbits_per_weight = 4.0", "leave `Q4_K_M` out");
    let parse = |toml: &str| toml.parse::<Recipe>().unwrap_err().to_string();
    assert!(parse("type = \"keep\"\n[budget]\ntypes = []").contains("either"));
    assert!(parse("type = \"keep\"\n[budget]\nbits_per_weight = 40").contains("between"));
    let error = spend(
        &tiny_austen(),
        &recipe("type = \"keep\"\n[budget]\nbits_per_weight = 4.0"),
        &Calibration::new(Vec::new(), String::new(), Vec::new()),
    );
    assert!(matches!(error, Err(Error::NoCalibration)), "{error:?}");
}
