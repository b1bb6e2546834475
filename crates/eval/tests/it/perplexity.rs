use bevel_eval::{Error, Perplexity, PerplexityConfig, Text, Windows};
use bevel_kernels::{Cpu, KvType};
use bevel_model::{Model, Session};

use crate::{PROSE, tiny_austen};

/// −ln p of each of `tokens[scored]`, the sequence run from its start for every token anew.
fn naive(model: &Model, cpu: &Cpu, tokens: &[u32], scored: std::ops::Range<usize>) -> Vec<f64> {
    scored
        .map(|t| {
            let mut session = Session::new(model, cpu, tokens.len(), KvType::F32).unwrap();
            let logits = session.feed(&tokens[..t]).unwrap();
            let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            sum.ln() - f64::from(logits[tokens[t] as usize])
        })
        .collect()
}

fn measure(windows: Windows, context: usize, text: &Text) -> Result<Perplexity, Error> {
    let (model, _, cpu) = tiny_austen();
    PerplexityConfig { context, windows, kv_type: KvType::F32 }.run(&model, &cpu, text, &mut |_| ())
}

fn text(tokens: usize) -> Text {
    let (_, tokenizer, _) = tiny_austen();
    let mut text = Text::encode(&tokenizer, &PROSE[..tokens * 8]).unwrap();
    assert!(text.tokens.len() >= tokens);
    text.truncate(tokens);
    text
}

#[track_caller]
fn check(found: &Perplexity, nats: &[f64]) {
    let mean = nats.iter().sum::<f64>() / nats.len() as f64;
    let variance = nats.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (nats.len() - 1) as f64;
    let error = (variance / nats.len() as f64).sqrt();
    assert_eq!(found.scored_tokens, nats.len() as u64);
    assert!((found.nats_per_token - mean).abs() < 1e-4, "{} {mean}", found.nats_per_token);
    assert!((found.standard_error - error).abs() < 1e-4, "{} {error}", found.standard_error);
    assert!((found.perplexity / mean.exp() - 1.0).abs() < 1e-4);
    let [low, high] = found.confidence_95;
    assert!((high / low - (2.0 * 1.96 * error).exp()).abs() < 1e-3);
}

#[test]
fn half_windows_as_llama_cpp_scores_them() {
    let (model, _, cpu) = tiny_austen();
    let text = text(70);
    let found = measure(Windows::HalfWindow, 32, &text).unwrap();
    // Two whole windows of 32 fit into 70 tokens; tokens 17 to 31 of each are scored.
    let mut nats = naive(&model, &cpu, &text.tokens[..32], 17..32);
    nats.extend(naive(&model, &cpu, &text.tokens[32..64], 17..32));
    check(&found, &nats);
    assert_eq!((found.windows, found.tokens), (2, 64));
    let bytes: u32 = [17..32, 49..64].into_iter().flat_map(|r| &text.byte_lens[r]).sum();
    assert_eq!(found.scored_bytes, u64::from(bytes));
    let bits = nats.iter().sum::<f64>() / 2f64.ln() / f64::from(bytes);
    assert!((found.bits_per_byte.unwrap() - bits).abs() < 1e-4);
}

#[test]
fn windows_begin_with_the_token_that_begins_a_text() {
    let (model, _, cpu) = tiny_austen();
    let text = Text { bos: Some(0), ..text(32) };
    let found = measure(Windows::HalfWindow, 32, &text).unwrap();
    let mut window = text.tokens.clone();
    window[0] = 0;
    check(&found, &naive(&model, &cpu, &window, 17..32));
}

#[test]
fn overlapping_windows_score_each_token_once() {
    let (model, _, cpu) = tiny_austen();
    let text = text(45);
    let found = measure(Windows::Strided(12), 32, &text).unwrap();
    let mut nats = naive(&model, &cpu, &text.tokens[..32], 1..32);
    nats.extend(naive(&model, &cpu, &text.tokens[12..44], 20..32));
    nats.extend(naive(&model, &cpu, &text.tokens[24..45], 20..21));
    check(&found, &nats);
}

#[test]
fn long_windows_are_run_in_pieces() {
    // 700 tokens do not go through the model at once, yet the figure is that of one sequence.
    let (model, _, cpu) = tiny_austen();
    let text = text(700);
    let found = measure(Windows::HalfWindow, 700, &text).unwrap();
    let mut session = Session::new(&model, &cpu, 700, KvType::F32).unwrap();
    let mut nats = Vec::new();
    for t in 0..699 {
        let logits = session.step(&text.tokens[t..=t], &[0]).unwrap();
        if t >= 350 {
            nats.push(bevel_eval::nats(logits, text.tokens[t + 1]));
        }
    }
    check(&found, &nats);
}

#[test]
fn bytes_add_up_to_the_text() {
    let (_, tokenizer, _) = tiny_austen();
    let prose = "“Œuvre” — 42 naïve cafés,\n\n\tand 日本.";
    let text = Text::encode(&tokenizer, prose).unwrap();
    assert_eq!(text.byte_lens.iter().sum::<u32>() as usize, prose.len());
}

#[test]
fn texts_and_windows_that_do_not_fit() {
    let short = text(20);
    let error = |windows, context| measure(windows, context, &short).unwrap_err();
    assert!(matches!(
        error(Windows::HalfWindow, 32),
        Error::TextTooShort { tokens: 20, context: 32 }
    ));
    assert!(matches!(error(Windows::Strided(0), 8), Error::Windows(_)));
    assert!(matches!(error(Windows::Strided(9), 8), Error::Windows(_)));
    assert!(matches!(error(Windows::HalfWindow, 3), Error::Windows(_)));
}

#[test]
fn progress_ends_at_its_total() {
    let (model, _, cpu) = tiny_austen();
    let config =
        PerplexityConfig { context: 16, windows: Windows::HalfWindow, kv_type: KvType::F16 };
    let mut seen = Vec::new();
    let result = config.run(&model, &cpu, &text(50), &mut |running| seen.push(running)).unwrap();
    assert_eq!(seen.iter().map(|r| r.done).collect::<Vec<_>>(), [16, 32, 48]);
    assert!(seen.iter().all(|r| r.total == 48));
    assert_eq!(seen[2].perplexity, Some(result.perplexity));
}
