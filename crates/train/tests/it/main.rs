//! Losses against transformers', gradients against differences of losses, and training that learns.

mod data;
mod gradients;
mod log;
mod training;
mod whole;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bevel_formats::safetensors;
use bevel_kernels::{Cpu, Isa};
use bevel_model::Checkpoint;
use bevel_train::{
    Batch, Error, LoraConfig, Network, NetworkConfig, Noise, Optimizer, OptimizerConfig,
    Parameters, Precision, Recompute, Rounding, Start, Ternary, Trainable,
};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens/families").join(case)
}

/// Token ids, and the logits after each, `[tokens, vocab]`.
fn expected(case: &str) -> (Vec<u32>, Vec<f32>) {
    let file = safetensors::Checkpoint::open(&golden(case).join("expected.safetensors")).unwrap();
    let tokens = file.tensor("tokens").unwrap();
    let tokens = tokens.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
    (tokens.collect(), file.tensor("logits").unwrap().to_f32().unwrap())
}

/// Every family.
const FAMILIES: [&str; 17] = [
    "gemma2",
    "gemma3",
    "granite",
    "llama",
    "llama3_rope",
    "llama_biases_tied",
    "mistral_window",
    "mixtral",
    "olmo2",
    "olmoe",
    "phi3_long",
    "phi3_partial",
    "phi3_short",
    "qwen2",
    "qwen2_yarn_window",
    "qwen3",
    "qwen3moe",
];

fn all_linear() -> LoraConfig {
    LoraConfig { rank: 3, alpha: 6.0, ..LoraConfig::all_linear() }
}

/// A model with adapters, in single precision.
fn build<'c>(
    cpu: &Cpu,
    checkpoint: &'c Checkpoint,
    lora: &LoraConfig,
    context: usize,
    parameters: &mut Parameters,
) -> Result<Network<'c>, Error> {
    let config =
        NetworkConfig { context, precision: Precision::Single, recompute: Recompute::Layers(1) };
    Network::new(cpu, checkpoint, &lora.clone().into(), &config, parameters)
}

#[test]
fn losses_are_those_of_transformers() {
    let cpu = Cpu::new(2).unwrap();
    for case in FAMILIES {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let (tokens, logits) = expected(case);
        let vocab = checkpoint.config().vocab_size;
        let n = tokens.len();
        let mut targets = tokens[1..].to_vec();
        targets.push(0);
        let weights: Vec<f32> =
            (0..n).map(|i| if i + 1 < n { 1.0 / (n - 1) as f32 } else { 0.0 }).collect();
        let expected: f64 = logits
            .chunks(vocab)
            .zip(&targets)
            .zip(&weights)
            .map(|((row, &target), &weight)| {
                let sum = row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
                f64::from(weight) * (sum - f64::from(row[target as usize]))
            })
            .sum();
        let mut parameters = Parameters::default();
        let mut network = build(&cpu, &checkpoint, &all_linear(), n, &mut parameters).unwrap();
        let sequences = 0..n;
        let batch = Batch {
            tokens: &tokens,
            sequences: std::slice::from_ref(&sequences),
            targets: &targets,
            weights: &weights,
        };
        // Adapters begin as nothing.
        let loss = network.loss(&cpu, &parameters, &batch).unwrap();
        assert!((loss - expected).abs() < 2e-5 * expected, "{case}: {loss}, expected {expected}");
    }
}

/// One sequence.
fn alone(rows: std::ops::Range<usize>) -> Vec<std::ops::Range<usize>> {
    Vec::from([rows])
}

/// Tokens of two sequences, some of which nothing is to be learnt of.
struct Data {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Data {
    fn new(tokens: Vec<u32>) -> Self {
        let targets = tokens[1..].iter().copied().chain([1]).collect();
        let weights = (0..tokens.len()).map(|i| if i % 5 == 3 { 0.0 } else { 0.1 }).collect();
        Self { tokens, targets, weights }
    }

    fn batch<'a>(&'a self, sequences: &'a [std::ops::Range<usize>]) -> Batch<'a> {
        let Self { tokens, targets, weights } = self;
        Batch { tokens, sequences, targets, weights }
    }
}

#[test]
fn gradients_are_what_losses_change_by() {
    // The loss of a mixture jumps where a token goes to another expert: PyTorch's gradients are what it is held against.
    let mixtures = ["mixtral", "olmoe", "qwen3moe"];
    for case in FAMILIES.into_iter().filter(|case| !mixtures.contains(case)) {
        check_gradients(case, &all_linear().into(), None, Recompute::Layers(1));
    }
}

/// Of other adapters, of whole models, and whatever is computed twice.
#[test]
fn gradients_of_all_that_can_be_trained() {
    let lora = |config: LoraConfig| Trainable::lora(config);
    let noise = Some(Noise { seed: 3, neftune: 0.0 });
    check_gradients(
        "llama",
        &lora(LoraConfig { dora: true, ..all_linear() }),
        None,
        Recompute::Nothing,
    );
    let pissa = LoraConfig { start: Start::Pissa, ..all_linear() };
    check_gradients("qwen3", &lora(pissa), None, Recompute::Layers(2));
    let dropout = LoraConfig { dropout: 0.3, start: Start::Gaussian, ..all_linear() };
    check_gradients("gemma2", &lora(dropout), noise, Recompute::Layers(1));
    for case in ["llama", "llama_biases_tied", "gemma3", "phi3_short", "olmo2", "granite"] {
        check_gradients(case, &Trainable::everything(), None, Recompute::Nothing);
    }
    let with_head = Trainable {
        lora: Some(LoraConfig { targets: vec!["blk.0.attn_?".to_owned()], ..all_linear() }),
        tensors: vec!["output.weight".to_owned(), "token_embd.weight".to_owned()],
        ..Trainable::default()
    };
    check_gradients("llama", &with_head, None, Recompute::Layers(1));
}

/// The loss with a step's noise, without its gradients.
fn noisy_loss(
    network: &mut Network<'_>,
    cpu: &Cpu,
    parameters: &Parameters,
    batch: &Batch<'_>,
    noise: Option<Noise>,
) -> f64 {
    network.loss_and_gradients(cpu, &mut parameters.clone(), batch, noise).unwrap()
}

#[track_caller]
fn check_gradients(case: &str, trainable: &Trainable, noise: Option<Noise>, recompute: Recompute) {
    let cpu = Cpu::new(2).unwrap();
    {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let data = Data::new(expected(case).0);
        let n = data.tokens.len();
        let sequences = [0..n / 3, n / 3..n];
        let batch = data.batch(&sequences);
        let mut parameters = Parameters::default();
        let config = NetworkConfig { context: n, precision: Precision::Single, recompute };
        let mut network =
            Network::new(&cpu, &checkpoint, trainable, &config, &mut parameters).unwrap();
        // Where B is zero, A has no gradient.
        let mut seed = 1u32;
        for value in &mut parameters.values {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *value += (seed >> 8) as f32 / (1u32 << 24) as f32 * 0.2 - 0.1;
        }
        let loss = network.loss_and_gradients(&cpu, &mut parameters, &batch, noise).unwrap();
        if noise.is_none() {
            assert!((loss - network.loss(&cpu, &parameters, &batch).unwrap()).abs() < 1e-9);
        }
        // Along the gradient of each parameter alone, so that none can hide behind another.
        let values = parameters.values.clone();
        // DoRA's gradient takes the lengths of rows as constants, which a difference of losses does not.
        let dora = trainable.lora.as_ref().is_some_and(|lora| lora.dora);
        let all = parameters.all().to_vec();
        for parameter in all.into_iter().filter(|p| !dora || p.name.ends_with("lora_m")) {
            let gradient = parameters.gradients[parameter.range.clone()].to_vec();
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{case}: {} has no gradient", parameter.name);
            let step = 0.005 / norm.max(0.05);
            let mut at = |direction: f64| {
                let place = parameters.values[parameter.range.clone()]
                    .iter_mut()
                    .zip(&values[parameter.range.clone()]);
                for ((value, &before), &g) in place.zip(&gradient) {
                    *value = (f64::from(before) + direction * step * f64::from(g)) as f32;
                }
                noisy_loss(&mut network, &cpu, &parameters, &batch, noise)
            };
            let (above, below) = (at(1.0), at(-1.0));
            at(0.0);
            let change = (above - below) / (2.0 * step);
            let error = (change - norm * norm).abs();
            assert!(
                error < 0.01 * norm * norm + 2e-6 / step,
                "{case}: {}: the loss changes by {change}, the gradient says {}",
                parameter.name,
                norm * norm
            );
        }
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let checkpoint = Checkpoint::open(&golden("qwen3")).unwrap();
    let data = Data::new(expected("qwen3").0);
    let sequences = alone(0..data.tokens.len());
    let run = |cpu: &Cpu| {
        let mut parameters = Parameters::default();
        let mut network = build(cpu, &checkpoint, &all_linear(), 64, &mut parameters).unwrap();
        let mut optimizer = Optimizer::new(OptimizerConfig::default(), parameters.values.len());
        for _ in 0..3 {
            parameters.clear_gradients();
            network
                .loss_and_gradients(cpu, &mut parameters, &data.batch(&sequences), None)
                .unwrap();
            optimizer.step(cpu, &mut parameters, 1e-2);
        }
        parameters.values.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
    };
    for isa in Isa::available() {
        let alone = run(&Cpu::with_isa(1, isa));
        for threads in [2, 3] {
            assert!(run(&Cpu::with_isa(threads, isa)) == alone, "{isa}, {threads} threads");
        }
    }
}

#[test]
fn a_text_is_learnt_by_heart() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let (cpu, checkpoint) = (Cpu::new(2).unwrap(), Checkpoint::open(&dir).unwrap());
    let text = "The bevel is the angled cut that makes an edge; no one in Meryton had ever seen such a tool.";
    let tokens = checkpoint.tokenizer().unwrap().encode(text, true, false).unwrap();
    let n = tokens.len() - 1;
    let (targets, weights) = (tokens[1..].to_vec(), vec![1.0 / n as f32; n]);
    let sequences = alone(0..n);
    let batch =
        Batch { tokens: &tokens[..n], sequences: &sequences, targets: &targets, weights: &weights };
    let mut parameters = Parameters::default();
    let config = LoraConfig::all_linear();
    let mut network = build(&cpu, &checkpoint, &config, 64, &mut parameters).unwrap();
    let mut optimizer = Optimizer::new(OptimizerConfig::default(), parameters.values.len());
    let before = network.loss(&cpu, &parameters, &batch).unwrap();
    for _ in 0..60 {
        parameters.clear_gradients();
        network.loss_and_gradients(&cpu, &mut parameters, &batch, None).unwrap();
        parameters.clip_gradients(1.0);
        optimizer.step(&cpu, &mut parameters, 5e-3);
    }
    let after = network.loss(&cpu, &parameters, &batch).unwrap();
    assert!(before > 4.0 && after < 0.2, "the loss was {before} and is {after}");
}

#[test]
fn what_cannot_be_trained_says_so() {
    let cpu = Cpu::new(1).unwrap();
    let checkpoint = Checkpoint::open(&golden("llama")).unwrap();
    let mut parameters = Parameters::default();
    let mut network = build(&cpu, &checkpoint, &all_linear(), 64, &mut parameters).unwrap();
    let data = Data::new(vec![1, 2, 60_000]);
    let sequences = alone(0..3);
    let error = network.loss(&cpu, &parameters, &data.batch(&sequences)).unwrap_err();
    assert!(error.to_string().contains("60000"), "{error}");
}

/// What is computed twice is the same, and so is what is learnt; of every second layer too.
#[test]
fn nothing_depends_on_what_is_computed_twice() {
    let cpu = Cpu::new(2).unwrap();
    let checkpoint = Checkpoint::open(&golden("gemma2")).unwrap();
    let data = Data::new(expected("gemma2").0);
    let sequences = alone(0..data.tokens.len());
    let lora = LoraConfig { dropout: 0.2, ..all_linear() };
    let run = |recompute| {
        let mut parameters = Parameters::default();
        let config = NetworkConfig { context: 64, precision: Precision::Bf16, recompute };
        let trainable = lora.clone().into();
        let mut network =
            Network::new(&cpu, &checkpoint, &trainable, &config, &mut parameters).unwrap();
        parameters.values.iter_mut().for_each(|value| *value += 0.01);
        let noise = Some(Noise { seed: 5, neftune: 5.0 });
        let batch = data.batch(&sequences);
        let loss = network.loss_and_gradients(&cpu, &mut parameters, &batch, noise).unwrap();
        let exact = network.loss(&cpu, &parameters, &batch).unwrap();
        assert!(loss != exact, "there is noise");
        (loss.to_bits(), parameters.gradients)
    };
    let all = run(Recompute::Nothing);
    for layers in [1, 2, 3, 100] {
        assert!(run(Recompute::Layers(layers)) == all, "every {layers} layers");
    }
}

/// PiSSA's adapter has no effect at the beginning, and what is written of it is what was learnt.
#[test]
fn principal_vectors_begin_without_effect() {
    let cpu = Cpu::new(2).unwrap();
    let checkpoint = Checkpoint::open(&golden("llama")).unwrap();
    let data = Data::new(expected("llama").0);
    let sequences = alone(0..data.tokens.len());
    let batch = data.batch(&sequences);
    let loss = |start| {
        let mut parameters = Parameters::default();
        let lora = LoraConfig { start, ..all_linear() };
        let mut network = build(&cpu, &checkpoint, &lora, 64, &mut parameters).unwrap();
        let adapters = network.adapters(&parameters);
        (network.loss(&cpu, &parameters, &batch).unwrap(), adapters)
    };
    let ((plain, _), (pissa, adapters)) = (loss(Start::Uniform), loss(Start::Pissa));
    assert!((plain - pissa).abs() < 1e-5 * plain, "{plain} {pissa}");
    for adapter in adapters {
        assert_eq!(adapter.rank, 6);
        let cols = adapter.a.len() / 6;
        let largest = adapter.b.iter().fold(0.0f32, |most, b| most.max(b.abs()));
        assert!(largest > 1e-3, "{}: it begins with the weights' own directions", adapter.name);
        for row in adapter.b.chunks_exact(6) {
            for col in 0..cols {
                let sum: f32 = (0..6).map(|r| row[r] * adapter.a[r * cols + col]).sum();
                assert!(sum.abs() < 1e-6, "{}", adapter.name);
            }
        }
    }
}

/// LoftQ's adapter makes up for what quantization lost.
#[test]
fn what_quantization_lost_is_where_an_adapter_begins() {
    let cpu = Cpu::new(2).unwrap();
    let open = || training::tiny_austen();
    let original = open();
    // The same model in ternary weights.
    let quantized = original
        .tensors()
        .iter()
        .filter(|(name, entry)| name.starts_with("blk.") && entry.shape.dims().len() == 2);
    let quantized = quantized.map(|(name, entry)| {
        let mut values = original.read_f32(name).unwrap();
        let scale = Ternary.scale(&values);
        let rows = values.chunks_exact_mut(entry.shape.row_len());
        rows.for_each(|row| Ternary.round(scale, row));
        (name.clone(), values.into())
    });
    let base = open().replaced(quantized.collect::<Vec<_>>());
    let text =
        "She was the youngest of the two daughters of a most affectionate, indulgent father.";
    let tokens = open().tokenizer().unwrap().encode(text, true, false).unwrap();
    let n = tokens.len() - 1;
    let (targets, weights) = (tokens[1..].to_vec(), vec![1.0 / n as f32; n]);
    let sequences = alone(0..n);
    let batch =
        Batch { tokens: &tokens[..n], sequences: &sequences, targets: &targets, weights: &weights };
    let run = |model: &Checkpoint, lora: LoraConfig, original: Option<Checkpoint>| {
        let trainable = Trainable { original: original.map(Arc::new), ..Trainable::lora(lora) };
        let config =
            NetworkConfig { context: 64, precision: Precision::Single, ..Default::default() };
        let mut parameters = Parameters::default();
        let mut network = Network::new(&cpu, model, &trainable, &config, &mut parameters)?;
        network.loss(&cpu, &parameters, &batch)
    };
    let lora = |rank, start| LoraConfig { rank, start, ..LoraConfig::all_linear() };
    let best = run(&original, lora(4, Start::Uniform), None).unwrap();
    let worst = run(&base, lora(4, Start::Uniform), None).unwrap();
    let loss = |rank, dora| {
        let lora = LoraConfig { dora, ..lora(rank, Start::LoftQ) };
        run(&base, lora, Some(open())).unwrap()
    };
    let found = [loss(64, false), loss(64, true)];
    // How much of what was lost is back.
    let back = found.map(|loss| (worst - loss) / (worst - best));
    assert!(worst - best > 0.3, "{best} {worst}");
    assert!(back[0] > 0.5 && (back[1] - back[0]).abs() < 1e-3, "{back:?}");
    let alone = run(&base, lora(4, Start::LoftQ), None).unwrap_err().to_string();
    assert!(alone.contains("original"), "{alone}");
    let other = Checkpoint::open(&golden("llama")).unwrap();
    let other = run(&base, lora(4, Start::LoftQ), Some(other)).unwrap_err().to_string();
    assert!(other.contains("other shapes"), "{other}");
}
