//! What is wanted of prompts themselves: embeddings, and how likely their tokens are.

use bevel_model::TokenLogprobs;

use super::Engine;
use crate::request::{EndReason, Output, Pooling};
use crate::scheduler::Chunk;

/// Rows of logits that are computed together.
const ROWS: usize = 16;

impl Engine<'_> {
    /// Pools what prompts' tokens gave that are to be embedded.
    pub(super) fn embed(&mut self, chunks: &[Chunk]) -> Vec<Output> {
        let (mut outputs, mut next) = (Vec::new(), 0);
        let dim = self.model.config().dim;
        for &Chunk { id, start, len, wants_next } in chunks {
            let (first, last) = (next, next + len);
            next = last;
            let stream = self.streams.get_mut(&id).expect("it ran");
            let rows: Vec<usize> = match stream.request.embed {
                None => continue,
                Some(Pooling::Mean) => (first..last).collect(),
                Some(Pooling::Last) if wants_next => vec![last - 1],
                Some(Pooling::Last) => continue,
            };
            stream.pool(self.model.hidden(self.cpu, &rows, &mut self.state), dim, start == 0);
            if wants_next {
                let embedding = stream.embedding();
                let found = embedding.is_some();
                let reason = if found { EndReason::Complete } else { EndReason::NotFinite };
                let mut ended = self.end(id, reason);
                ended[0].embedding = embedding;
                outputs.extend(ended);
            }
        }
        outputs
    }

    /// Finds out how likely prompts' tokens were, where that is wanted.
    pub(super) fn score_prompts(&mut self, chunks: &[Chunk]) {
        let mut first = 0;
        for &Chunk { id, start, len, .. } in chunks {
            let row_of_start = first;
            first += len;
            // An embedding has ended.
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let Some(top) = stream.request.prompt_logprobs else { continue };
            let request = stream.request.clone();
            // What follows a token is told by its row. A sequence that was preempted comes here again.
            let rows = stream.scored.max(start)..(start + len).min(request.prompt.len() - 1);
            stream.scored = stream.scored.max(rows.end);
            let rows: Vec<usize> = rows.collect();
            for positions in rows.chunks(ROWS) {
                let rows: Vec<usize> = positions.iter().map(|p| row_of_start + p - start).collect();
                let head = &mut self.prompt_head;
                let logits = self.model.logits(self.cpu, &rows, &mut self.state, head);
                let vocabulary = self.model.config().vocab_size;
                let mut found: Vec<_> = positions.iter().map(|&p| (p, None)).collect();
                self.cpu.pool().run_chunks(&mut found, 1, |i, found| {
                    let (position, logprobs) = &mut found[0];
                    let logits = &logits[i * vocabulary..][..vocabulary];
                    let token = request.prompt[*position + 1];
                    *logprobs = Some(TokenLogprobs::of(self.cpu, logits, token, top));
                });
                stream.prompt_logprobs.extend(found.into_iter().filter_map(|(_, found)| found));
            }
        }
    }
}
