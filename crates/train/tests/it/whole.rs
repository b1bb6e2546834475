//! Training of models themselves: of all their tensors or some, from nothing, and for types of few bits.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bevel_base::DType;
use bevel_kernels::Cpu;
use bevel_model::{AdapterFile, Checkpoint};
use bevel_train::{
    AsStored, Batch, LoraConfig, Network, NetworkConfig, Optimizer, OptimizerConfig, Parameters,
    Precision, Recompute, Rounding, Start, Ternary, Trainable, start_from, write_adapter,
};

use crate::alone;
use crate::training::tiny_austen;

const TEXT: &str = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.";

/// A text's tokens, and those that follow them.
fn tokens(checkpoint: &Checkpoint) -> (Vec<u32>, Vec<u32>) {
    if checkpoint.config().vocab_size < 100 {
        return ((2..34).collect(), (3..35).collect());
    }
    let mut tokens = tiny_austen().tokenizer().unwrap().encode(TEXT, true, false).unwrap();
    let targets = tokens[1..].to_vec();
    tokens.pop();
    assert!(tokens.iter().all(|&token| (token as usize) < checkpoint.config().vocab_size));
    (tokens, targets)
}

struct Run {
    losses: Vec<f64>,
    gradients: Vec<f32>,
    tensors: Vec<(String, Arc<[f32]>)>,
}

/// The losses of some steps and after them, the last gradients, and what was trained.
fn train(checkpoint: &Checkpoint, trainable: &Trainable, steps: usize, rate: f32) -> Run {
    let cpu = Cpu::new(2).unwrap();
    let config =
        NetworkConfig { context: 64, precision: Precision::Single, recompute: Recompute::Nothing };
    let mut parameters = Parameters::default();
    let mut network = Network::new(&cpu, checkpoint, trainable, &config, &mut parameters).unwrap();
    let (tokens, targets) = tokens(checkpoint);
    let weights = vec![1.0 / tokens.len() as f32; tokens.len()];
    let sequences = alone(0..tokens.len());
    let batch =
        Batch { tokens: &tokens, sequences: &sequences, targets: &targets, weights: &weights };
    let mut optimizer = Optimizer::new(OptimizerConfig::default(), parameters.values.len());
    let mut losses = Vec::new();
    for _ in 0..steps {
        parameters.clear_gradients();
        losses.push(network.loss_and_gradients(&cpu, &mut parameters, &batch, None).unwrap());
        optimizer.step(&cpu, &mut parameters, rate);
    }
    losses.push(network.loss(&cpu, &parameters, &batch).unwrap());
    let tensors = network.tensors(&parameters);
    Run { losses, gradients: parameters.gradients, tensors }
}

/// A directory with tiny-austen's configuration and tokenizer alone.
fn blank() -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let to = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(from.join(name), to.path().join(name)).unwrap();
    }
    to
}

#[test]
fn a_model_learns_from_nothing() {
    let dir = blank();
    let open = |seed| Checkpoint::blank(dir.path()).unwrap().with_random_weights(seed);
    let checkpoint = open(1);
    let full = tiny_austen();
    let names = |checkpoint: &Checkpoint| checkpoint.tensors().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&checkpoint), names(&full));
    assert_eq!(checkpoint.parameters(), full.parameters());
    assert_eq!(
        checkpoint.tokenizer().unwrap().vocab_size(),
        full.tokenizer().unwrap().vocab_size()
    );

    let name = "blk.1.ffn_up.weight";
    let values = |seed| open(seed).read_f32(name).unwrap();
    assert!(values(1) == values(1) && values(1) != values(2));
    let deviation = |name: &str| {
        let values = checkpoint.read_f32(name).unwrap();
        let square: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        (square / values.len() as f64).sqrt()
    };
    assert!((deviation(name) - 0.02).abs() < 2e-4, "{}", deviation(name));
    let added = 0.02 / 8f64.sqrt();
    assert!((deviation("blk.1.ffn_down.weight") - added).abs() < 1e-4);
    assert!(checkpoint.read_f32("blk.0.attn_norm.weight").unwrap().iter().all(|&w| w == 1.0));

    let run = train(&checkpoint, &Trainable::everything(), 30, 3e-3);
    let (first, last) = (run.losses[0], run.losses[30]);
    // As likely as any other token.
    assert!((first - 4096f64.ln()).abs() < 0.2, "{first}");
    assert!(last < 2.5, "{first} became {last}");
    // What is written is what was learnt.
    let trained = checkpoint.replaced(run.tensors);
    let again = train(&trained, &Trainable::default(), 0, 0.0);
    assert_eq!(again.losses, [last]);
}

#[test]
fn some_tensors_are_trained_and_others_stay() {
    let checkpoint = tiny_austen();
    let trainable = Trainable { tensors: vec!["*norm.weight".to_owned()], ..Trainable::default() };
    let run = train(&checkpoint, &trainable, 5, 1e-2);
    assert_eq!(run.tensors.len(), 9);
    assert!(run.losses[5] < run.losses[0], "{:?}", run.losses);
    let trained = tiny_austen().replaced(run.tensors);
    for name in checkpoint.tensors().keys() {
        let same = checkpoint.read_f32(name).unwrap() == trained.read_f32(name).unwrap();
        assert_eq!(same, !name.ends_with("norm.weight"), "{name}");
    }
    let again = train(&trained, &Trainable::default(), 0, 0.0);
    assert_eq!(again.losses[0], run.losses[5]);
}

fn roundings(checkpoint: &Checkpoint, rounding: &Arc<dyn Rounding>) -> Trainable {
    let linear = checkpoint.tensors().iter();
    let linear =
        linear.filter(|(name, tensor)| name.starts_with("blk.") && tensor.shape.dims().len() == 2);
    let roundings: BTreeMap<String, Arc<dyn Rounding>> =
        linear.map(|(name, _)| (name.clone(), rounding.clone())).collect();
    Trainable { roundings, ..Trainable::everything() }
}

/// The same model with every rounded matrix as it is rounded.
fn rounded(trainable: &Trainable, tensors: &[(String, Arc<[f32]>)]) -> Checkpoint {
    let checkpoint = tiny_austen();
    let round = |(name, values): &(String, Arc<[f32]>)| {
        let mut values = values.to_vec();
        if let Some(rounding) = trainable.roundings.get(name) {
            let scale = rounding.scale(&values);
            let cols = checkpoint.tensors()[name].shape.row_len();
            values.chunks_exact_mut(cols).for_each(|row| rounding.round(scale, row));
        }
        (name.clone(), values.into())
    };
    let tensors: Vec<(String, Arc<[f32]>)> = tensors.iter().map(round).collect();
    checkpoint.replaced(tensors)
}

#[test]
fn what_is_trained_for_a_type_computes_the_same_in_it() {
    let checkpoint = tiny_austen();
    for dtype in [DType::Q4_0, DType::Q3_K] {
        let rounding: Arc<dyn Rounding> = Arc::new(AsStored(dtype));
        let trainable = roundings(&checkpoint, &rounding);
        let run = train(&checkpoint, &trainable, 4, 1e-4);
        assert!(run.losses[4] < run.losses[0], "{dtype}: {:?}", run.losses);
        let stored = rounded(&trainable, &run.tensors);
        assert_eq!(
            train(&stored, &Trainable::default(), 0, 0.0).losses[0],
            run.losses[4],
            "{dtype}"
        );
        // The gradient of weights is that of what they are rounded to.
        let of_weights =
            train(&rounded(&trainable, &run.tensors), &Trainable::everything(), 1, 0.0);
        let trained = tiny_austen().replaced(run.tensors);
        assert!(train(&trained, &trainable, 1, 0.0).gradients == of_weights.gradients, "{dtype}");
    }
}

#[test]
fn ternary_weights_are_learnt() {
    let checkpoint = tiny_austen();
    let rounding: Arc<dyn Rounding> = Arc::new(Ternary);
    let trainable = roundings(&checkpoint, &rounding);
    let run = train(&checkpoint, &trainable, 30, 1e-3);
    let (first, last) = (run.losses[0], run.losses[30]);
    assert!(first > 3.5 && last < 0.1, "{first} became {last}");
    // Ternary already: rounding them once more, as a file does, changes nothing.
    let written = &run.tensors;
    for (name, values) in written.iter().filter(|(name, _)| trainable.roundings.contains_key(name))
    {
        let scale = values.iter().fold(0.0f32, |most, w| most.max(w.abs()));
        assert!(values.iter().all(|w| [0.0, scale].contains(&w.abs())), "{name}");
        let mut stored = values.to_vec();
        stored.chunks_exact_mut(256).for_each(|row| AsStored(DType::TQ2_0).round(1.0, row));
        assert_eq!(stored[..], values[..], "{name}");
    }
    // But for the 8 bits of inputs.
    let plain =
        train(&tiny_austen().replaced(run.tensors), &Trainable::default(), 0, 0.0).losses[0];
    assert!((plain - last).abs() < 0.02, "{plain} {last}");
}

/// What is written of an adapter with lengths and whole tensors is what was trained, and training goes on from it.
#[test]
fn an_adapter_keeps_lengths_and_whole_tensors() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens/families");
    let cpu = Cpu::new(2).unwrap();
    for (case, start) in [
        ("llama", Start::Uniform),
        ("gemma2", Start::Uniform),
        ("phi3_short", Start::Uniform),
        ("qwen3", Start::Pissa),
    ] {
        let open = || Checkpoint::open(&families.join(case)).unwrap();
        let checkpoint = open();
        let lora = LoraConfig { rank: 3, dora: true, start, ..LoraConfig::all_linear() };
        let trainable = Trainable {
            lora: Some(lora.clone()),
            tensors: vec!["token_embd.weight".to_owned(), "output_norm.weight".to_owned()],
            ..Trainable::default()
        };
        let config =
            NetworkConfig { context: 64, precision: Precision::Single, ..Default::default() };
        let mut parameters = Parameters::default();
        let mut network =
            Network::new(&cpu, &checkpoint, &trainable, &config, &mut parameters).unwrap();
        let mut seed = 1u32;
        for value in &mut parameters.values {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value += (seed >> 8) as f32 / (1u32 << 24) as f32 * 0.2 - 0.1;
        }
        let tokens: Vec<u32> = (2..30).collect();
        let (targets, weights) = ((3..31).collect::<Vec<u32>>(), [0.1; 28]);
        let sequences = alone(0..28);
        let batch =
            Batch { tokens: &tokens, sequences: &sequences, targets: &targets, weights: &weights };
        let loss = network.loss(&cpu, &parameters, &batch).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let (adapters, tensors) = (network.adapters(&parameters), network.tensors(&parameters));
        write_adapter(dir.path(), case, checkpoint.config(), &lora, &adapters, &tensors).unwrap();
        let file = AdapterFile::open(dir.path(), checkpoint.config()).unwrap();
        let merged = open().adapted(Arc::new(file.clone()), 1.0);
        let mut none = Parameters::default();
        let mut frozen =
            Network::new(&cpu, &merged, &Trainable::default(), &config, &mut none).unwrap();
        let found = frozen.loss(&cpu, &none, &batch).unwrap();
        assert!((found - loss).abs() < 1e-4 * loss, "{case}: {found}, trained to {loss}");

        if case == "llama" || case == "gemma2" {
            let mut again = Parameters::default();
            let mut network =
                Network::new(&cpu, &checkpoint, &trainable, &config, &mut again).unwrap();
            start_from(&file, &lora, &mut again).unwrap();
            let error = network.loss(&cpu, &again, &batch).unwrap() - loss;
            assert!(error.abs() < 1e-5 * loss, "{case}");
        }
    }
}

/// Of a mixture its experts and its router learn, and adapters of its attention.
#[test]
fn mixtures_learn() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens/families");
    for case in ["mixtral", "olmoe", "qwen3moe"] {
        let open = || Checkpoint::open(&families.join(case)).unwrap();
        let checkpoint = open();
        let run = train(&checkpoint, &Trainable::everything(), 12, 3e-3);
        assert!(run.losses[12] < 0.7 * run.losses[0], "{case}: {:?}", run.losses);
        let trained = open().replaced(run.tensors);
        for name in ["blk.0.ffn_gate_inp.weight", "blk.1.ffn_down_exps.weight"] {
            assert!(trained.read_f32(name).unwrap() != checkpoint.read_f32(name).unwrap());
        }
        let again = train(&trained, &Trainable::default(), 0, 0.0);
        assert_eq!(again.losses[0], run.losses[12], "{case}");

        let lora = Trainable::lora(LoraConfig::all_linear());
        let run = train(&checkpoint, &lora, 12, 1e-2);
        assert!(run.losses[12] < run.losses[0], "{case}: {:?}", run.losses);
    }
}
