use anyhow::{Result, ensure};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// A request, and when it is sent.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    /// Seconds from the beginning.
    pub(crate) at: f64,
    pub(crate) prompt: String,
    pub(crate) answer_tokens: usize,
}

/// Where requests come from.
pub(crate) struct Mix<'t> {
    words: Vec<&'t str>,
    prefix: String,
    prompt: (usize, usize),
    answer: (usize, usize),
    random: Pcg64Mcg,
}

impl<'t> Mix<'t> {
    pub(crate) fn new(
        text: &'t str,
        prefix: usize,
        prompt: (usize, usize),
        answer: (usize, usize),
        seed: u64,
    ) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let needed = prefix + 2 * prompt.1;
        ensure!(words.len() > needed, "the text has {} words; {needed} are needed", words.len());
        let (prefix, words) = words.split_at(prefix);
        let random = Pcg64Mcg::seed_from_u64(seed);
        Ok(Self { words: words.to_vec(), prefix: prefix.join(" "), prompt, answer, random })
    }

    /// The next requests. Of a `rate` they come at random, else all at once.
    pub(crate) fn take(&mut self, count: usize, rate: Option<f64>) -> Vec<Planned> {
        let mut at = 0.0;
        (0..count)
            .map(|_| {
                if let Some(rate) = rate {
                    // Times between the events of a Poisson process.
                    let uniform: f64 = self.random.random();
                    at -= (1.0 - uniform).ln() / rate;
                }
                let (length, answer_tokens) = (self.length(self.prompt), self.length(self.answer));
                let start = self.random.random_range(0..self.words.len() - length);
                let own = self.words[start..start + length].join(" ");
                let prompt =
                    if self.prefix.is_empty() { own } else { format!("{} {own}", self.prefix) };
                Planned { at, prompt, answer_tokens }
            })
            .collect()
    }

    fn length(&mut self, (from, to): (usize, usize)) -> usize {
        let uniform: f64 = self.random.random();
        let (low, high) = ((from as f64).ln(), ((to + 1) as f64).ln());
        ((low + uniform * (high - low)).exp() as usize).clamp(from, to)
    }
}
