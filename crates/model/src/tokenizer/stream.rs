use super::Tokenizer;

/// Turns token ids into text as they come, never breaking a character.
///
/// The pieces, joined, are what [`Tokenizer::decode`] gives for all the ids at once.
///
/// ```no_run
/// # fn print_all(tokenizer: &bevel_model::tokenizer::Tokenizer, ids: &[u32]) {
/// let mut decoder = tokenizer.decoder();
/// for &id in ids {
///     print!("{}", decoder.push(id));
/// }
/// println!("{}", decoder.finish());
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Whether a space that comes next is dropped.
    strip_space: bool,
    /// The beginning of a character whose other bytes have not come yet: at most 3 bytes.
    pending: Vec<u8>,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool, strip_space: bool) -> Self {
        Self { tokenizer, skip_special, strip_space, pending: Vec::new() }
    }

    /// Leaves special tokens out of the text.
    #[must_use]
    pub fn skip_special(mut self, skip: bool) -> Self {
        self.skip_special = skip;
        self
    }

    /// Takes one token and returns the text that is now complete, often none.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
        let mut bytes = bytes.as_slice();
        if self.strip_space && !bytes.is_empty() {
            self.strip_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut complete = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            complete += chunk.valid().len();
            let broken = chunk.invalid();
            if broken.is_empty() {
                break;
            }
            if complete + broken.len() == self.pending.len() && may_continue(broken) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            complete += broken.len();
        }
        self.pending.drain(..complete);
        text
    }

    /// Ends the text: what was left of a broken character becomes `U+FFFD`.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Whether more bytes could make `bytes` a character.
fn may_continue(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}
