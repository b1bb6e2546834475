//! How a text that is longer than a context is cut into windows.
//!
//! Two conventions are in use, and figures are comparable only between equal cuts:
//!
//! 1. llama.cpp's: consecutive windows of `context` tokens, the first of each replaced by the token
//!    that begins a sequence where the model has one. Only the tokens after the middle are scored,
//!    `context − 1 − context / 2` a window, so that each has at least half a window before it.
//! 2. The sliding window of the Hugging Face documentation: windows of `context` tokens whose starts
//!    lie `stride` apart; each window scores the tokens that none before it has scored.

use std::ops::Range;

use bevel_model::PREFILL_CHUNK;
use serde::Serialize;

use crate::{Error, Result, Text};

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Windows {
    /// llama.cpp's consecutive windows, of which the second half is scored.
    HalfWindow,
    /// Windows that overlap, each moved on by so many tokens.
    Strided(usize),
}

/// One window: where it lies in the text, and which of its tokens are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) tokens: Range<usize>,
    pub(crate) scored: Range<usize>,
}

/// Tokens of a window that go through a model at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Positions in the window.
    pub(crate) tokens: Range<usize>,
    /// Positions in `tokens` after which the logits are wanted: the last ones.
    pub(crate) outputs: Vec<usize>,
    /// Positions in the window of the tokens that these logits predict.
    pub(crate) next: Range<usize>,
}

/// Logits held at once: 64 MB, whatever the size of the vocabulary.
const LOGITS_AT_ONCE: usize = 16 << 20;

impl Windows {
    /// Lays windows of `context` tokens over a text of `len`.
    pub(crate) fn lay(self, context: usize, len: usize) -> Result<Vec<Window>> {
        if context < 4 {
            return Err(Error::Windows(format!(
                "windows of {context} tokens are too short to score anything; --ctx begins at 4"
            )));
        }
        match self {
            Windows::HalfWindow => {
                if len < context {
                    return Err(Error::TextTooShort { tokens: len, context });
                }
                let window = |i: usize| {
                    let (start, end) = (i * context, (i + 1) * context);
                    Window { tokens: start..end, scored: start + context / 2 + 1..end }
                };
                Ok((0..len / context).map(window).collect())
            }
            Windows::Strided(stride) => {
                if stride == 0 || stride > context {
                    return Err(Error::Windows(format!(
                        "a stride of {stride} tokens does not suit windows of {context}: expected 1 to {context}"
                    )));
                }
                if len < 2 {
                    return Err(Error::TextTooShort { tokens: len, context: 2 });
                }
                let mut windows = Vec::new();
                let (mut start, mut scored) = (0, 0);
                while scored < len {
                    let end = (start + context).min(len);
                    // Nothing stands before the first token of a window, so nothing predicts it.
                    windows.push(Window { tokens: start..end, scored: scored.max(start + 1)..end });
                    (start, scored) = (start + stride, end);
                }
                // The text's end may leave a last window with one token and nothing to score.
                windows.retain(|w| !w.scored.is_empty());
                Ok(windows)
            }
        }
    }

    /// The tokens that a model is given for `window`.
    pub(crate) fn input(self, window: &Window, text: &Text) -> Vec<u32> {
        let mut tokens = text.tokens[window.tokens.clone()].to_vec();
        if let (Windows::HalfWindow, Some(bos)) = (self, text.bos) {
            tokens[0] = bos;
        }
        tokens
    }
}

impl Window {
    /// Bytes that the scored tokens stand for.
    pub(crate) fn scored_bytes(&self, text: &Text) -> u64 {
        text.byte_lens[self.scored.clone()].iter().map(|&n| u64::from(n)).sum()
    }

    /// The steps in which a model with `vocab` logits runs the window.
    pub(crate) fn steps(&self, vocab: usize) -> Vec<Step> {
        let rows = (LOGITS_AT_ONCE / vocab.max(1)).clamp(16, PREFILL_CHUNK);
        let first = self.tokens.start;
        // The logits after token t - 1 predict token t.
        let wanted = self.scored.start - first - 1..self.scored.end - first - 1;
        let mut steps = Vec::new();
        let mut from = 0;
        while from < wanted.end {
            let begin = wanted.start.max(from);
            let to = (begin + rows).min(from + PREFILL_CHUNK).min(wanted.end);
            steps.push(Step {
                tokens: from..to,
                outputs: (begin..to).map(|t| t - from).collect(),
                next: begin.min(to) + 1..to + 1,
            });
            from = to;
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(windows: Windows, len: usize, expected: &[(Range<usize>, Range<usize>)]) {
        let found: Vec<_> =
            windows.lay(8, len).unwrap().into_iter().map(|w| (w.tokens, w.scored)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn windows_lie_as_documented() {
        check(Windows::HalfWindow, 8, &[(0..8, 5..8)]);
        check(Windows::HalfWindow, 23, &[(0..8, 5..8), (8..16, 13..16)]);
        check(Windows::Strided(8), 12, &[(0..8, 1..8), (8..12, 9..12)]);
        check(Windows::Strided(3), 13, &[(0..8, 1..8), (3..11, 8..11), (6..13, 11..13)]);
        check(Windows::Strided(4), 5, &[(0..5, 1..5)]);
        check(Windows::Strided(8), 9, &[(0..8, 1..8)]);
    }

    #[test]
    fn overlapping_windows_score_every_token_but_the_first_once() {
        for (len, stride) in (2..40).flat_map(|len| (1..8).map(move |stride| (len, stride))) {
            let windows = Windows::Strided(stride).lay(8, len).unwrap();
            let scored: Vec<usize> = windows.into_iter().flat_map(|w| w.scored).collect();
            assert_eq!(scored, (1..len).collect::<Vec<_>>(), "stride {stride}");
        }
    }

    #[test]
    fn steps_run_every_token_once_and_predict_all_that_are_scored() {
        for (context, vocab) in [(8, 10), (2048, 100), (1500, 1 << 20), (600, 40_000)] {
            let window = &Windows::HalfWindow.lay(context, 2 * context).unwrap()[1];
            let steps = window.steps(vocab);
            let run: Vec<usize> = steps.iter().flat_map(|s| s.tokens.clone()).collect();
            assert_eq!(run, (0..context - 1).collect::<Vec<_>>());
            let next: Vec<usize> = steps.iter().flat_map(|s| s.next.clone()).collect();
            assert_eq!(next, (context / 2 + 1..context).collect::<Vec<_>>());
            for step in steps {
                assert!(step.tokens.len() <= PREFILL_CHUNK);
                assert!(step.outputs.len() * vocab <= LOGITS_AT_ONCE.max(16 * vocab));
                let outputs = step.outputs.iter().map(|&t| step.tokens.start + t + 1);
                assert!(outputs.eq(step.next));
            }
        }
    }
}
