use std::path::Path;
use std::sync::LazyLock;

use bevel_eval::{
    BaseLogits, Divergence, DivergenceConfig, Error, ModelDigest, PerplexityConfig, Quantiles,
    Text, Windows, check_vocabulary,
};
use bevel_kernels::{Cpu, KvType};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Model, Session};

use crate::{PROSE, changed, tiny_austen};

const CONTEXT: usize = 32;
const CONFIG: DivergenceConfig =
    DivergenceConfig { context: CONTEXT, kv_type: KvType::F32, base_kv_type: KvType::F32 };

/// The model with four bits less in every weight.
static COARSE: LazyLock<Model> = LazyLock::new(|| changed(|_, bits| bits & !0xf));
static BASE: LazyLock<(Model, Tokenizer, Cpu)> = LazyLock::new(tiny_austen);

fn text(windows: usize) -> Text {
    let mut text = Text::encode(&BASE.1, &PROSE[..windows * CONTEXT * 8]).unwrap();
    text.truncate(windows * CONTEXT + 5);
    text
}

fn compare(model: &Model, text: &Text) -> Divergence {
    CONFIG.compare(&BASE.0, model, &BASE.2, text, &mut |_| ()).unwrap()
}

/// Probabilities of the next token after each of the scored positions, in f64.
fn distributions(model: &Model, text: &Text) -> Vec<Vec<f64>> {
    let mut rows = Vec::new();
    for window in text.tokens.chunks_exact(CONTEXT) {
        let mut session = Session::new(model, &BASE.2, CONTEXT, KvType::F32).unwrap();
        for (t, token) in window[..CONTEXT - 1].iter().enumerate() {
            let logits = session.step(std::slice::from_ref(token), &[0]).unwrap();
            if t >= CONTEXT / 2 {
                let highest = logits.iter().copied().fold(f32::MIN, f32::max);
                let exps: Vec<f64> = logits.iter().map(|l| f64::from(l - highest).exp()).collect();
                let sum: f64 = exps.iter().sum();
                rows.push(exps.iter().map(|e| e / sum).collect());
            }
        }
    }
    rows
}

/// The tokens that these predict.
fn next(text: &Text) -> Vec<usize> {
    let windows = text.tokens.chunks_exact(CONTEXT);
    windows.flat_map(|w| w[CONTEXT / 2 + 1..].iter().map(|&t| t as usize)).collect()
}

/// Mean and standard error as llama.cpp computes them, from sums and sums of squares.
fn mean(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (mut n, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for value in values {
        n += 1.0;
        sum += value;
        squares += value * value;
    }
    let mean = sum / n;
    (mean, ((squares / n - mean * mean) / (n - 1.0)).max(0.0).sqrt())
}

fn top(row: &[f64]) -> usize {
    (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best }).unwrap()
}

#[test]
fn statistics_are_those_of_llama_cpp() {
    let text = text(8);
    let found = compare(&COARSE, &text);
    let (base, model) = (distributions(&BASE.0, &text), distributions(&COARSE, &text));
    let next = next(&text);
    let rows = || base.iter().zip(&model).zip(&next);
    let n = next.len() as f64;
    assert_eq!(found.perplexity.scored_tokens, next.len() as u64);

    #[track_caller]
    fn check(found: impl Into<f64>, expected: f64, within: f64) {
        let found = found.into();
        assert!((found - expected).abs() <= within, "{found}, expected {expected}");
    }
    let kls: Vec<f64> =
        rows().map(|((p, q), _)| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum()).collect();
    let (kl, kl_error) = mean(kls.iter().copied());
    // The change is one worth measuring.
    assert!((1e-3..0.5).contains(&kl), "{kl}");
    check(found.kl.value, kl, 1e-5);
    check(found.kl.error, kl_error, 1e-5);

    let (ours, error) = mean(rows().map(|((_, q), &t)| -q[t].ln()));
    let (theirs, base_error) = mean(rows().map(|((p, _), &t)| -p[t].ln()));
    let products = rows().map(|((p, q), &t)| q[t].ln() * p[t].ln()).sum::<f64>() / n;
    let covariance = (products - ours * theirs) / (n - 1.0);
    check(found.perplexity.nats_per_token, ours, 1e-5);
    check(found.base_perplexity.value.ln(), theirs, 1e-5);
    check(found.base_perplexity.error, theirs.exp() * base_error, 1e-3);
    check(found.ln_ratio.value, ours - theirs, 1e-5);
    let ratio_error = (error.powi(2) + base_error.powi(2) - 2.0 * covariance).sqrt();
    check(found.ln_ratio.error, ratio_error, 1e-5);
    check(found.ratio.value, (ours - theirs).exp(), 1e-5);
    check(found.ratio.error, (ours - theirs).exp() * ratio_error, 1e-5);
    let (ppl, base_ppl) = (ours.exp(), theirs.exp());
    check(found.difference.value, ppl - base_ppl, 1e-3);
    let variance =
        (ppl * error).powi(2) + (base_ppl * base_error).powi(2) - 2.0 * ppl * base_ppl * covariance;
    check(found.difference.error, variance.sqrt(), 1e-2);
    check(found.correlation.unwrap(), covariance / (error * base_error), 1e-5);

    let same = rows().filter(|((p, q), _)| top(p) == top(q)).count() as f64 / n;
    assert!(same < 1.0);
    check(found.same_top.value, same, 1e-12);
    check(found.same_top.error, (same * (1.0 - same) / (n - 1.0)).sqrt(), 1e-12);

    let changes: Vec<f64> = rows().map(|((p, q), &t)| q[t] - p[t]).collect();
    let (delta, delta_error) = mean(changes.iter().copied());
    let (square, square_error) = mean(changes.iter().map(|d| d * d));
    check(found.delta_p.value, delta, 1e-6);
    check(found.delta_p.error, delta_error, 1e-6);
    check(found.delta_p_rms.value, square.sqrt(), 1e-6);
    check(found.delta_p_rms.error, 0.5 / square.sqrt() * square_error, 1e-6);

    let sorted = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values
    };
    let (kls, changes) = (sorted(&kls), sorted(&changes));
    check(found.kl_quantiles.max, kls[kls.len() - 1], 1e-5);
    check(found.kl_quantiles.median, (kls[kls.len() / 2] + kls[kls.len() / 2 - 1]) / 2.0, 1e-5);
    // 0.9 · 119 = 107.1
    check(found.kl_quantiles.q90, kls[107] + 0.1 * (kls[108] - kls[107]), 1e-5);
    check(found.delta_p_quantiles.min, changes[0], 1e-6);
    check(found.delta_p_quantiles.q25, changes[29] + 0.75 * (changes[30] - changes[29]), 1e-6);
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let found = compare(&BASE.0, &text(2));
    assert_eq!((found.kl.value, found.kl.error, found.kl_quantiles.max), (0.0, 0.0, 0.0));
    assert_eq!((found.same_top.value, found.delta_p_rms.value), (1.0, 0.0));
    assert_eq!((found.ln_ratio.value, found.ln_ratio.error), (0.0, 0.0));
    assert!((found.correlation.unwrap() - 1.0).abs() < 1e-12);
}

#[test]
fn perplexities_are_those_of_each_alone() {
    let text = Text { bos: Some(0), ..text(3) };
    let alone = |model: &Model| {
        PerplexityConfig { context: CONTEXT, windows: Windows::HalfWindow, kv_type: KvType::F32 }
            .run(model, &BASE.2, &text, &mut |_| ())
            .unwrap()
    };
    let mut last = None;
    let found = CONFIG
        .compare(&BASE.0, &COARSE, &BASE.2, &text, &mut |running| last = Some(running))
        .unwrap();
    let (base, model) = (alone(&BASE.0), alone(&COARSE));
    assert!((found.base_perplexity.value / base.perplexity - 1.0).abs() < 1e-6);
    assert!((found.perplexity.perplexity / model.perplexity - 1.0).abs() < 1e-6);
    assert_eq!(found.perplexity.bits_per_byte.is_some(), model.bits_per_byte.is_some());
    assert_eq!(found.perplexity.scored_bytes, model.scored_bytes);
    let last = last.unwrap();
    assert_eq!((last.done, last.total), (96, 96));
    assert_eq!(last.kl, Some(found.kl.value));
}

#[test]
fn threads_change_nothing() {
    let text = text(2);
    let json = |threads| {
        let cpu = Cpu::new(threads).unwrap();
        let mut found = CONFIG.compare(&BASE.0, &COARSE, &cpu, &text, &mut |_| ()).unwrap();
        (found.perplexity.seconds, found.perplexity.tokens_per_second) = (0.0, 0.0);
        serde_json::to_string(&found).unwrap()
    };
    assert_eq!(json(1), json(3));
}

fn record(path: &Path, text: &Text) {
    CONFIG.record(&BASE.0, &BASE.2, text, path, &mut |_| ()).unwrap();
}

#[track_caller]
fn with_file(path: &Path, model: &Model, text: &Text) -> Result<Divergence, Error> {
    CONFIG.compare_with_file(&BaseLogits::open(path)?, model, &BASE.2, text, &mut |_| ())
}

#[test]
fn a_file_stands_for_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.logits");
    let text = text(8);
    record(&path, &text);
    assert!(BaseLogits::is_one(&path));
    let (exact, found) = (compare(&COARSE, &text), with_file(&path, &COARSE, &text).unwrap());
    let close = |a: f64, b: f64, within: f64| assert!((a - b).abs() <= within, "{a} {b}");
    close(found.kl.value, exact.kl.value, 1e-6);
    close(found.kl_quantiles.max, exact.kl_quantiles.max, 1e-4);
    close(found.kl_quantiles.median, exact.kl_quantiles.median, 1e-5);
    // What the base thought of the text is in the file as it was.
    close(found.base_perplexity.value, exact.base_perplexity.value, 1e-9);
    close(found.delta_p_rms.value, exact.delta_p_rms.value, 1e-9);
    assert_eq!(found.same_top, exact.same_top);
    let itself = with_file(&path, &BASE.0, &text).unwrap();
    assert!(itself.kl.value < 1e-6 && itself.kl_quantiles.min >= 0.0, "{:?}", itself.kl);

    // A part of the text is measured against a part of the file.
    let mut part = text.clone();
    part.truncate(3 * CONTEXT + 1);
    close(
        with_file(&path, &COARSE, &part).unwrap().kl.value,
        compare(&COARSE, &part).kl.value,
        1e-6,
    );

    let file = BaseLogits::open(&path).unwrap();
    assert_eq!((file.vocabulary(), file.context()), (4096, CONTEXT));
    file.check_model(&ModelDigest::of(BASE.0.checkpoint(), &BASE.2).unwrap()).unwrap();
    let other = changed(|i, bits| if i == 1_000_000 { bits ^ 1 } else { bits });
    let error = file.check_model(&ModelDigest::of(other.checkpoint(), &BASE.2).unwrap());
    assert!(error.unwrap_err().to_string().contains("another model"));
}

#[test]
fn files_that_do_not_belong_to_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.logits");
    let good = text(2);
    record(&path, &good);
    let refused = |config: DivergenceConfig, text: &Text, part: &str| {
        let file = BaseLogits::open(&path).unwrap();
        let error =
            config.compare_with_file(&file, &COARSE, &BASE.2, text, &mut |_| ()).unwrap_err();
        let shown = error.to_string();
        assert!(matches!(error, Error::BaseLogits { .. }), "{shown}");
        assert!(shown.contains("base.logits") && shown.contains(part), "no `{part}` in: {shown}");
    };
    refused(DivergenceConfig { context: 16, ..CONFIG }, &good, "--ctx 32");
    refused(DivergenceConfig { base_kv_type: KvType::F16, ..CONFIG }, &good, "keys and values");
    refused(CONFIG, &Text { bos: Some(0), ..good.clone() }, "begins a text");
    refused(CONFIG, &text(3), "--tokens 64");
    let mut other = good.clone();
    other.tokens[40] ^= 1;
    refused(CONFIG, &other, "token 40");
}

#[test]
fn damaged_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.logits");
    let text = text(2);
    record(&path, &text);
    let good = std::fs::read(&path).unwrap();
    let check = |bytes: &[u8], part: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = with_file(&path, &COARSE, &text).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("base.logits"), "no `{part}` in: {error}");
    };
    for len in [0, 7, 8, 30, 63, 64, 300, good.len() - 1] {
        check(&good[..len], if len < 64 { "ends within its header" } else { "truncated" });
    }
    check(&[&good[..], &[0]].concat(), "truncated or damaged");
    // One flipped bit anywhere: the magic, the version, the vocabulary, the model, a token, its sum, the
    // surprise of a row, a code, the sum of the last row.
    let header = 64 + 4 * 2 * CONTEXT + 8;
    for (at, part) in [
        (3, "no file of logits"),
        (8, "version"),
        (12, "damaged"),
        (24, "header is damaged"),
        (40, "header is damaged"),
        (100, "header is damaged"),
        (header - 1, "header is damaged"),
        (header, "row 0 is damaged"),
        (header + 20_000, "row 2 is damaged"),
        (good.len() - 1, "row 29 is damaged"),
    ] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        check(&bytes, part);
    }
    // Numbers that would ask for more memory than there is.
    let mut bytes = good.clone();
    bytes[16..24].fill(0xff);
    check(&bytes, "truncated or damaged");
    assert!(!BaseLogits::is_one(dir.path()));
    assert!(!BaseLogits::is_one(&dir.path().join("missing")));
}

/// A file as `llama-perplexity --kl-divergence-base` writes it.
fn llama_file(model: &Model, text: &Text, vocab: u32) -> Vec<u8> {
    let windows = text.tokens.len() / CONTEXT;
    let mut bytes = b"_logits_".to_vec();
    for number in [CONTEXT as u32, vocab, windows as u32] {
        bytes.extend(number.to_le_bytes());
    }
    text.tokens[..windows * CONTEXT].iter().for_each(|t| bytes.extend(t.to_le_bytes()));
    for row in distributions(model, text) {
        let logs: Vec<f32> = row.iter().map(|p| p.ln() as f32).collect();
        let highest = logs.iter().copied().fold(f32::MIN, f32::max);
        let lowest = logs.iter().copied().fold(f32::MAX, f32::min).max(highest - 16.0);
        let scale = (highest - lowest) / 65535.0;
        bytes.extend(scale.to_le_bytes());
        bytes.extend(lowest.to_le_bytes());
        let code = |&log: &f32| ((log - lowest).max(0.0) / scale).round() as u16;
        logs.iter().for_each(|log| bytes.extend(code(log).to_le_bytes()));
    }
    bytes
}

#[test]
fn files_of_llama_cpp() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.kld");
    let text = text(4);
    let good = llama_file(&BASE.0, &text, 4096);
    std::fs::write(&path, &good).unwrap();
    assert!(BaseLogits::is_one(&path));
    let found = with_file(&path, &COARSE, &text).unwrap();
    let exact = compare(&COARSE, &text);
    // What lies 16 nats below the likeliest is missing from the sum.
    assert!((found.kl.value - exact.kl.value).abs() < 3e-4, "{:?} {:?}", found.kl, exact.kl);
    assert!((found.base_perplexity.value / exact.base_perplexity.value - 1.0).abs() < 1e-4);
    assert_eq!(found.same_top, exact.same_top);

    let (base, model) = (distributions(&BASE.0, &text), distributions(&COARSE, &text));
    let kl = base.iter().zip(&model).map(|(p, q)| {
        let pairs = p.iter().zip(q).filter(|(p, _)| p.ln() > -16.0);
        pairs.map(|(p, q)| p * (p / q).ln()).sum::<f64>()
    });
    let (kl, _) = mean(kl);
    assert!((found.kl.value - kl).abs() < 1e-5, "{} {kl}", found.kl.value);

    let file = BaseLogits::open(&path).unwrap();
    let digest = ModelDigest::of(BASE.0.checkpoint(), &BASE.2).unwrap();
    assert!(file.check_model(&digest).unwrap_err().to_string().contains("llama.cpp"));
    let refused = |bytes: &[u8], part: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = with_file(&path, &COARSE, &text).unwrap_err().to_string();
        assert!(error.contains(part), "no `{part}` in: {error}");
    };
    refused(&good[..good.len() - 2], "truncated");
    let mut bytes = good.clone();
    let first_row = 20 + 4 * 4 * CONTEXT;
    bytes[first_row..first_row + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    refused(&bytes, "row 0 is damaged");
    // An odd vocabulary has a code of padding; 4095 and 4096 tokens take the same room.
    refused(&llama_file(&BASE.0, &text, 4095), "4095 logits, but the model's have 4096");
}

#[test]
fn a_run_that_fails_leaves_no_file() {
    // The greatest number there is in every weight of the last norm, which ends the file.
    let broken = changed(|i, bits| if i >= 4_196_608 - 256 { 0x7f7f } else { bits });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.logits");
    let error = CONFIG.record(&broken, &BASE.2, &text(1), &path, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("is not a number"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn texts_that_do_not_fill_a_window() {
    let short = Text { tokens: vec![5; 20], byte_lens: vec![1; 20], bos: None };
    let error = CONFIG.compare(&BASE.0, &COARSE, &BASE.2, &short, &mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::TextTooShort { tokens: 20, context: 32 }));
}

#[test]
fn vocabularies_are_compared() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let json = std::fs::read_to_string(dir.join("tokenizer.json")).unwrap();
    let swapped = json
        .replace("\"Ġobtained\": 4094", "\"Ġobtained\": 4095")
        .replace("\"Ġrare\": 4095", "\"Ġrare\": 4094");
    let other = Tokenizer::from_json_bytes(swapped.as_bytes(), None).unwrap();
    check_vocabulary(&BASE.1, &BASE.1).unwrap();
    let error = check_vocabulary(&BASE.1, &other).unwrap_err().to_string();
    assert!(error.contains("token 4094 is `Ġobtained` in the base and `Ġrare`"), "{error}");
}

#[test]
fn quantiles_of_known_numbers() {
    let q = Quantiles::of((0..=1000).rev().map(f64::from));
    assert_eq!((q.min, q.q001, q.q01, q.q05, q.q10), (0.0, 1.0, 10.0, 50.0, 100.0));
    assert_eq!((q.q25, q.median, q.q75, q.q90), (250.0, 500.0, 750.0, 900.0));
    assert_eq!((q.q95, q.q99, q.q999, q.max), (950.0, 990.0, 999.0, 1000.0));
    assert_eq!(Quantiles::of([1.0, 2.0]).median, 1.5);
    assert_eq!(Quantiles::of([1.0, f64::INFINITY]).max, f64::INFINITY);
    assert!(Quantiles::of([]).median.is_nan());
}

/// A model against itself, with keys and values in fewer bits: the coarser they are, the further its
/// predictions move.
#[test]
fn storage_of_keys_and_values_tells() {
    let text = text(3);
    let kl = |kv_type| {
        let config = DivergenceConfig { kv_type, ..CONFIG };
        config.compare(&BASE.0, &BASE.0, &BASE.2, &text, &mut |_| ()).unwrap().kl.value
    };
    let [exact, half, eight, four] =
        [KvType::F32, KvType::F16, KvType::Q8_0 { rotated: false }, KvType::Q4_0 { rotated: true }]
            .map(kl);
    assert!(exact < 1e-9, "{exact}");
    assert!(half < eight && eight < four, "{half} {eight} {four}");
    assert!(four < 0.05, "{four}");
}
