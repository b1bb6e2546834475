//! What changes logits before a token is chosen.

use super::{Choice, Dry, SamplerConfig};

/// A set of tokens that is emptied at once.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The round in which a token was last seen.
    rounds: Vec<u32>,
    round: u32,
}

impl Seen {
    fn clear(&mut self, vocab: usize) {
        self.rounds.resize(vocab, 0);
        self.round = self.round.checked_add(1).unwrap_or_else(|| {
            self.rounds.fill(0);
            1
        });
    }

    /// True where the token is new. One outside the vocabulary never is.
    fn insert(&mut self, token: u32) -> bool {
        let round = self.round;
        self.rounds.get_mut(token as usize).is_some_and(|r| std::mem::replace(r, round) != round)
    }
}

/// Changes `logits` as `config` and `choice` say.
pub(super) fn apply(
    config: &SamplerConfig,
    choice: &Choice<'_>,
    logits: &mut [f32],
    seen: &mut Seen,
    matches: &mut Vec<usize>,
) {
    for &(token, bias) in &config.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    let penalty = config.repetition_penalty;
    if penalty != 1.0 {
        seen.clear(logits.len());
        for &token in last(choice.history, config.repetition_window) {
            if seen.insert(token) {
                let logit = &mut logits[token as usize];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
    let (presence, frequency) = (config.presence_penalty, config.frequency_penalty);
    if presence != 0.0 || frequency != 0.0 {
        seen.clear(logits.len());
        for &token in &choice.history[choice.prompt..] {
            let first = seen.insert(token);
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= if first { presence + frequency } else { frequency };
            }
        }
    }
    if let Some(dry) = &config.dry {
        penalize_repeating(dry, choice.history, logits, seen, matches);
    }
    // However much is added and subtracted, what is not forbidden stays possible.
    for logit in logits.iter_mut().filter(|logit| !logit.is_finite()) {
        *logit = if *logit > 0.0 { f32::MAX } else { f32::MIN };
    }
    for &(token, bias) in &config.logit_bias {
        if bias == f32::NEG_INFINITY
            && let Some(logit) = logits.get_mut(token as usize)
        {
            *logit = bias;
        }
    }
    if let Some(allowed) = choice.allowed {
        for (logits, &word) in logits.chunks_mut(32).zip(allowed) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let covered = logits.len().min(allowed.len() * 32);
        logits[covered..].fill(f32::NEG_INFINITY);
    }
}

fn last(tokens: &[u32], count: usize) -> &[u32] {
    &tokens[tokens.len().saturating_sub(count)..]
}

/// Penalizes what followed the end of `history` when it occurred before.
fn penalize_repeating(
    dry: &Dry,
    history: &[u32],
    logits: &mut [f32],
    seen: &mut Seen,
    matches: &mut Vec<usize>,
) {
    let history = last(history, dry.window);
    let breaks = |token: u32| dry.breakers.binary_search(&token).is_ok();
    let longest = history.iter().rev().take_while(|&&token| !breaks(token)).count();
    if longest < dry.allowed_length.max(1) {
        return;
    }
    common_endings(history, matches);
    // Where several repetitions go on with the same token, the longest counts: they are taken in order.
    let mut found: Vec<(usize, u32)> = (1..history.len())
        .map(|back| (matches[back].min(longest), history[history.len() - back]))
        .filter(|&(len, next)| len >= dry.allowed_length.max(1) && !breaks(next))
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    seen.clear(logits.len());
    for (len, next) in found {
        if seen.insert(next) {
            let length = (len - dry.allowed_length) as f32;
            logits[next as usize] -= dry.multiplier * dry.base.powf(length);
        }
    }
}

/// `out[back]`: how many tokens the list has in common with itself without its last `back` tokens, counted
/// from the ends. The Z-algorithm on the reversed list, in linear time.
pub(super) fn common_endings(tokens: &[u32], out: &mut Vec<usize>) {
    let n = tokens.len();
    let reversed = |i: usize| tokens[n - 1 - i];
    out.clear();
    out.resize(n, 0);
    // The match that reaches furthest: `start .. end` equals the beginning.
    let (mut start, mut end) = (0, 0);
    for i in 1..n {
        let mut len = if i < end { out[i - start].min(end - i) } else { 0 };
        while i + len < n && reversed(len) == reversed(i + len) {
            len += 1;
        }
        if i + len > end {
            (start, end) = (i, i + len);
        }
        out[i] = len;
    }
}
