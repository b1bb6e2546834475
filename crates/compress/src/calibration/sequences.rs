//! A stream of tokens, cut into sequences.

use bevel_model::tokenizer::Tokenizer;

use super::choice::spread;

/// Cuts all that a stream holds into sequences of `tokens` tokens and takes `samples` of them from
/// all over it. Each begins as the model expects a text to begin; what is left over at the end is
/// dropped.
pub(super) fn cut(
    stream: &[u32],
    tokenizer: &Tokenizer,
    samples: usize,
    tokens: usize,
    seed: u64,
) -> Vec<Vec<u32>> {
    let mut starts = Vec::new();
    let mut at = 0;
    while let Some(end) = end_of(stream, at, tokenizer, tokens) {
        starts.push(at);
        at = end;
    }
    let chosen = spread(starts.len(), samples, seed).into_iter();
    chosen.map(|i| sequence(&stream[starts[i]..], tokenizer, tokens)).collect()
}

/// The first `tokens` tokens of `stream`, the mark that begins a text counted.
///
/// # Panics
/// Where the stream is too short.
pub(super) fn sequence(stream: &[u32], tokenizer: &Tokenizer, tokens: usize) -> Vec<u32> {
    let end = end_of(stream, 0, tokenizer, tokens).expect("a stream long enough");
    let mut sequence = Vec::with_capacity(tokens);
    sequence.extend(beginning(stream, tokenizer));
    sequence.extend_from_slice(&stream[..end]);
    sequence
}

/// Where the sequence that begins at `at` ends; `None` where the stream ends before it.
fn end_of(stream: &[u32], at: usize, tokenizer: &Tokenizer, tokens: usize) -> Option<usize> {
    let marks = usize::from(beginning(&stream[at..], tokenizer).is_some());
    let end = at + tokens - marks;
    (end <= stream.len()).then_some(end)
}

/// The mark that belongs before `stream`, unless it is there.
fn beginning(stream: &[u32], tokenizer: &Tokenizer) -> Option<u32> {
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos())?;
    (stream.first() != Some(&bos)).then_some(bos)
}
