use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use bevel_base::DType;
use bevel_engine::{
    End, EndReason, Engine, EngineConfig, Grammar, Grammars, Output, OutputToken, Pooling, Refused,
    Request, RequestId, Swap,
};
use bevel_kernels::{Cpu, KvType};
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{
    Adapter, AdapterFile, Batch, Checkpoint, FinishReason, GenerateOptions, KvCache, LowRank,
    Model, SamplerConfig, ScaledAdapter, Sequence, Session, State, TokenLogprobs, generate,
};

/// The model that comes with the project.
pub(crate) struct TinyAusten {
    pub(crate) cpu: Cpu,
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
}

pub(crate) static TINY: LazyLock<TinyAusten> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-austen");
    let cpu = Cpu::new(2).unwrap();
    let model = Model::load(Checkpoint::open(&dir).unwrap(), &cpu, &mut |_| {}).unwrap();
    TinyAusten { cpu, model, tokenizer: Tokenizer::from_hf(&dir).unwrap() }
});

/// Two adapters of it.
static ADAPTERS: LazyLock<[Arc<Adapter>; 2]> = LazyLock::new(|| {
    [1, 2].map(|seed| {
        let config = TINY.model.config();
        let mut file = AdapterFile::new("test");
        for weight in ["blk.0.attn_v.weight", "blk.1.attn_q.weight", "blk.2.ffn_down.weight"] {
            let Some(&[rows, cols]) = config.tensor_shape(weight).as_deref() else { continue };
            let value = |i: usize| ((i * 7919 + seed * 31) % 101) as f32 / 500.0 - 0.1;
            let (a, b) = ((0..4 * cols).map(value).collect(), (0..rows * 4).map(value).collect());
            let dtype = DType::F32;
            let matrix = LowRank {
                rank: 4,
                alpha: 8.0,
                rank_stabilized: false,
                dtype,
                a,
                b,
                magnitude: None,
            };
            file.insert(config, weight, matrix).unwrap();
        }
        Arc::new(Adapter::new(&file, TINY.model.checkpoint(), &TINY.cpu).unwrap())
    })
});

/// None of them, one or both.
fn adapters(i: usize) -> Vec<ScaledAdapter> {
    let both = ADAPTERS.iter().zip([1.0, -0.5]);
    let chosen = both.enumerate().filter(|(bit, _)| i >> bit & 1 == 1);
    chosen.map(|(_, (adapter, scale))| ScaledAdapter { adapter: adapter.clone(), scale }).collect()
}

pub(crate) fn engine(config: EngineConfig) -> Engine<'static> {
    Engine::new(&TINY.model, &TINY.tokenizer, &TINY.cpu, config).unwrap()
}

pub(crate) fn tokens(text: &str) -> Vec<u32> {
    TINY.tokenizer.encode(text, true, false).unwrap()
}

/// An answer, put together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<OutputToken>,
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    pub(crate) end: Option<End>,
}

impl Answer {
    pub(crate) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    pub(crate) fn reason(&self) -> &EndReason {
        &self.end.as_ref().expect("it has ended").reason
    }
}

pub(crate) type Answers = BTreeMap<(RequestId, u32), Answer>;

pub(crate) fn collect(answers: &mut Answers, outputs: Vec<Output>) {
    for Output { request, index, text, token, prompt_logprobs, end, .. } in outputs {
        let answer = answers.entry((request, index)).or_default();
        assert!(answer.end.is_none(), "news of an answer that has ended");
        answer.text.push_str(&text);
        answer.tokens.extend(token);
        answer.prompt_logprobs.extend(prompt_logprobs);
        answer.end = end;
    }
}

/// Runs all there is.
pub(crate) fn run(engine: &mut Engine<'_>) -> Answers {
    let mut answers = Answers::new();
    while !engine.is_idle() {
        collect(&mut answers, engine.step().unwrap());
    }
    let metrics = engine.metrics();
    assert_eq!((metrics.blocks_used, metrics.blocks_swapped), (0, 0), "everything came back");
    answers
}

/// What a session says to the same.
fn alone(request: &Request, index: u32, config: &EngineConfig) -> (String, Vec<u32>, FinishReason) {
    let session = Session::new(&TINY.model, &TINY.cpu, config.context, config.kv_type).unwrap();
    let mut session = session.with_adapters(request.adapters.clone());
    let seed = request.sampler.seed + u64::from(index);
    let options = GenerateOptions {
        max_tokens: request.max_tokens,
        stop: request.stop.clone(),
        ignore_eos: request.ignore_eos,
        sampler: SamplerConfig { seed, ..request.sampler.clone() },
    };
    let go_on = &mut |_: &str| ControlFlow::Continue(());
    let answer = generate(&mut session, &TINY.tokenizer, &request.prompt, &options, go_on).unwrap();
    (answer.text, answer.tokens, answer.finish)
}

pub(crate) const TEXT: &str = "It is a truth universally acknowledged, that a single man in possession of a good \
    fortune, must be in want of a wife. However little known the feelings or views of such a man may be on \
    his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, \
    that he is considered the rightful property of some one or other of their daughters.";

/// Requests of many kinds.
fn requests(count: usize) -> Vec<Request> {
    let all = tokens(TEXT);
    (0..count)
        .map(|i| {
            // Some begin alike.
            let start = if i % 3 == 0 { 0 } else { i };
            let sampler = match i % 4 {
                0 | 1 => SamplerConfig::default(),
                2 => SamplerConfig { temperature: 1.0, seed: 40 + i as u64, ..Default::default() },
                _ => SamplerConfig {
                    temperature: 0.9,
                    top_k: 40,
                    top_p: 0.9,
                    min_p: 0.02,
                    repetition_penalty: 1.1,
                    frequency_penalty: 0.2,
                    seed: i as u64,
                    ..Default::default()
                },
            };
            Request {
                answers: if i % 5 == 4 { 3 } else { 1 },
                sampler,
                adapters: adapters(i / 3),
                max_tokens: (i % 7 != 6).then_some(5 + 9 * i % 60),
                stop: if i % 6 == 5 { vec!["the".to_owned(), ".".to_owned()] } else { vec![] },
                ignore_eos: i % 2 == 0,
                ..Request::new(all[start..(start + 2 + 13 * i % 70).min(all.len())].to_vec())
            }
        })
        .collect()
}

#[track_caller]
fn check_against_alone(config: EngineConfig) -> bevel_engine::Metrics {
    let mut engine = engine(config.clone());
    let requests = requests(24);
    let (mut answers, mut submitted) = (Answers::new(), Vec::new());
    // They come while others run.
    for request in &requests {
        submitted.push(engine.submit(request.clone()).unwrap());
        for _ in 0..2 {
            collect(&mut answers, engine.step().unwrap());
        }
    }
    let metrics = loop {
        if engine.is_idle() {
            break engine.metrics();
        }
        collect(&mut answers, engine.step().unwrap());
    };
    for (id, request) in submitted.into_iter().zip(&requests) {
        for index in 0..request.answers {
            let answer = &answers[&(id, index)];
            let (text, tokens, finish) = alone(request, index, &config);
            assert_eq!((&answer.text, answer.ids()), (&text, tokens), "{id:?} {index}");
            let same = match answer.reason() {
                EndReason::EndOfText(_) => FinishReason::EndOfText,
                EndReason::StopString(_) => FinishReason::StopString,
                EndReason::MaxTokens => FinishReason::MaxTokens,
                EndReason::ContextFull => FinishReason::ContextFull,
                other => panic!("{other:?}"),
            };
            assert_eq!(same, finish);
        }
    }
    metrics
}

/// What an adapter adds is in keys and values too: a prompt read with one is not the same prompt without.
#[test]
fn prompts_are_shared_by_those_with_the_same_adapters_alone() {
    let prompt = tokens(TEXT);
    let mut engine = engine(EngineConfig::new(160, 8));
    for (which, is_cached) in [(0, false), (1, false), (1, true), (2, false), (3, false), (0, true)]
    {
        let request = Request {
            adapters: adapters(which),
            max_tokens: Some(8),
            ignore_eos: true,
            ..Request::new(prompt.clone())
        };
        let id = engine.submit(request.clone()).unwrap();
        let answer = run(&mut engine).remove(&(id, 0)).unwrap();
        assert_eq!(answer.end.as_ref().unwrap().cached_tokens > 0, is_cached, "{which}");
        let (_, tokens, _) = alone(&request, 0, &EngineConfig::new(160, 8));
        assert_eq!(answer.ids(), tokens, "{which}");
    }
}

#[test]
fn together_they_say_what_each_says_alone() {
    for kv_type in [KvType::F16, KvType::Q8_0 { rotated: false }, KvType::Q4_0 { rotated: true }] {
        let config = EngineConfig { kv_type, step_tokens: 64, ..EngineConfig::new(160, 8) };
        let metrics = check_against_alone(config);
        assert_eq!(metrics.preemptions, 0);
        assert!(metrics.block_stats.found > 0, "some begin alike");
        assert!(metrics.block_stats.copied > 0, "some have several answers");
    }
}

#[test]
fn so_they_do_where_memory_is_short() {
    let swap = Swap { directory: std::env::temp_dir(), bytes: 1 << 24 };
    for swap in [None, Some(swap)] {
        let config = EngineConfig {
            memory_tokens: 304,
            step_tokens: 64,
            swap: swap.clone(),
            ..EngineConfig::new(160, 8)
        };
        let metrics = check_against_alone(config);
        assert!(metrics.preemptions > 3, "{metrics:?}");
        assert_eq!(metrics.swap_failures, 0);
    }
}

#[test]
fn a_prompt_is_not_read_twice() {
    let mut engine = engine(EngineConfig::new(256, 4));
    let prompt = tokens(TEXT);
    let request = Request { max_tokens: Some(4), ..Request::new(prompt.clone()) };
    let mut cached = Vec::new();
    let mut texts = Vec::new();
    for _ in 0..2 {
        engine.submit(request.clone()).unwrap();
        let answers = run(&mut engine);
        let answer = answers.values().next().unwrap();
        cached.push(answer.end.as_ref().unwrap().cached_tokens);
        texts.push(answer.text.clone());
    }
    assert_eq!(cached, [0, (prompt.len() - 1) / 16 * 16]);
    assert_eq!(texts[0], texts[1]);
    let metrics = engine.metrics();
    assert_eq!(metrics.prompt_tokens as usize, 2 * prompt.len() - cached[1]);
    assert_eq!(metrics.generated_tokens, 8);
}

#[test]
fn what_cannot_be_served_is_refused() {
    let mut engine = engine(EngineConfig { queue: 2, ..EngineConfig::new(64, 4) });
    let mut check = |request: Request, expected: Refused| {
        assert_eq!(engine.submit(request), Err(expected));
    };
    check(Request::new(vec![]), Refused::EmptyPrompt);
    check(Request::new(vec![5; 65]), Refused::PromptTooLong { tokens: 65, context: 64 });
    check(Request::new(vec![1, 4096]), Refused::Token { token: 4096, vocabulary: 4096 });
    for asked in [0, 5] {
        let request = Request { answers: asked, ..Request::new(vec![1]) };
        check(request, Refused::Answers { asked, most: 4 });
    }
    for _ in 0..4 + 2 {
        engine.submit(Request::new(vec![1])).unwrap();
    }
    assert_eq!(engine.submit(Request::new(vec![1])), Err(Refused::QueueFull(6)));
    let config = EngineConfig { memory_tokens: 32, ..EngineConfig::new(64, 4) };
    let error = Engine::new(&TINY.model, &TINY.tokenizer, &TINY.cpu, config).unwrap_err();
    assert!(error.to_string().contains("does not hold one context of 64"), "{error}");
}

#[test]
fn a_cancelled_request_gives_everything_back() {
    let mut engine = engine(EngineConfig::new(256, 4));
    let endless = |answers| Request {
        answers,
        ignore_eos: true,
        ..Request::new(tokens("Mr. Darcy had never been so"))
    };
    let cancelled = engine.submit(endless(3)).unwrap();
    let kept = engine.submit(endless(1)).unwrap();
    let mut answers = Answers::new();
    for _ in 0..5 {
        collect(&mut answers, engine.step().unwrap());
    }
    assert_eq!(engine.metrics().running, 4);
    engine.cancel(cancelled);
    engine.cancel(cancelled);
    assert_eq!(engine.metrics().running, 1);
    let before = answers.clone();
    for _ in 0..5 {
        collect(&mut answers, engine.step().unwrap());
    }
    for index in 0..3 {
        assert_eq!(answers[&(cancelled, index)], before[&(cancelled, index)], "no more news");
    }
    engine.cancel(kept);
    assert!(engine.is_idle());
    assert!(engine.step().unwrap().is_empty());
    assert_eq!(engine.metrics().blocks_used, 0);
}

#[test]
fn time_is_up_before_and_during_an_answer() {
    let mut engine = engine(EngineConfig::new(512, 4));
    let prompt = tokens("Elizabeth");
    let overdue =
        Request { answers: 2, deadline: Some(Instant::now()), ..Request::new(prompt.clone()) };
    let overdue = engine.submit(overdue).unwrap();
    let slow = Request {
        deadline: Some(Instant::now() + Duration::from_millis(20)),
        ignore_eos: true,
        ..Request::new(prompt)
    };
    let slow = engine.submit(slow).unwrap();
    let mut answers = Answers::new();
    while !engine.is_idle() {
        collect(&mut answers, engine.step().unwrap());
        std::thread::sleep(Duration::from_millis(1));
    }
    for index in 0..2 {
        let answer = &answers[&(overdue, index)];
        assert_eq!((answer.reason(), answer.tokens.len()), (&EndReason::Deadline, 0));
    }
    let answer = &answers[&(slow, 0)];
    assert_eq!(answer.reason(), &EndReason::Deadline);
    let count = answer.end.as_ref().unwrap().answer_tokens;
    assert!((1..500).contains(&count) && count == answer.tokens.len(), "{count}");
}

#[test]
fn stop_strings_and_limits_end_answers() {
    let mut engine = engine(EngineConfig::new(128, 8));
    let request = |max_tokens, stop: &[&str]| Request {
        max_tokens,
        stop: stop.iter().map(|s| (*s).to_owned()).collect(),
        ignore_eos: true,
        ..Request::new(tokens("She was"))
    };
    let plain = engine.submit(request(Some(30), &[])).unwrap();
    let text = run(&mut engine)[&(plain, 0)].text.clone();
    // A stop string in the middle of a word of the answer, and another that comes later.
    let (first, later) = (&text[6..9], &text[12..16]);
    let stopped = engine.submit(request(Some(30), &[later, first])).unwrap();
    let nothing = engine.submit(request(Some(0), &[])).unwrap();
    let full = engine.submit(request(None, &[])).unwrap();
    let answers = run(&mut engine);
    let answer = &answers[&(stopped, 0)];
    let at = text.find(first).unwrap().min(text.find(later).unwrap());
    assert_eq!(answer.text, text[..at]);
    assert!(matches!(answer.reason(), EndReason::StopString(s) if s == first || s == later));
    assert_eq!((answers[&(nothing, 0)].tokens.len(), &answers[&(nothing, 0)].text[..]), (0, ""));
    assert_eq!(answers[&(nothing, 0)].reason(), &EndReason::MaxTokens);
    assert_eq!(answers[&(full, 0)].reason(), &EndReason::ContextFull);
    assert_eq!(answers[&(full, 0)].tokens.len(), 128 - tokens("She was").len() + 1);
}

#[test]
fn probabilities_come_with_tokens_where_asked() {
    let mut engine = engine(EngineConfig::new(128, 8));
    let request = Request {
        logprobs: Some(3),
        max_tokens: Some(8),
        ignore_eos: true,
        ..Request::new(tokens("Mr. Bennet was"))
    };
    engine.submit(request).unwrap();
    for answer in run(&mut engine).values() {
        assert_eq!(answer.tokens.len(), 8);
        for token in &answer.tokens {
            let logprobs = token.logprobs.as_ref().unwrap();
            assert_eq!(logprobs.top[0], (token.id, logprobs.logprob), "greedy");
            assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1) && logprobs.top.len() == 3);
            assert!(logprobs.logprob <= 0.0);
        }
    }
}

#[test]
fn embeddings_are_those_of_a_prompt_alone() {
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| tokens(TEXT)[..20 + 9 * i].to_vec()).collect();
    // The mean, or the last, of what the model makes of all tokens in one pass.
    let expected = |prompt: &[u32], pooling: Pooling| {
        let config = TINY.model.config();
        let mut cache = KvCache::new(config, KvType::F16, 128).unwrap();
        let (mut sequence, mut state) = (Sequence::new(), State::new(config, 128));
        cache.extend(&mut sequence, prompt.len()).unwrap();
        let parts = [sequence.part(prompt.len())];
        let batch = Batch { tokens: prompt, parts: &parts, outputs: &[] };
        TINY.model.forward(&TINY.cpu, &batch, cache.pool(), &mut state).unwrap();
        let rows: Vec<usize> = match pooling {
            Pooling::Mean => (0..prompt.len()).collect(),
            Pooling::Last => vec![prompt.len() - 1],
        };
        let hidden = TINY.model.hidden(&TINY.cpu, &rows, &mut state);
        let mut sum = vec![0.0f64; config.dim];
        for row in hidden.chunks_exact(config.dim) {
            sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        sum.iter().map(|x| (x / length) as f32).collect::<Vec<f32>>()
    };
    for pooling in [Pooling::Mean, Pooling::Last] {
        // Beside an answer, in small steps, and with little memory.
        let config =
            EngineConfig { step_tokens: 32, memory_tokens: 160, ..EngineConfig::new(128, 4) };
        let mut engine = engine(config);
        let answer =
            Request { ignore_eos: true, max_tokens: Some(60), ..Request::new(tokens("She")) };
        engine.submit(answer).unwrap();
        let ids: Vec<RequestId> = prompts
            .iter()
            .map(|prompt| {
                let request = Request { embed: Some(pooling), ..Request::new(prompt.clone()) };
                engine.submit(request).unwrap()
            })
            .collect();
        let mut found = BTreeMap::new();
        while !engine.is_idle() {
            for output in engine.step().unwrap() {
                if let Some(embedding) = output.embedding {
                    assert_eq!(output.end.unwrap().reason, EndReason::Complete);
                    found.insert(output.request, embedding);
                }
            }
        }
        for (id, prompt) in ids.iter().zip(&prompts) {
            let expected = expected(prompt, pooling);
            let difference = found[id].iter().zip(&expected).map(|(a, b)| (a - b).abs());
            assert!(difference.fold(0.0, f32::max) < 1e-6, "{pooling:?} {}", prompt.len());
        }
    }
}

/// A grammar that cannot be followed any further ends its own answer and moves nobody else's.
#[test]
fn a_grammar_that_fails_disturbs_nobody() {
    let grammars = Grammars::new(&TINY.tokenizer).unwrap();
    // After the first word there are more ways to go on than are followed.
    let ways: Vec<String> = (0..3000).map(|i| format!("\"a{i}\" \"b{i}\"")).collect();
    let lark = format!("start: \"go\" \" \" way\nway: {}", ways.join(" | "));
    let constraint = grammars.compile(&Grammar::Lark(lark)).unwrap();
    let config = EngineConfig::new(256, 8);
    let mut engine = engine(config.clone());
    let prompt = tokens("Mr. Bennet");
    let hard = Request {
        constraint: Some(constraint),
        max_tokens: Some(200),
        ..Request::new(prompt.clone())
    };
    let easy = Request {
        max_tokens: Some(60),
        ignore_eos: true,
        sampler: SamplerConfig { temperature: 1.0, seed: 5, ..Default::default() },
        ..Request::new(prompt)
    };
    let failing = engine.submit(hard).unwrap();
    let others = [engine.submit(easy.clone()).unwrap(), engine.submit(easy.clone()).unwrap()];
    let answers = run(&mut engine);
    let reason = answers[&(failing, 0)].reason();
    assert!(matches!(reason, EndReason::Grammar(_)), "{reason:?}");
    for other in others {
        assert_eq!(answers[&(other, 0)].ids(), alone(&easy, 0, &config).1);
    }
}

/// Sequences whose masks are not there in time sit out; what they say does not depend on it.
#[test]
fn masks_that_are_late_change_nothing() {
    let grammars = Grammars::new(&TINY.tokenizer).unwrap();
    // Many ways to go on, all of which are followed: that takes longer than the model.
    let ways: Vec<String> = (0..120).map(|i| format!("w{i}")).collect();
    let rules: Vec<String> = (1..)
        .zip(&ways)
        .map(|(i, way)| format!("{way}: /[ a-z]{{1,{i}}}/ \"{}\"", char::from(b'A' + i % 26)))
        .collect();
    let lark = format!("start: way+\nway: {}\n{}", ways.join(" | "), rules.join("\n"));
    let constraint = grammars.compile(&Grammar::Lark(lark)).unwrap();
    let texts = |step_time: Duration| {
        let mut engine = engine(EngineConfig { step_time, ..EngineConfig::new(256, 16) });
        for i in 0..8 {
            let request = Request {
                constraint: (i > 0).then(|| constraint.clone()),
                answers: 1 + i % 3,
                max_tokens: Some(40),
                sampler: SamplerConfig { temperature: 1.0, seed: i.into(), ..Default::default() },
                ..Request::new(tokens("Mr. Bennet was"))
            };
            engine.submit(request).unwrap();
        }
        let (answers, steps) = (run(&mut engine), engine.metrics().steps);
        (answers.into_values().map(|answer| answer.text).collect::<Vec<_>>(), steps)
    };
    let (waited, steps) = texts(Duration::from_secs(100));
    let (sat_out, more_steps) = texts(Duration::ZERO);
    assert_eq!(waited, sat_out);
    assert!(more_steps > steps, "{more_steps} steps and not {steps}: none sat out");
}

#[test]
fn it_is_told_how_likely_a_prompt_was() {
    let prompts: Vec<Vec<u32>> = [1, 2, 30, 75].map(|n| tokens(TEXT)[..n].to_vec()).to_vec();
    let expected = |prompt: &[u32]| -> Vec<TokenLogprobs> {
        let config = TINY.model.config();
        let mut cache = KvCache::new(config, KvType::F16, 128).unwrap();
        let (mut sequence, mut state) = (Sequence::new(), State::new(config, 128));
        cache.extend(&mut sequence, prompt.len()).unwrap();
        let parts = [sequence.part(prompt.len())];
        let outputs: Vec<usize> = (0..prompt.len()).collect();
        let batch = Batch { tokens: prompt, parts: &parts, outputs: &outputs };
        TINY.model.forward(&TINY.cpu, &batch, cache.pool(), &mut state).unwrap();
        let rows = state.logits().chunks_exact(config.vocab_size);
        rows.zip(&prompt[1..]).map(|(row, &t)| TokenLogprobs::of(&TINY.cpu, row, t, 2)).collect()
    };
    // Beside others, in small steps, with little memory, and with a beginning that is known.
    let config = EngineConfig { step_tokens: 32, memory_tokens: 160, ..EngineConfig::new(128, 4) };
    let mut engine = engine(config);
    engine.submit(Request { max_tokens: Some(1), ..Request::new(prompts[3].clone()) }).unwrap();
    run(&mut engine);
    let request = |prompt: &Vec<u32>, answers| Request {
        prompt_logprobs: Some(2),
        answers,
        max_tokens: Some(40),
        ignore_eos: true,
        ..Request::new(prompt.clone())
    };
    let ids: Vec<RequestId> = prompts
        .iter()
        .zip([1, 3, 1, 1])
        .map(|(prompt, answers)| engine.submit(request(prompt, answers)).unwrap())
        .collect();
    let answers = run(&mut engine);
    assert!(engine.metrics().preemptions > 0, "memory is short");
    for (&id, prompt) in ids.iter().zip(&prompts) {
        assert_eq!(answers[&(id, 0)].prompt_logprobs, expected(prompt));
    }
    assert!(answers[&(ids[1], 1)].prompt_logprobs.is_empty(), "it is told once");
}
