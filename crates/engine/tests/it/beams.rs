//! Beam search beside one that knows neither blocks nor steps.

use std::cmp::Ordering;

use bevel_engine::{
    Beams, EndReason, Engine, EngineConfig, Grammar, Grammars, Refused, Request, Stopping,
};
use bevel_kernels::KvType;
use bevel_model::tokenizer::Tokenizer;
use bevel_model::{Batch, KvCache, SamplerConfig, Sequence, State};

use crate::engine::{Answers, TEXT, TINY, run, tokens};

/// ln p of every token after `tokens`, by a forward pass over all of them.
fn logprobs(tokens: &[u32]) -> Vec<f64> {
    let config = TINY.model.config();
    let mut cache = KvCache::new(config, KvType::F16, 256).unwrap();
    let (mut sequence, mut state) = (Sequence::new(), State::new(config, 256));
    cache.extend(&mut sequence, tokens.len()).unwrap();
    let parts = [sequence.part(tokens.len())];
    let batch = Batch { tokens, parts: &parts, outputs: &[tokens.len() - 1] };
    let logits = TINY.model.forward(&TINY.cpu, &batch, cache.pool(), &mut state).unwrap();
    let sum = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
    logits.iter().map(|&l| f64::from(l) - sum).collect()
}

/// The answers that a search finds, the best first, as the papers have it.
fn expected(request: &Request, ends: &[u32]) -> Vec<Vec<u32>> {
    let Beams { width, length_penalty, stopping } = request.beams.unwrap();
    let (width, most) = (width as usize, request.max_tokens.unwrap());
    let worth = |logprob: f64, len: usize| logprob / (len as f64).powf(length_penalty.into());
    let by_worth = |a: &(f64, Vec<u32>), b: &(f64, Vec<u32>)| -> Ordering { b.0.total_cmp(&a.0) };
    let mut beams = vec![(0.0, Vec::new())];
    let mut ended: Vec<(f64, Vec<u32>)> = Vec::new();
    for len in 1..=most {
        let mut next: Vec<(f64, Vec<u32>)> = Vec::new();
        for (logprob, answer) in &beams {
            let all: Vec<u32> = request.prompt.iter().chain(answer).copied().collect();
            let ways = logprobs(&all).into_iter().enumerate();
            next.extend(ways.map(|(token, p)| {
                (logprob + p, answer.iter().copied().chain([token as u32]).collect())
            }));
        }
        next.sort_by(by_worth);
        beams.clear();
        for (rank, (logprob, answer)) in next.into_iter().enumerate() {
            if beams.len() == width {
                break;
            }
            let is_end = len == most || ends.contains(answer.last().unwrap());
            match is_end {
                false => beams.push((logprob, answer)),
                true if rank < width => ended.push((worth(logprob, len), answer)),
                true => {}
            }
        }
        ended.sort_by(by_worth);
        ended.truncate(width);
        let enough = ended.len() == width;
        let reach = |len| beams.first().map_or(f64::NEG_INFINITY, |best| worth(best.0, len));
        let is_over = match stopping {
            Stopping::AtOnce => enough,
            Stopping::Likely => enough && reach(len) <= ended[width - 1].0,
            Stopping::Certain => enough && reach(most) <= ended[width - 1].0,
        };
        if is_over {
            break;
        }
    }
    ended.into_iter().map(|(_, answer)| answer).take(request.answers as usize).collect()
}

fn search(width: u32, answers: u32, length_penalty: f32, stopping: Stopping) -> Request {
    let beams = Beams { width, length_penalty, stopping };
    Request {
        answers,
        beams: Some(beams),
        ..Request::new(tokens("Mr. Bennet was so odd a mixture"))
    }
}

/// Full stops and commas end answers, so that some end early.
fn tokenizer() -> (Tokenizer, Vec<u32>) {
    let mut tokenizer = TINY.model.checkpoint().tokenizer().unwrap();
    let ends = [".", ",", ";"].map(|end| *tokens(&format!("a{end}")).last().unwrap());
    tokenizer.add_end_of_generation(ends);
    let ends = tokenizer.end_of_generation().to_vec();
    (tokenizer, ends)
}

#[track_caller]
fn check(config: EngineConfig, requests: &[Request]) -> bevel_engine::Metrics {
    let (tokenizer, ends) = tokenizer();
    let mut engine = Engine::new(&TINY.model, &tokenizer, &TINY.cpu, config).unwrap();
    let ids: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let answers: Answers = run(&mut engine);
    let mut early = 0;
    for (id, request) in ids.iter().zip(requests).filter(|(_, request)| request.beams.is_some()) {
        let expected = expected(request, &ends);
        assert_eq!(expected.len(), request.answers as usize);
        for (index, tokens) in (0..).zip(expected) {
            let answer = &answers[&(*id, index)];
            // The token that ends an answer is none of it.
            let ended = matches!(answer.reason(), EndReason::EndOfText(_));
            let shown = &tokens[..tokens.len() - usize::from(ended)];
            assert_eq!(answer.ids(), shown, "{request:?} {index}");
            assert_eq!(answer.end.as_ref().unwrap().answer_tokens, shown.len());
            let mut decoder = TINY.tokenizer.decoder_continuing();
            let text: String = shown.iter().map(|&token| decoder.push(token)).collect();
            assert_eq!(answer.text, text + &decoder.finish());
            early += usize::from(ended);
        }
    }
    assert!(early > 3, "some answers end early");
    engine.metrics()
}

fn requests() -> Vec<Request> {
    let mut requests = Vec::new();
    for (width, answers, penalty) in
        [(1, 1, 1.0), (2, 1, 0.0), (3, 3, 1.0), (5, 2, 2.0), (4, 4, -0.5)]
    {
        for stopping in [Stopping::AtOnce, Stopping::Likely, Stopping::Certain] {
            // The oracle reads everything again for every token.
            let most = if width < 4 { 12 } else { 7 };
            requests.push(Request {
                max_tokens: Some(most),
                ..search(width, answers, penalty, stopping)
            });
        }
    }
    requests
}

#[test]
fn the_likeliest_answers_are_found() {
    let metrics = check(EngineConfig::new(128, 16), &requests());
    assert_eq!(metrics.preemptions, 0);
    assert!(metrics.block_stats.copied > 0, "beams share blocks");
}

#[test]
fn so_they_are_where_memory_does_not_hold_all_beams() {
    // Beside others, and with less memory than the beams of one request take.
    let mut requests = requests();
    let other = Request {
        max_tokens: Some(60),
        ignore_eos: true,
        ..Request::new(tokens(TEXT)[..40].to_vec())
    };
    requests.insert(3, other.clone());
    requests.push(Request { priority: -1, ..other });
    let config = EngineConfig { memory_tokens: 112, step_tokens: 32, ..EngineConfig::new(112, 16) };
    let metrics = check(config, &requests);
    assert!(metrics.preemptions > 10, "{metrics:?}");
}

#[test]
fn of_all_texts_that_a_grammar_allows_the_likeliest_come_first() {
    let names = ["Darcy", "Bennet", "Bingley", "Collins", "Wickham", "Zebra"];
    let grammars = Grammars::new(&TINY.tokenizer).unwrap();
    let choices = format!("( Mr[.] ({}))", names.join("|"));
    let constraint = grammars.compile(&Grammar::Regex(choices)).unwrap();
    let mut engine = crate::engine::engine(EngineConfig::new(128, 40));
    let request = |answers| Request {
        constraint: Some(constraint.clone()),
        logprobs: Some(0),
        ..search(40, answers, 0.0, Stopping::Certain)
    };
    let six = engine.submit(request(6)).unwrap();
    let answers = run(&mut engine);
    let prompt = &request(1).prompt;
    let found: Vec<(String, f64)> = (0..6)
        .map(|index| {
            let answer = &answers[&(six, index)];
            let all: Vec<u32> = prompt.iter().copied().chain(answer.ids()).collect();
            let sum = (prompt.len()..all.len())
                .map(|i| logprobs(&all[..i])[all[i] as usize])
                .sum::<f64>();
            let told: f32 =
                answer.tokens.iter().map(|t| t.logprobs.as_ref().unwrap().logprob).sum();
            assert!((f64::from(told) - sum).abs() < 1e-3);
            (answer.text.clone(), sum)
        })
        .collect();
    assert!(found.is_sorted_by(|a, b| a.1 >= b.1), "{found:?}");
    assert!(found.iter().all(|(text, _)| names.iter().any(|name| text.ends_with(name))));
    // Where fewer texts are allowed than answers wanted, the last ones say so.
    let constraint = Some(grammars.compile(&Grammar::Regex("[ab]".to_owned())).unwrap());
    let three = engine.submit(Request { constraint, ..request(3) }).unwrap();
    let answers = run(&mut engine);
    assert!(["a", "b"].contains(&answers[&(three, 1)].text.as_str()));
    let last = &answers[&(three, 2)];
    assert_eq!(last.reason(), &EndReason::Grammar("no more than 2 answers follow it".to_owned()));
}

#[test]
fn beams_that_cannot_be_are_refused() {
    let mut engine = crate::engine::engine(EngineConfig::new(64, 4));
    for (width, answers) in [(5, 1), (2, 3), (0, 1)] {
        let refused = engine.submit(search(width, answers, 1.0, Stopping::Likely));
        assert_eq!(refused, Err(Refused::Beams { asked: width, answers, most: 4 }));
    }
    // A search that is cancelled, or out of time, gives everything back.
    let id = engine.submit(search(4, 2, 1.0, Stopping::Likely)).unwrap();
    for _ in 0..5 {
        assert!(engine.step().unwrap().is_empty(), "nothing is certain yet");
    }
    assert!(engine.metrics().running > 1);
    engine.cancel(id);
    assert!(engine.is_idle());
    assert_eq!(engine.metrics().blocks_used, 0);
    let deadline = Some(std::time::Instant::now() + std::time::Duration::from_millis(20));
    let id = engine.submit(Request {
        deadline,
        ignore_eos: true,
        ..search(4, 2, 1.0, Stopping::Likely)
    });
    let answers = {
        let mut answers = Answers::new();
        while !engine.is_idle() {
            crate::engine::collect(&mut answers, engine.step().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        answers
    };
    for index in 0..2 {
        assert_eq!(answers[&(id.clone().unwrap(), index)].reason(), &EndReason::Deadline);
    }
}

#[test]
fn penalties_count_and_chance_does_not() {
    let mut engine = crate::engine::engine(EngineConfig::new(128, 8));
    let with = |sampler: SamplerConfig| Request {
        max_tokens: Some(10),
        ignore_eos: true,
        sampler,
        ..search(3, 1, 1.0, Stopping::Likely)
    };
    let plain = with(SamplerConfig::default());
    let ids = [
        plain.clone(),
        with(SamplerConfig { temperature: 1.5, top_k: 1, seed: 3, ..Default::default() }),
        with(SamplerConfig { logit_bias: vec![(tokens(" the")[0], 100.0)], ..Default::default() }),
    ]
    .map(|request| engine.submit(request).unwrap());
    let answers = run(&mut engine);
    let [plain, chance, biased] = ids.map(|id| answers[&(id, 0)].ids());
    assert_eq!(plain, chance);
    assert_eq!(biased, vec![tokens(" the")[0]; 10]);
}
