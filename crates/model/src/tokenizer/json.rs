//! The shape of `tokenizer.json`.

use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokenizers::AddedToken;

#[derive(Deserialize)]
pub(super) struct File {
    #[serde(default)]
    pub(super) added_tokens: Vec<Added>,
    #[serde(default)]
    pub(super) normalizer: Value,
    #[serde(default)]
    pub(super) pre_tokenizer: Value,
    #[serde(default)]
    pub(super) post_processor: Value,
    #[serde(default)]
    pub(super) decoder: Value,
    pub(super) model: Model,
}

/// An added token and its id; flags that are missing are false.
#[derive(Deserialize)]
#[serde(from = "AddedFields")]
pub(super) struct Added {
    pub(super) id: u32,
    pub(super) token: AddedToken,
}

#[derive(Deserialize)]
struct AddedFields {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

impl From<AddedFields> for Added {
    fn from(fields: AddedFields) -> Self {
        let token = AddedToken::from(fields.content, fields.special)
            .single_word(fields.single_word)
            .lstrip(fields.lstrip)
            .rstrip(fields.rstrip)
            .normalized(fields.normalized);
        Self { id: fields.id, token }
    }
}

#[derive(Deserialize)]
pub(super) struct Model {
    /// `BPE`, `Unigram`, `WordPiece`, `WordLevel`; old files leave it out.
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(default)]
    pub(super) vocab: Vocab,
    #[serde(default)]
    pub(super) merges: Vec<Merge>,
    pub(super) unk_token: Option<String>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(super) fuse_unk: bool,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    #[serde(default)]
    pub(super) ignore_merges: bool,
}

/// Texts and ids; empty where the model keeps a list of scores, as `Unigram` does.
#[derive(Default)]
pub(super) struct Vocab(pub(super) Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tokens to ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocab(entries))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vocab, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocab::default())
            }
        }
        deserializer.deserialize_any(Entries)
    }
}

/// `"a b"` in older files, `["a", "b"]` in newer ones.
pub(super) struct Merge(pub(super) String, pub(super) String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                match text.split(' ').collect::<Vec<_>>()[..] {
                    [left, right] => Ok(Merge(left.to_owned(), right.to_owned())),
                    _ => Err(E::custom(format!("`{text}` is not two tokens"))),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                let mut next = || {
                    seq.next_element()?
                        .ok_or_else(|| serde::de::Error::custom("a merge of fewer than two tokens"))
                };
                let merge = Merge(next()?, next()?);
                match seq.next_element::<IgnoredAny>()? {
                    None => Ok(merge),
                    Some(_) => Err(serde::de::Error::custom("a merge of more than two tokens")),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}
