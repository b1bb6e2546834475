//! Writing `tokenizer.json` and `tokenizer_config.json`.

use std::io::Write;
use std::path::Path;

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::Tokenizer;
use super::error::{Result, TokenizerError};
use super::vocabulary::{Alphabet, Vocabulary};

impl Tokenizer {
    /// Writes `tokenizer.json` and `tokenizer_config.json` into `dir`.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn to_hf(&self, dir: &Path) -> Result<()> {
        write(&dir.join("tokenizer.json"), &self.to_json_bytes())?;
        let config = serde_json::to_vec_pretty(&self.config()).expect("JSON values serialize");
        write(&dir.join("tokenizer_config.json"), &config)
    }

    /// The bytes of the `tokenizer.json` that describes this tokenizer.
    pub fn to_json_bytes(&self) -> Vec<u8> {
        let vocabulary = &self.vocabulary;
        let added: Vec<Value> = (vocabulary.added.iter())
            .map(|(id, token)| {
                json!({
                    "id": id, "content": token.content, "single_word": token.single_word,
                    "lstrip": token.lstrip, "rstrip": token.rstrip,
                    "normalized": token.normalized, "special": token.special,
                })
            })
            .collect();
        let file = File {
            version: "1.0",
            truncation: None,
            padding: None,
            added_tokens: added,
            normalizer: &vocabulary.normalizer,
            pre_tokenizer: &vocabulary.pre_tokenizer,
            post_processor: self.post_processor(),
            decoder: decoder(vocabulary),
            model: Model {
                kind: "BPE",
                dropout: None,
                unk_token: vocabulary.unknown.as_deref(),
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: vocabulary.fuse_unknown,
                byte_fallback: vocabulary.byte_fallback,
                ignore_merges: vocabulary.ignore_merges,
                vocab: Vocab(vocabulary),
                merges: Merges(vocabulary),
            },
        };
        serde_json::to_vec_pretty(&file).expect("a tokenizer serializes")
    }

    fn post_processor(&self) -> Value {
        if self.marks.prefix.is_empty() && self.marks.suffix.is_empty() {
            return Value::Null;
        }
        let mut special_tokens = serde_json::Map::new();
        let mut side = |ids: &[u32]| -> Vec<Value> {
            ids.iter()
                .filter_map(|&id| {
                    let text = self.token(id)?;
                    let entry = json!({"id": text, "ids": [id], "tokens": [text]});
                    special_tokens.insert(text.to_owned(), entry);
                    Some(json!({"SpecialToken": {"id": text, "type_id": 0}}))
                })
                .collect()
        };
        let (prefix, suffix) = (side(&self.marks.prefix), side(&self.marks.suffix));
        let text = |name: &str| vec![json!({"Sequence": {"id": name, "type_id": 0}})];
        let around = |text: Vec<Value>| [prefix.clone(), text, suffix.clone()].concat();
        let pair = [around(text("A")), around(text("B"))].concat();
        json!({
            "type": "TemplateProcessing",
            "single": around(text("A")),
            "pair": pair,
            "special_tokens": special_tokens,
        })
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "add_bos_token": !self.marks.prefix.is_empty(),
            "add_eos_token": !self.marks.suffix.is_empty(),
        });
        let texts = self.special_texts();
        for (name, text) in texts.iter() {
            config[name] = text.into();
        }
        match &self.chat_templates[..] {
            [] => {}
            [(name, source)] if name == "default" => {
                config["chat_template"] = source.as_str().into()
            }
            templates => {
                config["chat_template"] = (templates.iter())
                    .map(|(name, source)| json!({"name": name, "template": source}))
                    .collect();
            }
        }
        config
    }
}

fn decoder(vocabulary: &Vocabulary) -> Value {
    if vocabulary.alphabet == Alphabet::ByteLevel {
        return json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
        });
    }
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if vocabulary.strip_space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}

#[derive(Serialize)]
struct File<'a> {
    version: &'a str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Value>,
    normalizer: &'a Value,
    pre_tokenizer: &'a Value,
    post_processor: Value,
    decoder: Value,
    model: Model<'a>,
}

#[derive(Serialize)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    dropout: Option<f32>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Vocab<'a>,
    merges: Merges<'a>,
}

struct Vocab<'a>(&'a Vocabulary);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        // Readers number added tokens that are not in here by themselves, after all that are.
        let last = self.0.tokens.iter().rposition(|token| token.in_model).unwrap_or(0);
        let is_added = |id: usize| self.0.added.iter().any(|(added, _)| *added as usize == id);
        for (id, token) in self.0.tokens.iter().enumerate() {
            if token.in_model || (id < last && is_added(id)) {
                map.serialize_entry(&token.text, &id)?;
            }
        }
        map.end()
    }
}

struct Merges<'a>(&'a Vocabulary);

impl Serialize for Merges<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.merges.len()))?;
        for (left, right) in self.0.merge_texts() {
            list.serialize_element(&[left, right])?;
        }
        list.end()
    }
}

/// Writes beside `path` and renames, so that no half-written file is ever seen.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| TokenizerError::Io { path: path.display().to_string(), source };
    let part = path.with_extension("json.part");
    let mut file = std::fs::File::create(&part).map_err(io)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.and_then(|()| std::fs::rename(&part, path)).map_err(|source| {
        // The error to report is the first one.
        let _ = std::fs::remove_file(&part);
        io(source)
    })
}
