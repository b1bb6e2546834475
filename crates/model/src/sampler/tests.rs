use super::*;

/// Ten tokens; token 3 is likeliest, then 7.
const LOGITS: [f32; 10] = [0.0, 0.5, -1.0, 3.0, 0.2, -2.0, 1.0, 2.5, 0.0, -0.5];

fn sample(config: &SamplerConfig, logits: &[f32], history: &[u32], prompt: usize) -> u32 {
    let choice = Choice { logits, history, prompt, allowed: None };
    let cpu = Cpu::new(1).unwrap();
    Sampler::new(config.clone()).sample(&cpu, &choice, &mut SamplerScratch::default())
}

#[track_caller]
fn check(config: SamplerConfig, expected: &[u32]) {
    check_allowed(config, None, expected);
}

#[track_caller]
fn check_allowed(config: SamplerConfig, allowed: Option<&[u32]>, expected: &[u32]) {
    let (cpu, mut scratch) = (Cpu::new(1).unwrap(), SamplerScratch::default());
    let choice = Choice { logits: &LOGITS, history: &[], prompt: 0, allowed };
    let mut seen: Vec<u32> = (0..400)
        .map(|seed| {
            let config = SamplerConfig { seed, ..config.clone() };
            Sampler::new(config).sample(&cpu, &choice, &mut scratch)
        })
        .collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, expected);
}

fn hot() -> SamplerConfig {
    SamplerConfig { temperature: 5.0, ..SamplerConfig::default() }
}

#[test]
fn filters_keep_what_they_promise() {
    check(SamplerConfig::default(), &[3]);
    check(hot(), &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    check(SamplerConfig { top_k: 3, ..hot() }, &[3, 6, 7]);
    check(SamplerConfig { top_p: 0.5, ..hot() }, &[3, 7]);
    check(SamplerConfig { top_p: 0.0, ..hot() }, &[3]);
    check(SamplerConfig { top_k: 1, top_p: 0.9, ..hot() }, &[3]);
    // e^(2.5 - 3) is 0.61, e^(1 - 3) is 0.14.
    check(SamplerConfig { min_p: 0.5, ..hot() }, &[3, 7]);
    check(SamplerConfig { min_p: 0.1, ..hot() }, &[3, 6, 7]);
    check(SamplerConfig { min_p: 0.1, top_p: 0.5, ..hot() }, &[3, 7]);
    // Probabilities are 0.46, 0.28 and 0.06; the entropy is 1.55, between the surprises of 7 (1.27)
    // and of 6 (2.77).
    check(SamplerConfig { typical_p: 0.2, ..hot() }, &[7]);
    check(SamplerConfig { typical_p: 0.5, ..hot() }, &[3, 7]);
}

#[test]
fn what_is_not_allowed_is_not_chosen() {
    let allowed = [1 << 1 | 1 << 6];
    check_allowed(SamplerConfig::default(), Some(&allowed), &[6]);
    for config in [
        hot(),
        SamplerConfig { top_k: 5, ..hot() },
        SamplerConfig { top_p: 0.99, ..hot() },
        SamplerConfig { min_p: 0.01, ..hot() },
        SamplerConfig { typical_p: 0.99, ..hot() },
    ] {
        check_allowed(config, Some(&allowed), &[1, 6]);
    }
}

#[test]
fn logit_bias_forbids_and_forces() {
    let bias = |logit_bias| SamplerConfig { logit_bias, ..SamplerConfig::default() };
    assert_eq!(sample(&bias(vec![(3, f32::NEG_INFINITY)]), &LOGITS, &[], 0), 7);
    assert_eq!(sample(&bias(vec![(5, 100.0), (99, 100.0)]), &LOGITS, &[], 0), 5);
}

#[test]
fn numbers_that_overflow_forbid_nothing() {
    let huge = SamplerConfig {
        logit_bias: vec![(1, -3e38), (1, -3e38)],
        presence_penalty: 3e38,
        frequency_penalty: 3e38,
        repetition_penalty: 3e38,
        ..SamplerConfig::default()
    };
    let choice = |history| Choice { logits: &LOGITS, history, prompt: 0, allowed: Some(&[1 << 1]) };
    for temperature in [0.0, 1e-30, 1.0] {
        let mut sampler = Sampler::new(SamplerConfig { temperature, ..huge.clone() });
        let (cpu, mut scratch) = (Cpu::new(1).unwrap(), SamplerScratch::default());
        assert_eq!(sampler.sample(&cpu, &choice(&[1, 1, 2]), &mut scratch), 1);
    }
}

#[test]
fn penalty_moves_both_signs_down_once() {
    let config = SamplerConfig { repetition_penalty: 2.0, ..SamplerConfig::default() };
    assert_eq!(sample(&config, &LOGITS, &[3, 3, 3], 3), 7, "3.0 falls to 1.5, not further");
    assert_eq!(sample(&config, &[-1.0, -1.5], &[0], 1), 1, "-1 falls to -2");
    let far: Vec<u32> = std::iter::once(3).chain(std::iter::repeat_n(9, 64)).collect();
    assert_eq!(sample(&config, &LOGITS, &far, far.len()), 3, "outside the window");
}

#[test]
fn presence_and_frequency_count_the_answer() {
    let presence = SamplerConfig { presence_penalty: 0.6, ..SamplerConfig::default() };
    assert_eq!(sample(&presence, &LOGITS, &[3], 1), 3, "the prompt does not count");
    assert_eq!(sample(&presence, &LOGITS, &[3], 0), 7);
    assert_eq!(sample(&presence, &LOGITS, &[3, 7, 7, 7], 0), 3, "7 falls once");
    let frequency = SamplerConfig { frequency_penalty: 0.3, ..SamplerConfig::default() };
    assert_eq!(sample(&frequency, &LOGITS, &[3], 0), 3);
    assert_eq!(sample(&frequency, &LOGITS, &[3, 3], 0), 7);
}

#[test]
fn dry_penalizes_what_followed_before() {
    let dry = |allowed_length, breakers: &[u32]| {
        let (multiplier, base, window) = (0.4, 2.0, 100);
        let dry = Dry { multiplier, base, allowed_length, window, breakers: breakers.into() };
        SamplerConfig { dry: Some(dry), ..SamplerConfig::default() }
    };
    // 1 2 was followed by 3 before: 3.0 falls by 0.4 · 2^(2 - 1) to 2.2, below 7's 2.5.
    let history = [9, 1, 2, 3, 8, 1, 2];
    assert_eq!(sample(&dry(1, &[]), &LOGITS, &history, 0), 7);
    assert_eq!(sample(&dry(2, &[]), &LOGITS, &history, 0), 3, "it falls by 0.4 only");
    assert_eq!(sample(&dry(3, &[]), &LOGITS, &history, 0), 3, "two tokens may be repeated");
    assert_eq!(sample(&dry(1, &[2]), &LOGITS, &history, 0), 3, "nothing reaches across 2");
    assert_eq!(sample(&dry(1, &[1]), &LOGITS, &history, 0), 3, "one token remains: 0.4");
    assert_eq!(sample(&dry(1, &[3]), &LOGITS, &history, 0), 3, "3 is a breaker itself");
}

#[test]
fn repetitions_are_measured_as_naively() {
    let tokens: Vec<u32> = (0..200u32).map(|i| (i * i / 7) % 3).collect();
    let mut matches = Vec::new();
    for n in 0..tokens.len() {
        let tokens = &tokens[..n];
        penalties::common_endings(tokens, &mut matches);
        for back in 1..n {
            let pairs = tokens[..n - back].iter().rev().zip(tokens.iter().rev());
            assert_eq!(matches[back], pairs.take_while(|(a, b)| a == b).count(), "{n} {back}");
        }
    }
}

#[test]
fn the_likeliest_are_those_of_sorting_all() {
    // Many equals, and some that are impossible.
    let logits: Vec<f32> = (0..5000u32)
        .map(|i| match i.wrapping_mul(2_654_435_761) >> 24 {
            0..20 => f32::NEG_INFINITY,
            value => value as f32 / 16.0,
        })
        .collect();
    let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    candidates::sort(&mut sorted);
    sorted.retain(|candidate| candidate.1.is_finite());
    let mut found = Vec::new();
    for k in [1, 2, 40, 64, 1000, 5000, 9000] {
        likeliest(&logits, k, &mut found);
        assert_eq!(found, sorted[..k.min(sorted.len())], "{k}");
    }
    let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    for top_p in [0.01, 0.3, 0.9, 0.9999] {
        likeliest_within(&logits, sum.ln(), top_p, &mut found);
        let mut reached = 0.0;
        let enough = sorted.iter().position(|c| {
            reached += f64::from(c.1).exp() / sum;
            reached >= f64::from(top_p)
        });
        let expected = enough.map_or(sorted.len(), |last| last + 1);
        assert!(found.len().abs_diff(expected) <= 1, "{top_p}: {} {expected}", found.len());
        assert_eq!(found, sorted[..found.len()]);
    }
}

#[test]
fn frequencies_follow_the_softmax() {
    for config in [
        SamplerConfig { temperature: 1.0, seed: 7, ..SamplerConfig::default() },
        SamplerConfig { temperature: 1.0, seed: 8, top_k: 10, ..SamplerConfig::default() },
    ] {
        let (cpu, mut scratch) = (Cpu::new(1).unwrap(), SamplerScratch::default());
        let choice = Choice { logits: &LOGITS, history: &[], prompt: 0, allowed: None };
        let mut sampler = Sampler::new(config);
        let mut counts = [0usize; 10];
        const DRAWS: usize = 100_000;
        for _ in 0..DRAWS {
            counts[sampler.sample(&cpu, &choice, &mut scratch) as usize] += 1;
        }
        let sum: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        let chi_square: f64 = LOGITS
            .iter()
            .zip(counts)
            .map(|(&l, count)| {
                let expected = DRAWS as f64 * f64::from(l).exp() / sum;
                (count as f64 - expected).powi(2) / expected
            })
            .sum();
        // 9 degrees of freedom: 27.9 is exceeded once in a thousand times.
        assert!(chi_square < 27.9, "{chi_square}");
    }
}

#[test]
fn logprobs_are_those_of_the_model() {
    let cpu = Cpu::new(1).unwrap();
    let sum: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
    let found = TokenLogprobs::of(&cpu, &LOGITS, 5, 2);
    let expected = |token: usize| (f64::from(LOGITS[token]) - sum.ln()) as f32;
    assert!((found.logprob - expected(5)).abs() < 1e-6);
    assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [3, 7]);
    assert!((found.top[1].1 - expected(7)).abs() < 1e-6);
    assert!(TokenLogprobs::of(&cpu, &LOGITS, 5, 0).top.is_empty());
}
