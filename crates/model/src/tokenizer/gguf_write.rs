//! Writing a tokenizer as GGUF metadata.

use bevel_formats::gguf::{Metadata, Value};
use serde_json::json;

use super::error::{Result, TokenizerError};
use super::gguf::{ADDED_TOKENS, NORMALIZER, PRE_TOKENIZER, sentence_piece_normalizer};
use super::hf::parts;
use super::vocabulary::{Alphabet, TokenKind, scores_from_merges};
use super::{Tokenizer, pre};

impl Tokenizer {
    /// Writes the `tokenizer.*` keys that llama.cpp and [`Tokenizer::from_gguf`] read.
    ///
    /// `rows` is the height of the model's embedding: rows beyond the vocabulary become unused
    /// tokens named `[PAD151650]`. What GGUF cannot say goes into keys named `bevel.tokenizer.*`,
    /// which llama.cpp passes over.
    ///
    /// # Errors
    /// Where the pre-tokenizer has no name in GGUF, or the vocabulary is higher than the embedding.
    pub fn to_gguf(&self, metadata: &mut Metadata, rows: usize) -> Result<()> {
        let vocabulary = &self.vocabulary;
        if vocabulary.tokens.len() > rows {
            let tokens = vocabulary.tokens.len();
            return Err(TokenizerError::TooManyTokens { tokens, rows });
        }
        let around = |ids: &[u32], mark: Option<u32>| ids.is_empty() || ids == mark.as_slice();
        if !around(&self.marks.prefix, self.marks.bos)
            || !around(&self.marks.suffix, self.marks.eos)
        {
            return Err(TokenizerError::Unsupported(
                "other tokens around a text than those that begin and end a sequence".to_owned(),
            ));
        }
        let mut set = |key: &str, value: Value| metadata.insert(key.to_owned(), value);

        // What a reader would take the file for, to say where this tokenizer differs.
        let normalizer;
        let mut pre_tokenizer = serde_json::Value::Null;
        match vocabulary.alphabet {
            Alphabet::ByteLevel => {
                let named = pre::by_behaviour(
                    &vocabulary.pre_tokenizer,
                    &vocabulary.normalizer,
                    vocabulary.ignore_merges,
                )
                .ok_or_else(|| {
                    TokenizerError::UnnamedPreTokenizer(vocabulary.pre_tokenizer.to_string())
                })?;
                set("tokenizer.ggml.model", "gpt2".into());
                set("tokenizer.ggml.pre", named.name().into());
                normalizer = named.normalizer();
                // The same cuts, perhaps spelt differently.
                pre_tokenizer = vocabulary.pre_tokenizer.clone();
            }
            Alphabet::SentencePiece => {
                let space_prefix = self.adds_space_prefix();
                set("tokenizer.ggml.model", "llama".into());
                set("tokenizer.ggml.pre", "default".into());
                set("tokenizer.ggml.add_space_prefix", space_prefix.into());
                normalizer = sentence_piece_normalizer(space_prefix);
            }
        }

        let padding = (vocabulary.tokens.len()..rows).map(|id| format!("[PAD{id}]"));
        let texts: Vec<String> = (vocabulary.tokens.iter().enumerate())
            .map(|(id, token)| match token.text.as_str() {
                "" => format!("[PAD{id}]"),
                text => text.to_owned(),
            })
            .chain(padding)
            .collect();
        set("tokenizer.ggml.tokens", texts.into());
        if vocabulary.alphabet == Alphabet::SentencePiece {
            let mut scores = match &vocabulary.scores {
                Some(scores) => scores.clone(),
                None => scores_from_merges(vocabulary),
            };
            scores.resize(rows, -1000.0);
            set("tokenizer.ggml.scores", scores.into());
        }
        let mut kinds: Vec<i32> = vocabulary.tokens.iter().map(|token| token.kind as i32).collect();
        if vocabulary.alphabet == Alphabet::ByteLevel {
            // llama.cpp keeps the unknown type for vocabularies that turn text into it.
            for kind in kinds.iter_mut().filter(|kind| **kind == TokenKind::Unknown as i32) {
                *kind = TokenKind::Control as i32;
            }
        }
        kinds.resize(rows, TokenKind::Unused as i32);
        set("tokenizer.ggml.token_type", kinds.into());
        let merges: Vec<String> =
            vocabulary.merge_texts().map(|(left, right)| format!("{left} {right}")).collect();
        set("tokenizer.ggml.merges", merges.into());

        let marks = [
            ("bos", self.marks.bos),
            ("eos", self.marks.eos),
            ("eot", self.marks.eot),
            ("eom", self.marks.eom),
            ("unknown", self.marks.unknown),
            ("padding", self.marks.padding),
        ];
        for (name, id) in marks {
            if let Some(id) = id {
                set(&format!("tokenizer.ggml.{name}_token_id"), id.into());
            }
        }
        set("tokenizer.ggml.add_bos_token", (!self.marks.prefix.is_empty()).into());
        set("tokenizer.ggml.add_eos_token", (!self.marks.suffix.is_empty()).into());

        let mut names = Vec::new();
        for (name, source) in &self.chat_templates {
            if name == "default" {
                set("tokenizer.chat_template", source.as_str().into());
            } else {
                set(&format!("tokenizer.chat_template.{name}"), source.as_str().into());
                names.push(name.clone());
            }
        }
        if !names.is_empty() {
            set("tokenizer.chat_templates", names.into());
        }

        if vocabulary.normalizer != normalizer {
            set(NORMALIZER, vocabulary.normalizer.to_string().into());
        }
        if vocabulary.pre_tokenizer != pre_tokenizer {
            set(PRE_TOKENIZER, vocabulary.pre_tokenizer.to_string().into());
        }
        let odd: Vec<_> = (vocabulary.added.iter())
            .filter(|(_, token)| {
                token.lstrip || token.rstrip || token.single_word || token.normalized
            })
            .map(|(id, token)| {
                json!({
                    "id": id, "content": token.content, "single_word": token.single_word,
                    "lstrip": token.lstrip, "rstrip": token.rstrip,
                    "normalized": token.normalized, "special": token.special,
                })
            })
            .collect();
        if !odd.is_empty() {
            set(ADDED_TOKENS, serde_json::Value::Array(odd).to_string().into());
        }
        Ok(())
    }

    /// Whether SentencePiece text begins with a space that the text itself did not have.
    fn adds_space_prefix(&self) -> bool {
        let prepends = |part: &serde_json::Value| {
            part["type"] == "Prepend"
                || (part["type"] == "Metaspace" && part["prepend_scheme"] != "never")
        };
        let parts = |part| parts(part).into_iter().any(prepends);
        parts(&self.vocabulary.normalizer) || parts(&self.vocabulary.pre_tokenizer)
    }
}
