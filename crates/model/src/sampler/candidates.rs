//! Filters over the likeliest tokens. A list of candidates holds tokens and logits, the likeliest first
//! and of equals the smaller token, so that results do not hang on how it was sorted.

use std::cmp::Ordering;

fn by_likelihood(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

pub(super) fn sort(candidates: &mut [(u32, f32)]) {
    candidates.sort_unstable_by(by_likelihood);
}

/// The `k` likeliest tokens that are possible at all.
pub(super) fn likeliest(logits: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    if k == 0 {
        return;
    }
    // Tokens above the k-th best so far are collected, and thinned out when there are many.
    let many = k.saturating_mul(2).max(64);
    let mut floor = f32::NEG_INFINITY;
    for (chunk, first) in logits.chunks(16).zip((0u32..).step_by(16)) {
        if chunk.iter().copied().fold(f32::NEG_INFINITY, f32::max) <= floor {
            continue;
        }
        let better = (first..).zip(chunk).filter(|&(_, &l)| l > floor);
        out.extend(better.map(|(token, &l)| (token, l)));
        if out.len() >= many {
            out.select_nth_unstable_by(k - 1, by_likelihood);
            out.truncate(k);
            floor = out[k - 1].1;
        }
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, by_likelihood);
        out.truncate(k);
    }
    sort(out);
}

/// The likeliest tokens whose probabilities add up to `top_p`, given ln Σ exp of all logits.
pub(super) fn likeliest_within(
    logits: &[f32],
    log_sum_exp: f64,
    top_p: f32,
    out: &mut Vec<(u32, f32)>,
) {
    // The vocabulary need not be sorted: few tokens have most of the probability.
    let mut k = 64;
    loop {
        likeliest(logits, k, out);
        let probabilities = out.iter().map(|c| (f64::from(c.1) - log_sum_exp).exp());
        let enough = reaches(probabilities, top_p);
        if let Some(count) = enough {
            out.truncate(count);
        }
        if enough.is_some() || k >= logits.len() {
            return;
        }
        k *= 8;
    }
}

/// How many of the probabilities add up to `enough`, if they do.
fn reaches(probabilities: impl IntoIterator<Item = f64>, enough: f32) -> Option<usize> {
    let mut sum = 0.0;
    let last = probabilities.into_iter().position(|p| {
        sum += p;
        sum >= f64::from(enough)
    });
    last.map(|last| last + 1)
}

pub(super) fn keep_top_p(
    candidates: &mut Vec<(u32, f32)>,
    top_p: f32,
    probabilities: &mut Vec<f32>,
) {
    if top_p < 1.0 {
        softmax(candidates, 1.0, probabilities);
        let count = reaches(probabilities.iter().copied().map(f64::from), top_p);
        candidates.truncate(count.unwrap_or(usize::MAX));
    }
}

pub(super) fn keep_min_p(candidates: &mut Vec<(u32, f32)>, min_p: f32) {
    if min_p > 0.0 {
        let floor = candidates[0].1 + min_p.ln();
        let kept = candidates.partition_point(|c| c.1 >= floor);
        candidates.truncate(kept.max(1));
    }
}

/// Keeps the tokens whose surprise -ln p is nearest to the entropy.
pub(super) fn keep_typical(
    candidates: &mut Vec<(u32, f32)>,
    typical_p: f32,
    probabilities: &mut Vec<f32>,
) {
    softmax(candidates, 1.0, probabilities);
    let surprise = |p: f32| -p.max(f32::MIN_POSITIVE).ln();
    let entropy: f32 = probabilities.iter().map(|&p| p * surprise(p)).sum();
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let distance = |i: usize| (surprise(probabilities[i]) - entropy).abs();
    order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
    let count = reaches(order.iter().map(|&i| f64::from(probabilities[i])), typical_p);
    order.truncate(count.unwrap_or(usize::MAX));
    order.sort_unstable();
    *candidates = order.into_iter().map(|i| candidates[i]).collect();
}

/// Probabilities of the candidates' logits times `factor`.
pub(super) fn softmax(candidates: &[(u32, f32)], factor: f32, out: &mut Vec<f32>) {
    let highest = candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.1));
    out.clear();
    out.extend(candidates.iter().map(|c| ((c.1 - highest) * factor).exp()));
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= sum);
}
