//! The part that cuts text into tokens: the `tokenizers` crate, put together from a description.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{
    AddedVocabulary, Model, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer,
    PreTokenizerWrapper,
};

use super::error::{Result, TokenizerError};
use super::hf::parts;
use super::vocabulary::{ModelParts, Vocabulary};

/// Cuts text into token ids.
pub(super) struct Engine {
    bpe: BPE,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// Finds all added tokens in the text.
    added: AddedVocabulary,
    /// Finds those that are not special.
    added_plain: AddedVocabulary,
    /// Ids of the added tokens.
    added_ids: AddedIds,
}

impl Engine {
    pub(super) fn new(vocabulary: &Vocabulary, parts: ModelParts) -> Result<Self> {
        let mut builder = BPE::builder()
            .vocab_and_merges(parts.vocab, parts.merges)
            .fuse_unk(vocabulary.fuse_unknown)
            .byte_fallback(vocabulary.byte_fallback)
            .ignore_merges(vocabulary.ignore_merges);
        if let Some(unknown) = &vocabulary.unknown {
            builder = builder.unk_token(unknown.clone());
        }
        let bpe = builder.build().map_err(|error| part("model", error))?;
        if let Some(unknown) = &vocabulary.unknown
            && bpe.token_to_id(unknown).is_none()
        {
            return Err(TokenizerError::Inconsistent(format!(
                "the unknown token `{unknown}` is not in the vocabulary"
            )));
        }

        refuse_precompiled(&vocabulary.normalizer)?;
        refuse_growth(&vocabulary.normalizer, &vocabulary.pre_tokenizer)?;
        let normalizer: Option<NormalizerWrapper> = parse("normalizer", &vocabulary.normalizer)?;
        let pre_tokenizer: Option<PreTokenizerWrapper> =
            parse("pre-tokenizer", &vocabulary.pre_tokenizer)?;

        let added_ids = AddedIds(
            vocabulary.added.iter().map(|(id, token)| (token.content.clone(), *id)).collect(),
        );
        let tokens = || vocabulary.added.iter().map(|(_, token)| token.clone());
        let mut added = AddedVocabulary::new();
        added
            .add_tokens(tokens(), &added_ids, normalizer.as_ref())
            .map_err(|error| part("added tokens", error))?;
        let mut added_plain = added.clone();
        added_plain.set_encode_special_tokens(true);
        Ok(Self { bpe, normalizer, pre_tokenizer, added, added_plain, added_ids })
    }

    /// Appends the ids of `text`.
    pub(super) fn encode(&self, text: &str, parse_special: bool, ids: &mut Vec<u32>) -> Result<()> {
        let added = if parse_special { &self.added } else { &self.added_plain };
        let mut pieces = added.extract_and_normalize(self.normalizer.as_ref(), text);
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer
                .pre_tokenize(&mut pieces)
                .map_err(|error| part("pre-tokenizer", error))?;
        }
        pieces
            .tokenize(|piece| self.bpe.tokenize(piece.get()))
            .map_err(|error| part("model", error))?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    /// The id of the token spelt `text`.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.added_ids.0.get(text).copied().or_else(|| self.bpe.token_to_id(text))
    }
}

/// Builds a part from its description in `tokenizer.json`; null is no part.
fn parse<T: DeserializeOwned>(name: &'static str, value: &Value) -> Result<Option<T>> {
    Option::<T>::deserialize(value).map_err(|error| part(name, error))
}

/// `Precompiled` is the normalizer of unigram models, and its table is not checked when it is read.
fn refuse_precompiled(normalizer: &Value) -> Result<()> {
    let refuse = || Err(TokenizerError::Unsupported("a `Precompiled` normalizer".to_owned()));
    match normalizer["type"].as_str() {
        Some("Precompiled") => refuse(),
        Some("Sequence") => (normalizer["normalizers"].as_array().into_iter().flatten())
            .try_for_each(refuse_precompiled),
        Some(_) | None if normalizer.get("precompiled_charsmap").is_some() => refuse(),
        _ => Ok(()),
    }
}

/// How many times longer a normalizer and pre-tokenizer may make a text. Those in use triple it.
const GROWTH: usize = 1000;

/// Forty steps that each double a text would fill the memory.
fn refuse_growth(normalizer: &Value, pre_tokenizer: &Value) -> Result<()> {
    let steps = [parts(normalizer), parts(pre_tokenizer)].concat();
    let growth = steps.into_iter().map(growth).fold(1, usize::saturating_mul);
    if growth > GROWTH {
        let what = format!("steps that make a text up to {growth} times longer");
        return Err(TokenizerError::Unsupported(what));
    }
    Ok(())
}

/// How many times longer one step may make a text.
fn growth(step: &Value) -> usize {
    if step["type"] == "ByteLevel" {
        return 2; // Bytes become characters of up to two bytes.
    }
    let Some(content) = step["content"].as_str() else { return 1 };
    match step["pattern"]["String"].as_str() {
        Some(pattern) if !pattern.is_empty() => content.len().div_ceil(pattern.len()).max(1),
        // An expression may match between any two characters.
        _ => content.len() + 1,
    }
}

fn part(part: &'static str, error: impl ToString) -> TokenizerError {
    TokenizerError::Part { part, message: error.to_string() }
}

/// Tells [`AddedVocabulary`] which ids its tokens have; it knows no other way to ask.
struct AddedIds(HashMap<String, u32>);

impl Model for AddedIds {
    type Trainer = BpeTrainer;

    fn tokenize(&self, _: &str) -> tokenizers::Result<Vec<tokenizers::Token>> {
        Ok(Vec::new())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.get(token).copied()
    }

    fn id_to_token(&self, _: u32) -> Option<String> {
        None
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.clone()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}
