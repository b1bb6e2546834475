//! Text to tokens and back, from `tokenizer.json` or from GGUF metadata alone.
//!
//! Cutting text is done by the `tokenizers` crate. What bevel adds: one description ([`Tokenizer`])
//! that both file formats are read into and written from, special tokens that text may or may not
//! spell, and decoding that streams.

mod bytes;
mod engine;
mod error;
mod gguf;
mod gguf_write;
mod hf;
mod hf_write;
mod json;
mod pre;
mod stream;
mod vocabulary;

use std::fmt;

pub use error::{Result, TokenizerError};
pub use stream::StreamDecoder;
pub use vocabulary::{Alphabet, TokenKind};

use crate::chat::{ChatTemplate, SpecialTexts, TemplateError};
use engine::Engine;
use vocabulary::{ModelParts, Vocabulary};

/// A byte-level or SentencePiece-style BPE tokenizer.
///
/// Encoding gives the ids that `transformers` gives for the same `tokenizer.json`. Decoding joins
/// the tokens' bytes; bytes that are no UTF-8 become `U+FFFD`. Added tokens are decoded as they
/// are spelt.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    engine: Engine,
    marks: Marks,
    /// Names (`default`, `tool_use`) and sources.
    chat_templates: Vec<(String, String)>,
    warnings: Vec<String>,
}

/// The tokens with a role, and what is put around a text.
#[derive(Clone, Debug, Default)]
struct Marks {
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    eom: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
    /// Ids before every text.
    prefix: Vec<u32>,
    /// Ids after every text.
    suffix: Vec<u32>,
    /// Ids that end an answer, ascending.
    end_of_generation: Vec<u32>,
}

/// Tokens that end an answer in some family of models, whatever the files say about them.
const END_OF_GENERATION: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "[EOT]",
    "<eos>",
    "</s>",
];

impl Tokenizer {
    fn build(
        vocabulary: Vocabulary,
        parts: ModelParts,
        mut marks: Marks,
        chat_templates: Vec<(String, String)>,
        warnings: Vec<String>,
    ) -> Result<Self> {
        let engine = Engine::new(&vocabulary, parts)?;
        let named = END_OF_GENERATION.iter().filter_map(|text| {
            let id = engine.id(text)?;
            (vocabulary.tokens[id as usize].kind != TokenKind::Normal).then_some(id)
        });
        marks.end_of_generation.extend(named);
        marks.end_of_generation.extend([marks.eos, marks.eot, marks.eom].into_iter().flatten());
        // In gpt-oss `<|end|>` ends a message of several, not the answer.
        if engine.id("<|return|>").is_some() && engine.id("<|call|>").is_some() {
            let end = engine.id("<|end|>");
            marks.end_of_generation.retain(|&id| Some(id) != end);
        }
        marks.end_of_generation.sort_unstable();
        marks.end_of_generation.dedup();
        Ok(Self { vocabulary, engine, marks, chat_templates, warnings })
    }

    /// The ids of `text`.
    ///
    /// `add_special` puts the tokens around it that the model expects, such as the one that begins
    /// a sequence. With `parse_special`, a special token spelt in the text becomes that token, as
    /// a rendered chat template needs it; without, it is text like any other, as what a user typed
    /// should be.
    ///
    /// # Errors
    /// Where a pre-tokenizer's expression fails on the text.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if add_special {
            ids.extend_from_slice(&self.marks.prefix);
        }
        self.engine.encode(text, parse_special, &mut ids)?;
        if add_special {
            ids.extend_from_slice(&self.marks.suffix);
        }
        Ok(ids)
    }

    /// The text of `ids`; with `skip_special`, without the special tokens among them.
    ///
    /// Ids beyond the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut decoder = self.decoder().skip_special(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&decoder.push(id));
        }
        text.push_str(&decoder.finish());
        text
    }

    /// Decodes ids one by one, from the start of a text.
    pub fn decoder(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self, false, self.vocabulary.strip_space)
    }

    /// Decodes ids one by one where other text came before: a space at the start is kept.
    pub fn decoder_continuing(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self, false, false)
    }

    /// Ids in the vocabulary, holes included.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.tokens.len()
    }

    /// The token of `id` as the files spell it (`Ġthe`, `▁the`), `None` for holes.
    pub fn token(&self, id: u32) -> Option<&str> {
        let token = self.vocabulary.tokens.get(id as usize)?;
        (!token.text.is_empty()).then_some(token.text.as_str())
    }

    /// The id of the token that the files spell `token`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.engine.id(token)
    }

    /// The bytes that `id` stands for in a text.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.vocabulary.tokens.get(id as usize)?;
        let text = token.text.as_str();
        match (self.vocabulary.alphabet, token.kind) {
            (_, TokenKind::Unused) if text.is_empty() => None,
            (Alphabet::ByteLevel, TokenKind::Normal) => {
                Some(bytes::from_byte_level(text).unwrap_or_else(|| text.into()))
            }
            (Alphabet::ByteLevel, _) => Some(text.into()),
            (Alphabet::SentencePiece, TokenKind::Byte) => {
                bytes::from_byte_token(text).map(|byte| vec![byte]).or_else(|| Some(text.into()))
            }
            (Alphabet::SentencePiece, _) => Some(text.replace('▁', " ").into_bytes()),
        }
    }

    /// What `id` stands for.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.vocabulary.tokens.get(id as usize).map(|token| token.kind)
    }

    /// Whether `id` is a special token: a mark rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.kind(id), Some(TokenKind::Control | TokenKind::Unknown))
    }

    /// How tokens spell bytes.
    pub fn alphabet(&self) -> Alphabet {
        self.vocabulary.alphabet
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.marks.bos
    }

    /// The token that ends a sequence.
    pub fn eos(&self) -> Option<u32> {
        self.marks.eos
    }

    /// The token that ends a turn, where the files name one.
    pub fn eot(&self) -> Option<u32> {
        self.marks.eot
    }

    /// The token that fills up a batch.
    pub fn padding(&self) -> Option<u32> {
        self.marks.padding
    }

    /// Whether [`Tokenizer::encode`] with `add_special` begins with [`Tokenizer::bos`].
    pub fn adds_bos(&self) -> bool {
        self.marks.bos.is_some_and(|bos| self.marks.prefix.contains(&bos))
    }

    /// The ids that end an answer, ascending.
    pub fn end_of_generation(&self) -> &[u32] {
        &self.marks.end_of_generation
    }

    /// Adds ids that end an answer, such as those of a `generation_config.json`.
    pub fn add_end_of_generation(&mut self, ids: impl IntoIterator<Item = u32>) {
        let size = self.vocab_size();
        self.marks.end_of_generation.extend(ids.into_iter().filter(|&id| (id as usize) < size));
        self.marks.end_of_generation.sort_unstable();
        self.marks.end_of_generation.dedup();
    }

    /// What was odd about the files and what was done about it, to be shown to the user.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The chat templates that came with the tokenizer: names and sources.
    pub fn chat_templates(&self) -> &[(String, String)] {
        &self.chat_templates
    }

    /// The chat template to use; `for_tools` prefers the one named `tool_use`.
    ///
    /// # Errors
    /// Where there is none, or where it does not parse.
    pub fn chat_template(&self, for_tools: bool) -> Result<ChatTemplate, TemplateError> {
        let find = |name: &str| self.chat_templates.iter().find(|(n, _)| n == name);
        let (_, source) = (for_tools.then(|| find("tool_use")).flatten())
            .or_else(|| find("default"))
            .ok_or(TemplateError::Missing)?;
        ChatTemplate::new(source, self.special_texts())
    }

    /// The special tokens by the names chat templates know them by.
    pub fn special_texts(&self) -> SpecialTexts {
        let text = |id: Option<u32>| id.and_then(|id| self.token(id)).map(str::to_owned);
        SpecialTexts {
            bos_token: text(self.marks.bos),
            eos_token: text(self.marks.eos),
            unk_token: text(self.marks.unknown),
            pad_token: text(self.marks.padding),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("alphabet", &self.vocabulary.alphabet)
            .field("tokens", &self.vocabulary.tokens.len())
            .field("marks", &self.marks)
            .finish_non_exhaustive()
    }
}
