//! Quantization with calibration data, on the small real model.

use std::ops::ControlFlow;
use std::path::Path;

use bevel_base::DType;
use bevel_compress::{
    Calibration, CalibrationConfig, Error, Options, Progress, Recipe, Report, Result, Source, Stage,
};
use bevel_kernels::{Cpu, KvType};
use bevel_model::{Checkpoint, Model, Session};

use crate::support::{recipe, tiny_austen, write_gguf};

/// Some sentences that the model's authors might have written.
const TEXT: &str = "It is a truth universally acknowledged, that a single man in possession of a good \
fortune, must be in want of a wife. However little known the feelings or views of such a man may be on \
his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding \
families, that he is considered the rightful property of some one or other of their daughters. ";

fn calibration(samples: usize, tokens: usize) -> Calibration {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("text.txt");
    std::fs::write(&path, TEXT.repeat(40)).unwrap();
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let source = Source::Files(vec![path.clone()]);
    let config = CalibrationConfig { source, samples, tokens, ..Default::default() };
    config.read(&[path], &checkpoint.tokenizer().unwrap()).unwrap()
}

/// Quantizes, and stops when `on_progress` was called `calls` times.
fn quantize(
    recipe: &Recipe,
    calibration: &Calibration,
    out: &Path,
    threads: usize,
    calls: usize,
) -> Result<Report> {
    let mut left = calls;
    quantize_while(recipe, calibration, out, threads, &mut |_| {
        left = left.saturating_sub(1);
        left > 0
    })
}

/// Quantizes, and stops when `goes_on` says no.
fn quantize_while(
    recipe: &Recipe,
    calibration: &Calibration,
    out: &Path,
    threads: usize,
    goes_on: &mut dyn FnMut(Stage) -> bool,
) -> Result<Report> {
    let checkpoint = Checkpoint::open(&tiny_austen())?;
    let mut on_progress = |p: Progress<'_>| {
        if goes_on(p.stage) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let cpu = Cpu::new(threads).unwrap();
    let options = Options { force: true, compare: true, ..Options::default() };
    let data = Some(calibration);
    bevel_compress::quantize(&checkpoint, recipe, data, out, &options, &cpu, &mut on_progress)
}

/// Quantizes another model than the small real one, on two threads.
#[track_caller]
fn quantize_model(model: &Checkpoint, recipe: &Recipe, data: &Calibration, out: &Path) -> Report {
    let cpu = Cpu::new(2).unwrap();
    let options = Options { force: true, ..Options::default() };
    let mut go_on = |_: Progress<'_>| ControlFlow::Continue(());
    bevel_compress::quantize(model, recipe, Some(data), out, &options, &cpu, &mut go_on).unwrap()
}

#[track_caller]
fn check_resume(recipe: &Recipe) {
    let directory = tempfile::tempdir().unwrap();
    let data = calibration(3, 32);
    let out = |name: &str| directory.path().join(name);
    quantize(recipe, &data, &out("whole.gguf"), 2, usize::MAX).unwrap();
    let whole = std::fs::read(out("whole.gguf")).unwrap();

    // Stopped ever further on, and started again each time.
    let path = out("stopped.gguf");
    let mut stops = 0;
    let mut calls = 2;
    while let Err(error) = quantize(recipe, &data, &path, 1 + stops % 2, calls) {
        assert!(matches!(error, Error::Stopped), "{error}");
        assert!(!path.exists(), "an unfinished file has the output's name");
        stops += 1;
        calls += 5 + calls / 8;
    }
    assert!(stops > 5, "stopped {stops} times only");
    assert!(std::fs::read(&path).unwrap() == whole, "another file after {stops} stops");
    assert!(!out("stopped.gguf.unfinished").exists());

    // A run that does something else does not go on with it.
    let mut left = 30;
    let mut some = |stage| {
        left -= i32::from(stage == Stage::Calibrate);
        left > 0
    };
    assert!(quantize_while(recipe, &data, &path, 1, &mut some).is_err());
    let error = quantize(recipe, &calibration(2, 32), &path, 1, usize::MAX).unwrap_err();
    assert!(matches!(error, Error::OtherRun { what: "calibration data", .. }), "{error}");
}

#[test]
fn a_stopped_run_goes_on_and_ends_in_the_same_bytes() {
    check_resume(&recipe("type = \"Q4_K_M\"\nmethod = \"gptq\""));
    check_resume(&recipe("type = \"Q4_0\"\nmethod = \"gptaq\""));
    check_resume(&recipe("type = \"Q3_K_M\"\nmethod = \"importance\""));
    check_resume(&recipe("type = \"Q4_0\"\nmethod = \"importance\"\nfold = true"));
    check_resume(&recipe(
        "type = \"keep\"\nmethod = \"gptq\"\n[budget]\nbits_per_weight = 5.5\ntypes = [\"Q4_0\", \"Q8_0\"]",
    ));
}

#[test]
fn gptq_moves_the_outputs_less_than_rounding() {
    let directory = tempfile::tempdir().unwrap();
    let data = calibration(8, 128);
    let out = directory.path().join("small.gguf");
    let toml = "type = \"Q4_K\"\npure = true\nmethod = \"gptq\"";
    let report = quantize(&recipe(toml), &data, &out, 2, usize::MAX).unwrap();
    let solved: Vec<_> = report.tensors.iter().filter(|t| !t.solved.is_empty()).collect();
    assert_eq!(solved.len(), 4 * 7 + 1, "every matrix of four layers, and the head");
    for tensor in solved {
        for solved in &tensor.solved {
            assert!(!solved.seconds.is_empty(), "{}: no time for any step", tensor.name);
            let rounded = solved.rtn_error.unwrap();
            assert!(
                solved.error < 0.9 * rounded,
                "{}: {:.5} against {rounded:.5} by rounding",
                tensor.name,
                solved.error,
            );
        }
    }
}

#[test]
fn a_matrix_of_zeros_stays_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    write_gguf(&path("full.gguf"), checkpoint.config(), DType::F32, |name, len| match name {
        "blk.2.ffn_down.weight" | "blk.2.attn_output.weight" => vec![0.0; len],
        _ => checkpoint.read_f32(name).unwrap(),
    });
    let model = Checkpoint::open(&path("full.gguf")).unwrap();
    let data = calibration(2, 32);
    for toml in ["type = \"Q4_K\"\nmethod = \"gptaq\"", "type = \"NF4\"\nmethod = \"gptaq\""] {
        let out = path(if toml.contains("Q4_K") { "small.gguf" } else { "small" });
        quantize_model(&model, &recipe(toml), &data, &out);
        let small = Checkpoint::open(&out).unwrap();
        let down = small.read_f32("blk.2.ffn_down.weight").unwrap();
        assert!(down.iter().all(|&w| w == 0.0), "{toml}");
    }
}

#[test]
fn what_is_packed_already_and_keeps_its_type_keeps_its_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    write_gguf(&path("packed.gguf"), checkpoint.config(), DType::Q4_K, |name, _| {
        checkpoint.read_f32(name).unwrap()
    });
    let model = Checkpoint::open(&path("packed.gguf")).unwrap();
    let data = calibration(2, 32);
    let quantized = |toml: &str| {
        let report = quantize_model(&model, &recipe(toml), &data, &path("out.gguf"));
        (report, Checkpoint::open(&path("out.gguf")).unwrap())
    };
    let (report, kept) = quantized("type = \"Q8_0\"\nkeep = [\"blk.0.*\"]\nmethod = \"gptq\"");
    for name in ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"] {
        assert!(kept.read(name).unwrap() == model.read(name).unwrap(), "{name}");
    }
    assert!(report.tensors.iter().any(|t| t.name == "blk.1.attn_q.weight" && !t.solved.is_empty()));
    // Scales are folded into what was kept: that is quantizing again, and said.
    let (report, _) = quantized("type = \"Q4_K\"\npure = true\nmethod = \"awq\"");
    assert_eq!(report.totals.requantized, 4 * 7);
    assert!(report.warnings.iter().any(|w| w.contains("both errors add up")));
}

#[test]
fn another_methods_run_leaves_an_unfinished_one_alone() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("small.gguf");
    let data = calibration(2, 32);
    let gptq = recipe("type = \"Q4_0\"\nmethod = \"gptq\"");
    assert!(matches!(quantize(&gptq, &data, &out, 2, 60), Err(Error::Stopped)));
    let unfinished = directory.path().join("small.gguf.unfinished");
    assert!(unfinished.join("part-0000.safetensors").exists(), "stopped too early");
    quantize(&recipe("type = \"Q4_0\""), &data, &out, 2, usize::MAX).unwrap();
    assert!(unfinished.join("part-0000.safetensors").exists());
    quantize(&gptq, &data, &out, 2, usize::MAX).unwrap();
    assert!(!unfinished.exists());
}

#[test]
fn two_runs_do_not_take_each_others_files() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("small.gguf");
    let data = calibration(2, 32);
    let gptq = recipe("type = \"Q4_0\"\nmethod = \"gptq\"");
    let mut refused = None;
    let mut begin_another = |stage| {
        if stage == Stage::Calibrate && refused.is_none() {
            refused = Some(quantize(&gptq, &data, &out, 1, usize::MAX).unwrap_err());
        }
        true
    };
    quantize_while(&gptq, &data, &out, 1, &mut begin_another).unwrap();
    assert!(matches!(refused, Some(Error::Busy(_))), "{refused:?}");
}

#[test]
fn a_damaged_part_is_found_before_work_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("small.gguf");
    let data = calibration(2, 32);
    let gptq = recipe("type = \"Q4_0\"\nmethod = \"gptq\"");
    assert!(matches!(quantize(&gptq, &data, &out, 2, 60), Err(Error::Stopped)));
    let part = directory.path().join("small.gguf.unfinished/part-0000.safetensors");
    std::fs::write(&part, "garbage").unwrap();
    let mut calibrates = false;
    let mut watch = |stage| {
        calibrates |= stage == Stage::Calibrate;
        true
    };
    let error = quantize_while(&gptq, &data, &out, 2, &mut watch).unwrap_err();
    assert!(error.to_string().contains("--restart"), "{error}");
    assert!(!calibrates, "a layer was walked through");
}

#[test]
fn act_order_is_written_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let data = calibration(8, 128);
    let out = directory.path().join("small");
    let toml = "type = \"W4\"\ngroup_size = 32\nmethod = \"gptq\"\n[gptq]\norder = \"act-order\"";
    let report = quantize(&recipe(toml), &data, &out, 2, usize::MAX).unwrap();
    let (error, rounding) = report.output_error().unwrap();
    assert!(error < 0.9 * rounding.unwrap(), "{error} against {rounding:?}");
    let (before, after) =
        (Checkpoint::open(&tiny_austen()).unwrap(), Checkpoint::open(&out).unwrap());
    for tensor in report.tensors.iter().filter(|t| !t.solved.is_empty()) {
        let matrix = after.read_grouped(&tensor.name, 0).unwrap().unwrap();
        let group_of = matrix.group_of.as_ref().unwrap();
        let side_by_side = |(j, group): (usize, &u32)| *group as usize == j / 32;
        assert!(!group_of.iter().enumerate().all(side_by_side), "{}", tensor.name);
        // What is read back moved as little as the solver said.
        let [a, b] = [&before, &after].map(|c| c.read_f32(&tensor.name).unwrap());
        let moved: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let moved = (moved / a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>()).sqrt();
        assert!((tensor.relative_error - moved).abs() < 2e-3, "{}: {moved}", tensor.name);
    }
}

#[test]
fn folded_scales_leave_the_function_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let data = calibration(8, 64);
    let cpu = Cpu::new(2).unwrap();
    let tokens: Vec<u32> = data.sequences[0][..48].to_vec();
    let load =
        |path: &Path| Model::load(Checkpoint::open(path).unwrap(), &cpu, &mut |_| {}).unwrap();
    let logits = |model: &Model| {
        Session::new(model, &cpu, 64, KvType::F32).unwrap().feed(&tokens).unwrap().to_vec()
    };
    let base = logits(&load(&tiny_austen()));
    let spread = |a: &[f32]| -> f64 { a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt() };
    let lost = |name: &str, toml: &str| {
        let out = directory.path().join(name);
        quantize(&recipe(toml), &data, &out, 2, usize::MAX).unwrap();
        let own = logits(&load(&out));
        let moved: Vec<f32> = own.iter().zip(&base).map(|(a, b)| a - b).collect();
        (spread(&moved) / spread(&base), out)
    };
    // Eight bits change next to nothing by themselves; four heads of attention share two of values.
    let common = "type = \"Q8_0\"\npure = true\nmethod = \"importance\"";
    let (plain, before) = lost("plain.gguf", common);
    let (folded, after) = lost("folded.gguf", &format!("{common}\nfold = true"));
    assert!(folded < 0.03 && folded < 2.0 * plain, "{folded} of the logits, {plain} without");
    let [before, after] = [before, after].map(|path| Checkpoint::open(&path).unwrap());
    for name in ["attn_norm", "attn_output", "ffn_norm", "ffn_down"] {
        // Where no scale is better than another, a layer is left as it is.
        let is_scaled = |layer: &usize| {
            let name = format!("blk.{layer}.{name}.weight");
            let [a, b] = [&before, &after].map(|file| file.read_f32(&name).unwrap());
            let moved: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
            spread(&moved) > 0.05 * spread(&a)
        };
        let scaled = (0..4).filter(is_scaled).count();
        assert!(scaled >= 3, "{name} is scaled in {scaled} of 4 layers");
    }
}

/// A model whose first token has a stream hundreds of times as large as all others', from the first layer
/// on: one neuron of its MLP answers to that token's embedding alone.
fn with_a_massive_token(path: &Path, token: u32) {
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let dim = checkpoint.config().dim;
    let direction = |i: usize| if i.is_multiple_of(2) { 1.0 } else { -1.0 };
    write_gguf(path, checkpoint.config(), DType::F32, |name, _| {
        let mut values = checkpoint.read_f32(name).unwrap();
        match name {
            "token_embd.weight" => {
                let row = &mut values[token as usize * dim..][..dim];
                row.iter_mut().enumerate().for_each(|(i, v)| *v = direction(i));
            }
            "blk.0.ffn_gate.weight" | "blk.0.ffn_up.weight" => {
                let row = &mut values[..dim];
                row.iter_mut().enumerate().for_each(|(i, v)| *v = 0.05 * direction(i));
            }
            "blk.0.ffn_down.weight" => {
                let cols = values.len() / dim;
                for (i, row) in values.chunks_exact_mut(cols).enumerate() {
                    row[0] = 50.0 * direction(i / 2);
                }
            }
            _ => {}
        }
        values
    });
}

#[test]
fn what_a_massive_token_lost_does_not_move_the_weights_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("massive.gguf");
    let data = calibration(8, 64);
    with_a_massive_token(&path, data.sequences[0][0]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let recipe = recipe("type = \"Q3_K\"\npure = true\nmethod = \"gptaq\"");
    let report = quantize_model(&checkpoint, &recipe, &data, &directory.path().join("small.gguf"));
    for tensor in report.tensors.iter().filter(|t| t.name.starts_with("blk.")) {
        // Unless such tokens count for less: 1.46.
        assert!(tensor.relative_error < 0.8, "{}: {}", tensor.name, tensor.relative_error);
    }
}

#[test]
fn calibrated_methods_need_data() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&tiny_austen()).unwrap();
    let (recipe, out) =
        (recipe("type = \"Q4_0\"\nmethod = \"gptq\""), directory.path().join("a.gguf"));
    let (cpu, options) = (Cpu::new(1).unwrap(), Options::default());
    let mut go_on = |_: Progress<'_>| ControlFlow::Continue(());
    let outcome =
        bevel_compress::quantize(&checkpoint, &recipe, None, &out, &options, &cpu, &mut go_on);
    assert!(matches!(outcome, Err(Error::NoCalibration)));
    assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none(), "something was left");
}
