//! Beam search: of all ways in which a request's beams go on by one token, the likeliest are its next beams
//! (Sutskever et al., arXiv 1409.3215; worth by length: Wu et al., arXiv 1609.08144). Beams are sequences like
//! others: those that come of the same one share its blocks.

use super::{Engine, output};
use crate::request::{Beams, EndReason, Output, OutputToken, Request, RequestId, Stopping};
use crate::scheduler::SequenceId;
use crate::stream::Stream;

/// Where the search for a request's answers is. Its beams are the request's streams.
#[derive(Debug)]
pub(super) struct Search {
    beams: Beams,
    /// Most tokens of an answer.
    longest: usize,
    /// The best answers that have ended, the best first; no more than there are beams.
    ended: Vec<Ended>,
    /// Of the next stream.
    next_index: u32,
}

#[derive(Debug)]
struct Ended {
    worth: f64,
    /// With the one that ended it.
    tokens: Vec<OutputToken>,
}

/// A beam: an answer that has not ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Beam {
    /// Of all its tokens.
    logprob: f64,
    tokens: Vec<OutputToken>,
    /// How it may go on; `None` while that is not known.
    candidates: Option<Vec<Candidate>>,
}

/// A token that a beam may go on with.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) token: OutputToken,
    /// With bias and penalties.
    pub(crate) logprob: f32,
}

/// A candidate that became a beam.
struct Child<'m> {
    parent: SequenceId,
    stream: Stream<'m>,
    token: u32,
}

impl Search {
    /// A search for the answers to a request, in a context of so many tokens.
    pub(super) fn new(beams: Beams, request: &Request, context: usize) -> Self {
        let room = context + 1 - request.prompt.len();
        let longest = request.max_tokens.map_or(room, |most| most.clamp(1, room));
        Self { beams, longest, ended: Vec::new(), next_index: 1 }
    }

    /// What an answer is worth.
    fn worth(&self, logprob: f64, tokens: usize) -> f64 {
        logprob / (tokens.max(1) as f64).powf(self.beams.length_penalty.into())
    }

    fn end(&mut self, logprob: f64, tokens: Vec<OutputToken>) {
        let worth = self.worth(logprob, tokens.len());
        let place = self.ended.partition_point(|other| other.worth >= worth);
        self.ended.insert(place, Ended { worth, tokens });
        self.ended.truncate(self.beams.width as usize);
    }

    /// Whether nothing better is to come, where the likeliest beam has this `logprob` and so many `tokens`.
    fn is_over(&self, logprob: f64, tokens: usize) -> bool {
        let enough = self.ended.len() >= self.beams.width as usize;
        let worst = self.ended.last().map_or(f64::NEG_INFINITY, |ended| ended.worth);
        let reached = match self.beams.stopping {
            Stopping::AtOnce => f64::NEG_INFINITY,
            // A longer answer is worth more than a shorter one as likely, where length counts for it.
            Stopping::Certain if self.beams.length_penalty > 0.0 => {
                self.worth(logprob, self.longest)
            }
            Stopping::Likely | Stopping::Certain => self.worth(logprob, tokens),
        };
        enough && reached <= worst
    }
}

impl<'m> Engine<'m> {
    /// Notes how a beam may go on, and goes on with the request's beams once that is known of all.
    pub(super) fn extend_beam(
        &mut self,
        id: SequenceId,
        candidates: Vec<Candidate>,
    ) -> Vec<Output> {
        let beam = |stream: &mut Stream<'m>| stream.beam.candidates = Some(candidates);
        self.streams.get_mut(&id).map(beam).expect("it ran");
        let parents: Vec<SequenceId> = self.answers(id.request).collect();
        if parents.iter().any(|parent| self.streams[parent].beam.candidates.is_none()) {
            return Vec::new();
        }
        let children = self.next_beams(id.request, &parents);
        let best = children.first().map(|child| &child.stream.beam);
        let search = &self.searches[&id.request];
        if best.is_none_or(|best| search.is_over(best.logprob, best.tokens.len())) {
            return self.end_search(id.request);
        }
        self.replace_beams(&parents, children);
        Vec::new()
    }

    /// The next beams, the likeliest first. Candidates that end their answers are put with those that have.
    fn next_beams(&mut self, request: u64, parents: &[SequenceId]) -> Vec<Child<'m>> {
        let search = self.searches.get_mut(&request).expect("its beams are searched");
        let width = search.beams.width as usize;
        let mut candidates = Vec::new();
        for &parent in parents {
            let beam = &mut self.streams.get_mut(&parent).expect("it is a beam").beam;
            for candidate in beam.candidates.take().unwrap_or_default() {
                let logprob = beam.logprob + f64::from(candidate.logprob);
                candidates.push((logprob, parent, candidate.token));
            }
        }
        // Of equals those of older beams come first, and of one beam's the smaller tokens.
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut children = Vec::with_capacity(width);
        for (rank, (logprob, parent, token)) in candidates.into_iter().enumerate() {
            if children.len() == width {
                break;
            }
            let mut stream = self.streams[&parent].clone();
            let room = self.scheduler.tokens(parent).len() < self.config.context;
            let id = token.id;
            let step = stream.push(token.clone(), self.tokenizer.end_of_generation(), room);
            stream.beam.logprob = logprob;
            stream.beam.tokens.push(token);
            match step.end {
                None => children.push(Child { parent, stream, token: id }),
                Some(EndReason::Grammar(_)) => {}
                // An end counts where it is as likely as the beams are.
                Some(_) if rank < width => search.end(logprob, stream.beam.tokens),
                Some(_) => {}
            }
        }
        children
    }

    /// Puts beams in the places of those that they come of.
    fn replace_beams(&mut self, parents: &[SequenceId], children: Vec<Child<'m>>) {
        for &parent in parents {
            if children.iter().all(|child| child.parent != parent) {
                self.remove(parent);
            }
        }
        self.metrics.generated_tokens += children.len() as u64;
        let mut pushes = Vec::with_capacity(children.len());
        for Child { parent, mut stream, token } in children {
            // The first one takes its parent's place.
            let mut id = parent;
            if pushes.iter().any(|&(taken, _)| taken == parent) {
                let search = self.searches.get_mut(&parent.request).expect("it goes on");
                id.index = search.next_index;
                search.next_index += 1;
                self.scheduler.fork(parent, id);
            }
            self.prepare(id, &mut stream);
            self.streams.insert(id, stream);
            pushes.push((id, token));
        }
        // Forks share what was there before.
        for (id, token) in pushes {
            self.scheduler.push(id, token);
        }
    }

    /// The answers that were found.
    fn end_search(&mut self, request: u64) -> Vec<Output> {
        let mut outputs = Vec::new();
        let search = self.searches.remove(&request).expect("it goes on");
        let beam = self.answers(request).next().expect("a search has beams");
        let mut beam = self.streams[&beam].clone();
        let mut ended = search.ended.into_iter();
        for index in 0..beam.request.answers {
            let id = SequenceId { request, index };
            let mut stream = beam.again(index, self.tokenizer);
            let Some(Ended { tokens, .. }) = ended.next() else {
                let problem = format!("no more than {index} answers follow it");
                let step = stream.finish(EndReason::Grammar(problem), None);
                outputs.push(output(id, &mut stream, step));
                continue;
            };
            for token in tokens {
                let room = stream.request.prompt.len() + stream.answer_tokens < self.config.context;
                let step = stream.push(token, self.tokenizer.end_of_generation(), room);
                outputs.push(output(id, &mut stream, step));
            }
        }
        self.cancel(RequestId(request));
        outputs
    }
}
