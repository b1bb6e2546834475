use bevel_model::tokenizer::Tokenizer;

use crate::Result;

/// A text to predict: its tokens, and the bytes each of them stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// For each token its length in bytes; zero for marks such as the one that begins a sequence.
    pub byte_lens: Vec<u32>,
    /// The token that every window of llama.cpp's convention begins with.
    pub bos: Option<u32>,
}

impl Text {
    /// Cuts `text` into tokens, with what the model expects around a text.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        Ok(Self::of_tokens(tokenizer, tokenizer.encode(text, true, false)?))
    }

    /// A text that is cut into tokens already.
    pub fn of_tokens(tokenizer: &Tokenizer, tokens: Vec<u32>) -> Self {
        let byte_len = |&id: &u32| {
            if tokenizer.is_special(id) {
                0
            } else {
                tokenizer.token_bytes(id).map_or(0, |b| b.len())
            }
        };
        let byte_lens = tokens.iter().map(|id| byte_len(id) as u32).collect();
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        Self { tokens, byte_lens, bos }
    }

    /// Keeps the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.byte_lens.truncate(len);
    }
}
