//! Every family against transformers: logits of tiny random checkpoints, from the Hugging Face
//! directory and from the GGUF file it becomes. `goldens/families/make_families.py` made them.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bevel_base::DType;
use bevel_formats::gguf::{GgufFile, GgufWriter, Metadata};
use bevel_formats::{TensorSpec, safetensors};
use bevel_kernels::{Cpu, Isa, KvType, attention_tree, rms_norm_in_place};
use bevel_model::{
    Batch, Block, BlockState, Checkpoint, Error, KvCache, Model, NormPlacement, Part, Precision,
    Sequence, Site, Stage, State,
};

pub(crate) fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/families").join(case)
}

fn expected(case: &str) -> (Vec<u32>, Vec<f32>) {
    expected_in(&golden(case))
}

/// Token ids, and the logits after each, `[tokens, vocab]`.
pub(crate) fn expected_in(dir: &Path) -> (Vec<u32>, Vec<f32>) {
    let file = safetensors::Checkpoint::open(&dir.join("expected.safetensors")).unwrap();
    let tokens = file.tensor("tokens").unwrap();
    let tokens = tokens.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
    (tokens.collect(), file.tensor("logits").unwrap().to_f32().unwrap())
}

/// Logits after every token, the tokens fed in steps of the given sizes.
pub(crate) fn logits(model: &Model, cpu: &Cpu, tokens: &[u32], steps: &[usize]) -> Vec<f32> {
    let config = model.config();
    let mut cache = KvCache::new(config, KvType::F32, 64).unwrap();
    let mut state = State::new(config, tokens.len());
    // A neighbour takes the first block, so that block tables are not the identity.
    let (mut neighbour, mut sequence) = (Sequence::new(), Sequence::new());
    cache.extend(&mut neighbour, 1).unwrap();
    let mut all = Vec::new();
    let mut rest = tokens;
    for &step in steps.iter().chain(std::iter::repeat(&tokens.len())) {
        let (now, later) = rest.split_at(step.min(rest.len()));
        if now.is_empty() {
            break;
        }
        cache.extend(&mut sequence, now.len()).unwrap();
        let parts = [sequence.part(now.len())];
        let outputs: Vec<usize> = (0..now.len()).collect();
        let batch = Batch { tokens: now, parts: &parts, outputs: &outputs };
        all.extend_from_slice(model.forward(cpu, &batch, cache.pool(), &mut state).unwrap());
        rest = later;
    }
    all
}

/// ‖a − b‖ / ‖b‖ over all logits.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)))
        / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// Writes the checkpoint as the GGUF file it is presented as.
pub(crate) fn write_gguf(checkpoint: &Checkpoint, path: &Path) {
    let mut metadata = Metadata::new();
    checkpoint.config().to_gguf(&mut metadata);
    let specs: Vec<TensorSpec> = checkpoint
        .tensors()
        .iter()
        .map(|(name, entry)| TensorSpec::new(name, entry.dtype, entry.shape.clone()))
        .collect();
    let mut writer = GgufWriter::create(path, &metadata, &specs, None).unwrap();
    for name in checkpoint.tensors().keys() {
        writer.write(name, &checkpoint.read(name).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

/// A rotated model computes the same function, with other weights.
#[track_caller]
fn check_rotated(path: &Path, cpu: &Cpu, tokens: &[u32], want: &[f32]) {
    let stored = Checkpoint::open(path).unwrap();
    let family = stored.config().family;
    let before = stored.read_f32("blk.0.attn_output.weight").unwrap();
    let rotated = Checkpoint::open(path).unwrap().rotated(3);
    if family.norms != NormPlacement::Pre {
        assert!(matches!(rotated, Err(Error::NotRotatable { .. })), "{}", family.gguf);
        return;
    }
    let rotated = rotated.unwrap();
    assert_ne!(rotated.read_f32("blk.0.attn_output.weight").unwrap(), before);
    assert!(rotated.read_f32("output_norm.weight").unwrap().iter().all(|&gain| gain == 1.0));
    let model = Model::load(rotated, cpu, &mut |_| {}).unwrap().with_exact_products();
    let error = relative_error(&logits(&model, cpu, tokens, &[tokens.len()]), want);
    assert!(error < 1e-4, "{} rotated: relative error {error:.2e}", path.display());
}

#[track_caller]
fn check(case: &str) {
    let (tokens, want) = expected(case);
    let dir = golden(case);
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("model.gguf");
    write_gguf(&Checkpoint::open(&dir).unwrap(), &file);
    assert!(GgufFile::open(&file).is_ok());
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        for path in [&dir, &file] {
            let checkpoint = Checkpoint::open(path).unwrap();
            let blockwise = |precision| blockwise_logits(&checkpoint, &cpu, &tokens, precision);
            let error = relative_error(&blockwise(Precision::Single), &want);
            assert!(error < 1e-4, "{case} block by block on {isa}: relative error {error:.2e}");
            let error = relative_error(&blockwise(Precision::Fast), &want);
            assert!(error < 0.05, "{case} block by block in bf16: relative error {error:.2e}");
            assert_eq!(checkpoint.unused(), [""; 0], "{}", path.display());
            check_rotated(path, &cpu, &tokens, &want);
            let model = Model::load(checkpoint, &cpu, &mut |_| {}).unwrap();
            let error = relative_error(&logits(&model, &cpu, &tokens, &[40]), &want);
            let bound = if isa.has_bf16_products() { 1e-2 } else { 1e-4 };
            assert!(error < bound, "{case} on {isa}, inputs rounded: relative error {error:.2e}");
            let model = model.with_exact_products();
            for steps in [&[40][..], &[17, 1, 1, 3]] {
                let got = logits(&model, &cpu, &tokens, steps);
                let error = relative_error(&got, &want);
                assert!(
                    error < 1e-4,
                    "{case} from {} on {isa}, steps {steps:?}: relative error {error:.2e}",
                    if path == &dir { "the directory" } else { "the GGUF file" },
                );
            }
        }
    }
}

/// The model block by block, as a calibration walk sees it, every weight read and set again.
pub(crate) fn blockwise_logits(
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    tokens: &[u32],
    precision: Precision,
) -> Vec<f32> {
    let config = checkpoint.config();
    let embedding = checkpoint.read_f32("token_embd.weight").unwrap();
    let row = |&t: &u32| embedding[t as usize * config.dim..][..config.dim].iter();
    let mut x: Vec<f32> = tokens.iter().flat_map(row).map(|v| v * config.embedding_scale).collect();
    let mut run = BlockState::new(config, tokens.len()).unwrap();
    for layer in 0..config.layers {
        let mut block = Block::load(checkpoint, cpu, layer, precision).unwrap();
        let prefix = format!("blk.{layer}.");
        for (full, entry) in checkpoint.tensors() {
            let Some(name) = full.strip_prefix(&prefix) else { continue };
            let values = checkpoint.read_f32(full).unwrap();
            match Stage::of(name) {
                Some(_) if name.contains("_exps") => {
                    let matrix = values.len() / entry.shape.dims()[0];
                    for (expert, values) in values.chunks(matrix).enumerate() {
                        block.set_weight(cpu, name, Some(expert), values).unwrap();
                    }
                }
                Some(_) => block.set_weight(cpu, name, None, &values).unwrap(),
                None if name == "ffn_gate_inp.weight" => {}
                None => block.set_vector(name, &values).unwrap(),
            }
        }
        let before = x.clone();
        for stage in Stage::ALL {
            // Breaking off at a stage leaves the residual stream alone.
            let (mut seen, mut input) = (Vec::new(), Vec::new());
            let mut tap = |site: Site, x: &[f32], n: usize| {
                assert_eq!(x.len() % n, 0);
                seen.push(site.stage);
                input = x.to_vec();
                if site.stage == stage { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let done = match stage {
                Stage::Qkv | Stage::AttentionOutput => {
                    block.attention(cpu, config, &mut x, &mut run, &mut tap).unwrap()
                }
                _ => block.feed_forward(cpu, config, &mut x, &mut run, &mut tap).unwrap(),
            };
            assert!(done.is_break());
            assert_eq!(seen.last(), Some(&stage));
            assert_eq!(x, before);
            let is_last =
                stage == Stage::AttentionOutput || stage == Stage::Down && config.experts.is_none();
            if is_last {
                // What was broken off there and finished is what goes on.
                let mut finished = before.clone();
                block.finish(cpu, config, stage, &input, &mut finished, &mut run).unwrap();
                let mut whole = before.clone();
                let mut pass = |_: Site, _: &[f32], _: usize| ControlFlow::Continue(());
                let done = match stage {
                    Stage::Down => block.feed_forward(cpu, config, &mut whole, &mut run, &mut pass),
                    _ => block.attention(cpu, config, &mut whole, &mut run, &mut pass),
                };
                assert!(done.unwrap().is_continue());
                assert!(finished == whole && whole != before, "layer {layer}, {stage:?}");
            }
        }
        let mut pass = |_: Site, _: &[f32], _: usize| ControlFlow::Continue(());
        assert!(block.attention(cpu, config, &mut x, &mut run, &mut pass).unwrap().is_continue());
        assert!(
            block.feed_forward(cpu, config, &mut x, &mut run, &mut pass).unwrap().is_continue()
        );
    }
    let norm = checkpoint.read_f32("output_norm.weight").unwrap();
    rms_norm_in_place(cpu, &mut x, &norm, config.norm_eps, tokens.len(), config.dim);
    let head = if config.tied { "token_embd.weight" } else { "output.weight" };
    let head = checkpoint.read_f32(head).unwrap();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let cap = |l: f64| config.logit_softcap.map_or(l, |c| f64::from(c) * (l / f64::from(c)).tanh());
    x.chunks(config.dim)
        .flat_map(|x| head.chunks(config.dim).map(move |row| (x, row)))
        .map(|(x, row)| cap(dot(x, row) / f64::from(config.logit_divisor)) as f32)
        .collect()
}

macro_rules! families {
    ($($case:ident),* $(,)?) => {
        $(#[test] fn $case() { check(stringify!($case)); })*

        #[test]
        fn every_golden_is_checked() {
            let mut cases: Vec<String> = std::fs::read_dir(golden(""))
                .unwrap()
                .map(|e| e.unwrap())
                .filter(|e| e.path().is_dir())
                .map(|e| e.file_name().into_string().unwrap())
                .collect();
            cases.sort();
            let mut checked = vec![$(stringify!($case)),*];
            checked.sort_unstable();
            assert_eq!(cases, checked);
        }
    };
}

families!(
    llama,
    llama_biases_tied,
    llama3_rope,
    mistral_window,
    mixtral,
    qwen2,
    qwen2_yarn_window,
    qwen3,
    qwen3moe,
    gemma2,
    gemma3,
    phi3_short,
    phi3_long,
    phi3_partial,
    granite,
    olmo2,
    olmoe,
);

/// Sequences in one batch do not see each other, and each gets the logits it gets alone.
#[test]
fn a_batch_of_sequences_equals_each_alone() {
    let (tokens, _) = expected("llama");
    let cpu = Cpu::with_isa(2, Isa::Scalar);
    let model =
        Model::load(Checkpoint::open(&golden("llama")).unwrap(), &cpu, &mut |_| {}).unwrap();
    let mut cache = KvCache::new(model.config(), KvType::F32, 128).unwrap();
    let mut state = State::new(model.config(), 64);
    let prompts = [&tokens[..5], &tokens[7..28], &tokens[30..31]];
    let mut sequences = [Sequence::new(), Sequence::new(), Sequence::new()];
    for (sequence, prompt) in sequences.iter_mut().zip(prompts) {
        cache.extend(sequence, prompt.len()).unwrap();
    }
    let parts: Vec<Part<'_>> = sequences
        .iter()
        .zip(prompts)
        .map(|(sequence, prompt)| sequence.part(prompt.len()))
        .collect();
    let all = prompts.concat();
    let outputs = [4, 25, 26];
    let batch = Batch { tokens: &all, parts: &parts, outputs: &outputs };
    let together = model.forward(&cpu, &batch, cache.pool(), &mut state).unwrap().to_vec();
    let vocab = model.config().vocab_size;
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = logits(&model, &cpu, prompt, &[]);
        let error = relative_error(&together[i * vocab..][..vocab], &alone[alone.len() - vocab..]);
        assert!(error < 1e-6, "sequence {i}: {error:.2e}");
    }
}

/// The logits of a tree's nodes are those of their paths, fed token by token, bit for bit.
#[test]
fn a_tree_of_tokens_gives_the_logits_of_its_paths() {
    for name in ["llama", "gemma2"] {
        let (tokens, _) = expected(name);
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(2, isa);
            let checkpoint = Checkpoint::open(&golden(name)).unwrap();
            let model = Model::load(checkpoint, &cpu, &mut |_| {}).unwrap();
            let vocab = model.config().vocab_size;
            let prompt = &tokens[..12];
            let parents = [None, Some(0), Some(0), Some(1), Some(2), Some(2), None, Some(5)];
            let (tree, nodes) = (attention_tree(&parents), &tokens[12..20]);

            let mut cache = KvCache::new(model.config(), KvType::F16, 64).unwrap();
            let mut state = State::new(model.config(), 64);
            let mut sequence = Sequence::new();
            let mut step = |tokens: &[u32], tree: &[u64]| {
                cache.extend(&mut sequence, tokens.len()).unwrap();
                let parts = [Part { tree, ..sequence.part(tokens.len()) }];
                let outputs: Vec<usize> = (0..tokens.len()).collect();
                let batch = Batch { tokens, parts: &parts, outputs: &outputs };
                model.forward(&cpu, &batch, cache.pool(), &mut state).unwrap().to_vec()
            };
            step(prompt, &[]);
            let together = step(nodes, &tree);

            for (node, mask) in tree.iter().enumerate() {
                let mut session = bevel_model::Session::new(&model, &cpu, 64, KvType::F16).unwrap();
                session.feed(prompt).unwrap();
                let path = (0..nodes.len()).filter(|i| mask >> i & 1 == 1);
                let mut last = Vec::new();
                for i in path {
                    last = session.feed(&nodes[i..=i]).unwrap().to_vec();
                }
                let found = &together[node * vocab..][..vocab];
                assert_eq!(last, found, "{name} {isa}: node {node}");
            }
        }
    }
}

#[test]
fn half_precision_cache_stays_close() {
    let (tokens, want) = expected("llama");
    let cpu = Cpu::new(1).unwrap();
    let model =
        Model::load(Checkpoint::open(&golden("llama")).unwrap(), &cpu, &mut |_| {}).unwrap();
    let model = model.with_exact_products();
    let mut cache = KvCache::new(model.config(), KvType::F16, 64).unwrap();
    let mut state = State::new(model.config(), 64);
    let mut sequence = Sequence::new();
    cache.extend(&mut sequence, tokens.len()).unwrap();
    let parts = [sequence.part(tokens.len())];
    let outputs: Vec<usize> = (0..tokens.len()).collect();
    let batch = Batch { tokens: &tokens, parts: &parts, outputs: &outputs };
    let got = model.forward(&cpu, &batch, cache.pool(), &mut state).unwrap();
    let error = relative_error(got, &want);
    assert!((1e-7..2e-3).contains(&error), "{error:.2e}");
}

#[test]
fn unknown_tokens_are_refused() {
    let cpu = Cpu::new(1).unwrap();
    let model =
        Model::load(Checkpoint::open(&golden("llama")).unwrap(), &cpu, &mut |_| {}).unwrap();
    let mut session = bevel_model::Session::new(&model, &cpu, 32, KvType::F32).unwrap();
    let error = session.feed(&[1, 80]).unwrap_err().to_string();
    assert!(error.contains("token 80") && error.contains("80 tokens"), "{error}");
    assert!(session.tokens().is_empty());
    assert!(session.feed(&[1, 79]).is_ok());
}

/// Gemma stores its norms minus one, and bf16; a GGUF file holds the whole factor in f32.
#[test]
fn gemma_norms_are_whole_and_f32() {
    let checkpoint = Checkpoint::open(&golden("gemma2")).unwrap();
    assert_eq!(checkpoint.entry("blk.0.attn_norm.weight").unwrap().dtype, DType::F32);
    let norm = checkpoint.read_f32("blk.0.attn_norm.weight").unwrap();
    let mean = norm.iter().sum::<f32>() / norm.len() as f32;
    assert!((0.8..1.2).contains(&mean), "{mean}");
}
