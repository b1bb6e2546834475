//! From lines of data to an adapter in a directory.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bevel_base::DType;
use bevel_formats::records::{DataFile, Kind};
use bevel_formats::{TensorSpec, safetensors};
use bevel_kernels::Cpu;
use bevel_model::chat::{CHATML, ChatTemplate};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{AdapterFile, Checkpoint};
use bevel_train::data::{Examples, Reader};
use bevel_train::{
    Batch, Error, Lessons, LoraConfig, Network, OptimizerConfig, OptimizerKind, Parameters,
    Schedule, TrainConfig, Trainer, mean_loss, start_from, train, write_adapter,
};

pub(crate) fn tiny_austen() -> Checkpoint {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    Checkpoint::open(&dir).unwrap()
}

/// Texts of what is read and of what is learnt.
fn parts(tokenizer: &Tokenizer, examples: &Examples, i: usize) -> (String, String) {
    let example = &examples.all[i];
    let pick = |learnt: bool| {
        let tokens = example.tokens.iter().zip(&example.learnt);
        let picked: Vec<u32> = tokens.filter(|t| *t.1 == learnt).map(|t| *t.0).collect();
        tokenizer.decode(&picked, false)
    };
    (pick(false), pick(true))
}

#[test]
fn every_shape_of_data_is_read() {
    let checkpoint = tiny_austen();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let template = ChatTemplate::new(CHATML, tokenizer.special_texts()).unwrap();
    let reader =
        Reader { tokenizer: &tokenizer, template: Some(&template), context: 64, whole: false };
    let lines = r#"{"prompt": "Who is she?", "completion": " Emma."}
{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Emma."}, {"role": "user", "content": "And he?"}, {"role": "assistant", "content": "Mr. Knightley."}]}

{"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Emma."}]}
{"instruction": "Name her.", "input": "", "output": "Emma."}
{"text": "She was happy."}"#;
    let examples = reader.lines(lines, "data").unwrap();
    assert_eq!((examples.all.len(), examples.cut, examples.empty), (5, 0, 0));
    let (read, learnt) = parts(&tokenizer, &examples, 0);
    assert!(read.ends_with("Who is she?") && learnt.starts_with(" Emma."), "{read:?} {learnt:?}");
    let (read, learnt) = parts(&tokenizer, &examples, 1);
    assert!(learnt.contains("Emma.<|im_end|>") && learnt.contains("Mr. Knightley.<|im_end|>"));
    assert!(read.contains("Who?") && read.contains("And he?") && !read.contains("Knightley"));
    assert!(read.contains("<|im_start|>assistant\n") && !learnt.contains("assistant"));
    let (_, learnt) = parts(&tokenizer, &examples, 2);
    assert_eq!(learnt.trim_end(), "Emma.<|im_end|>");
    assert_eq!(parts(&tokenizer, &examples, 3).1.trim_end(), "Emma.<|im_end|>");
    let first = tokenizer.decode(&examples.all[4].tokens[..1], false);
    assert_eq!(parts(&tokenizer, &examples, 4).0, first, "the first token follows nothing");

    // The whole conversation, and one that is too long.
    let whole = Reader { whole: true, ..reader }.lines(lines, "data").unwrap();
    assert!(whole.all[1].learnt[1..].iter().all(|&learnt| learnt));
    let short = Reader { context: 4, ..reader }.lines(lines, "data").unwrap();
    assert!(short.cut >= 4 && short.empty >= 2 && short.all.len() + short.empty == 5);
    // A text in pieces, each of which begins with the last token of the one before.
    let pieces = Reader { context: 8, ..reader }.text(&"She was happy. ".repeat(20), "t").unwrap();
    let count: usize = pieces.all.iter().map(|e| e.tokens.len() - 1).sum();
    let all = tokenizer.encode(&"She was happy. ".repeat(20), true, false).unwrap();
    assert_eq!(count, all.len() - 1);

    for (line, expected) in [
        (r#"{"text": "a"}"#.to_owned() + "\n{", "line 2: the line is no JSON"),
        (r#"{"question": "x"}"#.to_owned(), "line 1: expected the members"),
        (
            r#"{"messages": [{"role": "user", "content": "x"}]}"#.to_owned(),
            "no message that is to be learnt is the",
        ),
        (r#"{"conversations": [{"from": "bot", "value": "x"}]}"#.to_owned(), "`bot`"),
    ] {
        let error = reader.lines(&line, "data").unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = Reader { template: None, ..reader }.lines(lines, "data").unwrap_err().to_string();
    assert!(error.contains("data, line 2") && error.contains("no chat template"), "{error}");
}

fn config(steps: usize) -> TrainConfig {
    TrainConfig {
        steps,
        batch: 3,
        tokens_together: 64,
        learning_rate: 5e-3,
        warmup: 0.1,
        schedule: Schedule::Cosine,
        clip: 1.0,
        optimizer: OptimizerConfig::default(),
        neftune: 0.0,
        patience: 0,
        keep_best: false,
        in_order: false,
        evaluate_every: 5,
        seed: 7,
    }
}

#[test]
fn learning_rates_rise_and_fall() {
    let rates = |schedule| {
        let config = TrainConfig { schedule, learning_rate: 1.0, ..config(20) };
        (0..20).map(|step| config.learning_rate_at(step)).collect::<Vec<f64>>()
    };
    for schedule in [Schedule::Cosine, Schedule::Linear, Schedule::Constant] {
        let rates = rates(schedule);
        assert_eq!((rates[0], rates[1], rates[2]), (0.5, 1.0, 1.0), "{schedule:?}");
        assert!(rates[1..].is_sorted_by(|a, b| a >= b));
    }
    assert!((rates(Schedule::Linear)[11] - 0.5).abs() < 1e-9);
    assert!((rates(Schedule::Cosine)[11] - 0.5).abs() < 1e-9);
    assert_eq!(rates(Schedule::Constant)[19], 1.0);
}

#[test]
fn what_is_learnt_holds_for_what_was_held_out() {
    let checkpoint = tiny_austen();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let reader = Reader { tokenizer: &tokenizer, template: None, context: 64, whole: false };
    let names = ["Emma", "Anne", "Fanny", "Jane", "Lydia", "Mary", "Kitty", "Lucy"];
    let line = |name: &str| {
        format!(
            "{{\"prompt\": \"{name} asks:\", \"completion\": \" what is the bevel of {name}?\"}}"
        )
    };
    let lines: Vec<String> = names.iter().map(|name| line(name)).collect();
    let learnt = reader.lines(&lines[..6].join("\n"), "data").unwrap().all;
    let held_out = reader.lines(&lines[6..].join("\n"), "data").unwrap().all;
    let cpu = Cpu::new(2).unwrap();
    let lora = LoraConfig::all_linear();
    let run = |steps: usize| {
        let mut parameters = Parameters::default();
        let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
        let before = mean_loss(&mut network, &parameters, &cpu, &held_out, 64).unwrap();
        let mut reports = Vec::new();
        let observe = &mut |report: &_| {
            reports.push(*report);
            ControlFlow::Continue(())
        };
        train(&mut network, &mut parameters, &cpu, &learnt, &held_out, &config(steps), observe)
            .unwrap();
        (before, reports, network.adapters(&parameters), parameters)
    };
    let (before, reports, adapters, parameters) = run(30);
    let measured: Vec<usize> =
        reports.iter().filter(|r| r.held_out.is_some()).map(|r| r.step).collect();
    assert_eq!(measured, [5, 10, 15, 20, 25, 30]);
    let after = reports[29].held_out.unwrap();
    assert!(after < before / 3.0, "the held-out loss was {before} and is {after}");
    assert!(reports[29].loss < reports[0].loss / 4.0);
    // The same again, to the bit; but for the time it takes.
    let (_, again, _, same) = run(30);
    assert_eq!(parameters.values, same.values);
    assert!(reports.iter().zip(&again).all(|(a, b)| a.loss == b.loss && a.held_out == b.held_out));

    // The adapter, as PEFT names it.
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), "tiny", checkpoint.config(), &lora, &adapters, &[]).unwrap();
    let file =
        safetensors::Checkpoint::open(&dir.path().join("adapter_model.safetensors")).unwrap();
    let name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight";
    let b = file.tensor(name).unwrap().to_f32().unwrap();
    let parameter = parameters.all().iter().find(|p| p.name == "blk.1.ffn_down.lora_b").unwrap();
    assert_eq!(b, parameters.values[parameter.range.clone()]);
    assert_eq!(file.tensors().len(), parameters.all().len());
    let config = std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 8") && config.contains("\"gate_proj\""), "{config}");
}

/// What a written adapter adds to the weights of a Hugging Face directory is what it does here: names, rows and
/// scale are right.
#[test]
fn a_merged_model_is_the_adapted_one() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens/families");
    let cpu = Cpu::new(2).unwrap();
    for case in ["llama", "qwen3", "gemma2", "olmo2", "phi3_short"] {
        let golden = families.join(case);
        let checkpoint = Checkpoint::open(&golden).unwrap();
        let lora =
            LoraConfig { rank: 3, rank_stabilized: case == "qwen3", ..LoraConfig::all_linear() };
        let mut parameters = Parameters::default();
        let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
        let mut seed = 1u32;
        for value in &mut parameters.values {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value += (seed >> 8) as f32 / (1u32 << 24) as f32 * 0.2 - 0.1;
        }
        let dir = tempfile::tempdir().unwrap();
        let (directory, merged) = (dir.path().join("adapter"), dir.path().join("merged"));
        let adapters = network.adapters(&parameters);
        write_adapter(&directory, case, checkpoint.config(), &lora, &adapters, &[]).unwrap();

        // W + s B A for every matrix that the adapter names.
        let open = |path: &Path| safetensors::Checkpoint::open(path).unwrap();
        let model = open(&golden.join("model.safetensors"));
        let adapter = open(&directory.join("adapter_model.safetensors"));
        let names: Vec<String> = model.tensors().keys().cloned().collect();
        let mut matrices = 0;
        let tensors: Vec<(TensorSpec, Vec<u8>)> = names
            .iter()
            .map(|name| {
                let tensor = model.tensor(name).unwrap();
                let mut values = tensor.to_f32().unwrap();
                let module = name.strip_suffix(".weight").unwrap_or(name);
                let part = |kind: &str| {
                    let name = format!("base_model.model.{module}.{kind}.weight");
                    adapter.data(&name).map(|_| adapter.tensor(&name).unwrap().to_f32().unwrap())
                };
                if let (Some(a), Some(b)) = (part("lora_A"), part("lora_B")) {
                    let cols = tensor.shape().row_len();
                    let rank = a.len() / cols;
                    matrices += rank / lora.rank;
                    for (i, value) in values.iter_mut().enumerate() {
                        let (row, col) = (i / cols, i % cols);
                        let sum: f32 =
                            (0..rank).map(|r| b[row * rank + r] * a[r * cols + col]).sum();
                        *value += lora.scale() * sum;
                    }
                }
                let spec = TensorSpec {
                    name: name.clone(),
                    dtype: DType::F32,
                    shape: tensor.shape().clone(),
                };
                (spec, values.iter().flat_map(|value| value.to_le_bytes()).collect())
            })
            .collect();
        assert_eq!(2 * matrices, parameters.all().len(), "{case}");
        std::fs::create_dir(&merged).unwrap();
        std::fs::copy(golden.join("config.json"), merged.join("config.json")).unwrap();
        let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let path = merged.join("model.safetensors");
        let mut writer =
            safetensors::SafetensorsWriter::create(&path, &Default::default(), &specs, None)
                .unwrap();
        for (spec, bytes) in &tensors {
            writer.write(&spec.name, bytes).unwrap();
        }
        writer.finish().unwrap();

        let tokens: Vec<u32> = (0..30).map(|i| i * 7 % 50 + 3).collect();
        let (targets, weights) = (tokens[1..].to_vec(), [1.0; 29]);
        let sequences = crate::alone(0..29);
        let batch = Batch {
            tokens: &tokens[..29],
            sequences: &sequences,
            targets: &targets,
            weights: &weights,
        };
        let adapted = network.loss(&cpu, &parameters, &batch).unwrap();
        // As it begins another run.
        if case != "phi3_short" {
            let file = AdapterFile::open(&directory, checkpoint.config()).unwrap();
            let mut again = Parameters::default();
            let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut again).unwrap();
            start_from(&file, &lora, &mut again).unwrap();
            assert_eq!(again.values, parameters.values, "{case}");
            assert_eq!(network.loss(&cpu, &again, &batch).unwrap(), adapted);
            let other = LoraConfig { alpha: 1.0, ..lora.clone() };
            let error = start_from(&file, &other, &mut again).unwrap_err();
            assert!(error.to_string().contains("--alpha"), "{error}");
        }
        // As it is merged here.
        let file = AdapterFile::open(&directory, checkpoint.config()).unwrap();
        let here = Checkpoint::open(&golden).unwrap().adapted(Arc::new(file), 1.0);
        let mut plain = Parameters::default();
        let mut merged_here = crate::build(&cpu, &here, &lora, 64, &mut plain).unwrap();
        let found = merged_here.loss(&cpu, &plain, &batch).unwrap();
        assert!((found - adapted).abs() < 1e-5 * adapted, "{case}: {found} merged here");
        let checkpoint = Checkpoint::open(&merged).unwrap();
        let mut plain = Parameters::default();
        let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut plain).unwrap();
        let found = network.loss(&cpu, &plain, &batch).unwrap();
        assert!(
            (found - adapted).abs() < 1e-5 * adapted,
            "{case}: {found} merged, {adapted} adapted"
        );
    }
}

/// A run that was stopped after any step and goes on ends in the bytes of one that was not, with every optimizer.
#[test]
fn a_run_goes_on_to_the_bit() {
    let checkpoint = tiny_austen();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let reader = Reader { tokenizer: &tokenizer, template: None, context: 32, whole: false };
    let text = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen/README.md"),
    )
    .unwrap();
    let all = reader.text(&text, "text").unwrap().all;
    let (held_out, learnt) = all.split_at(2);
    let cpu = Cpu::new(2).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for kind in [OptimizerKind::AdamW, OptimizerKind::AdamW8bit, OptimizerKind::Lion] {
        let lora = LoraConfig { dropout: 0.1, ..LoraConfig::all_linear() };
        let config = TrainConfig {
            optimizer: OptimizerConfig::new(kind),
            learning_rate: 1e-3,
            neftune: 1.0,
            evaluate_every: 2,
            keep_best: true,
            patience: 100,
            ..config(7)
        };
        let run = |stops: &[usize]| {
            let mut parameters = Parameters::default();
            let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
            let path = dir.path().join("checkpoint.safetensors");
            let make = |network: &mut Network<'_>, parameters: &Parameters| {
                let (learnt, held_out) = (Lessons::Examples(learnt), Lessons::Examples(held_out));
                Trainer::new(network, parameters, &cpu, learnt, held_out, config.clone(), None)
                    .unwrap()
            };
            let mut trainer = make(&mut network, &parameters);
            let mut losses = Vec::new();
            while !trainer.is_done() {
                if stops.contains(&trainer.steps()) {
                    trainer.save(&parameters, "these", &path).unwrap();
                    // As another process would begin.
                    parameters = Parameters::default();
                    network = crate::build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
                    trainer = make(&mut network, &parameters);
                    let error = trainer.resume(&mut parameters, "others", &path).unwrap_err();
                    assert!(error.to_string().contains("other options"), "{error}");
                    trainer.resume(&mut parameters, "these", &path).unwrap();
                }
                losses.push(trainer.step(&mut network, &mut parameters, &cpu).unwrap().loss);
            }
            trainer.finish(&mut parameters);
            (losses, parameters.values)
        };
        let whole = run(&[]);
        assert_eq!(whole, run(&[1]), "{kind:?}");
        assert_eq!(whole, run(&[0, 3, 4, 6]), "{kind:?}");
    }
}

/// The answer that is preferred becomes more likely than the other; the loss begins at ln 2 and its gradient is what it
/// changes by.
#[test]
fn preferences_are_learnt() {
    let checkpoint = tiny_austen();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let reader = Reader { tokenizer: &tokenizer, template: None, context: 64, whole: false };
    let cpu = Cpu::new(2).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.jsonl");
    let names = ["Emma", "Anne", "Fanny", "Jane", "Lydia", "Mary", "Kitty", "Lucy"];
    let lines: String = names
        .iter()
        .map(|name| {
            format!(
                "{{\"prompt\": \"{name} said:\", \"chosen\": \" yes, dear {name}.\", \"rejected\": \" no, never, {name}!\"}}\n"
            )
        })
        .collect();
    std::fs::write(&path, lines).unwrap();
    let files = [DataFile { path, kind: Kind::JsonLines }];
    let pairs = reader.pairs(&files, cpu.pool()).unwrap().all;
    let (learnt, held_out) = pairs.split_at(6);
    let of = |pairs| Lessons::Pairs { pairs, beta: 0.5 };
    let mut parameters = Parameters::default();
    let lora = LoraConfig::all_linear();
    let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
    let config = TrainConfig { evaluate_every: 1, ..config(25) };
    let mut trainer =
        Trainer::new(&mut network, &parameters, &cpu, of(learnt), of(held_out), config, None)
            .unwrap();
    let before = trainer.held_out_loss(&mut network, &parameters, &cpu).unwrap().unwrap();
    assert!((before - 2f64.ln()).abs() < 1e-6, "{before}");
    let mut last = None;
    while !trainer.is_done() {
        // Along the gradient of this step: what the step says of its own loss.
        last = Some(trainer.step(&mut network, &mut parameters, &cpu).unwrap());
    }
    let last = last.unwrap();
    assert!(last.held_out.unwrap() < 0.3 && last.preferred == Some(1.0), "{last:?}");
}

#[test]
fn a_loss_that_is_no_number_names_its_examples() {
    let checkpoint = tiny_austen();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let reader = Reader { tokenizer: &tokenizer, template: None, context: 32, whole: false };
    let learnt = reader.text(&"It is a truth. ".repeat(40), "text").unwrap().all;
    let cpu = Cpu::new(1).unwrap();
    let mut parameters = Parameters::default();
    let lora = LoraConfig::all_linear();
    let mut network = crate::build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
    let config = TrainConfig { learning_rate: 1e38, in_order: true, ..config(9) };
    let observe = &mut |_: &_| ControlFlow::Continue(());
    let error = train(&mut network, &mut parameters, &cpu, &learnt, &[], &config, observe);
    let Err(Error::BadStep { step, examples }) = error else { panic!("{error:?}") };
    assert!(step > 1, "the first step was in order");
    let first = (step - 1) * 3;
    let expected: Vec<usize> = (first..first + 3).map(|i| i % learnt.len() + 1).collect();
    assert_eq!(examples, expected);
    let text = Error::BadStep { step, examples }.to_string();
    assert!(text.contains(&format!("number {}, ", expected[0])), "{text}");
}
