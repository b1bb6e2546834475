//! Strings that end an answer, wherever token boundaries fall.

/// Text that is held back while it could be the beginning of a stop string.
#[derive(Clone, Debug, Default)]
pub struct StopText {
    stop: Vec<String>,
    /// Certain to belong to the answer.
    finished: String,
    /// Bytes of `finished` that the caller has seen.
    shown: usize,
    held: String,
}

impl StopText {
    /// No text yet. Stop strings that are empty stop nothing.
    pub fn new(mut stop: Vec<String>) -> Self {
        stop.retain(|s| !s.is_empty());
        Self { stop, ..Self::default() }
    }

    /// Adds text; the stop string that is complete now, if one is. What begins with it is not part of the
    /// text.
    pub fn push(&mut self, piece: &str) -> Option<&str> {
        self.held.push_str(piece);
        let found = self.stop.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s)));
        if let Some((at, stop)) = found.min_by_key(|found| found.0) {
            self.finished.push_str(&self.held[..at]);
            self.held.clear();
            return Some(stop);
        }
        let keep = self.stop.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let certain = self.held.len() - keep;
        self.finished.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// No more text comes: nothing held back can become a stop string.
    pub fn end(&mut self) {
        self.finished.push_str(&std::mem::take(&mut self.held));
    }

    /// The text so far.
    pub fn finished(&self) -> &str {
        &self.finished
    }

    /// What the caller has not seen yet.
    pub fn ready(&mut self) -> &str {
        let from = std::mem::replace(&mut self.shown, self.finished.len());
        &self.finished[from..]
    }
}

/// Bytes at the end of `text` that begin `stop` without completing it.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1))
        .rev()
        .filter(|&n| stop.is_char_boundary(n))
        .find(|&n| text.ends_with(&stop[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stop: &[&str], pieces: &[&str], expected: &[&str], stopped: bool) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let mut text = StopText::new(stop);
        let mut shown = Vec::new();
        let mut hit = false;
        for piece in pieces {
            hit = text.push(piece).is_some();
            shown.push(text.ready().to_owned());
            if hit {
                break;
            }
        }
        if !hit {
            text.end();
            shown.push(text.ready().to_owned());
        }
        assert_eq!(shown, expected);
        assert_eq!(hit, stopped);
    }

    #[test]
    fn stop_strings_cross_token_boundaries() {
        check(&[], &["a", "b"], &["a", "b", ""], false);
        check(&["END"], &["abE", "ND", "x"], &["ab", ""], true);
        check(&["END"], &["abE", "Nx", "y"], &["ab", "ENx", "y", ""], false);
        check(&["\n\n"], &["a\n", "\nb"], &["a", ""], true);
        check(&["yz", "z"], &["xyz"], &["x"], true);
        check(&["é!"], &["caf", "é", "?"], &["caf", "", "é?", ""], false);
        check(&["aab"], &["aa", "ab"], &["", "a"], true);
        check(&["end"], &["the e"], &["the ", "e"], false);
    }
}
