//! Reading a Hugging Face directory: `tokenizer.json` and the small files around it.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::bytes::from_byte_token;
use super::error::{Result, TokenizerError};
use super::json::{File, Merge, Model};
use super::vocabulary::{Alphabet, ModelParts, Token, TokenKind, Vocabulary};
use super::{Marks, Tokenizer};

impl Tokenizer {
    /// Reads the tokenizer of the Hugging Face directory `dir`.
    ///
    /// `tokenizer.json` must be there. Where they are, `tokenizer_config.json` and
    /// `special_tokens_map.json` say which tokens begin and end a sequence, and chat templates
    /// come from `chat_template.jinja`, the directory `additional_chat_templates` or
    /// `tokenizer_config.json`, in this order.
    ///
    /// # Errors
    /// Where a file cannot be read, is no tokenizer file, or asks for what bevel does not have.
    pub fn from_hf(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let json = std::fs::read(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => TokenizerError::NoTokenizer(dir.display().to_string()),
            _ => TokenizerError::Io { path: path.display().to_string(), source },
        })?;
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let map = read_json(&dir.join("special_tokens_map.json"))?;
        let mut templates = template_files(dir)?;
        if templates.is_empty() {
            templates = templates_in(&config["chat_template"]);
        }
        Self::from_parts(&json, &config, &map, templates)
    }

    /// Reads a tokenizer from the bytes of a `tokenizer.json`, and of a `tokenizer_config.json` if
    /// there is one.
    ///
    /// # Errors
    /// As [`Tokenizer::from_hf`].
    pub fn from_json_bytes(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let config = match config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|source| {
                TokenizerError::Json { file: "tokenizer_config.json".to_owned(), source }
            })?,
            None => Value::Null,
        };
        let templates = templates_in(&config["chat_template"]);
        Self::from_parts(tokenizer, &config, &Value::Null, templates)
    }

    fn from_parts(
        json: &[u8],
        config: &Value,
        map: &Value,
        templates: Vec<(String, String)>,
    ) -> Result<Self> {
        let file: File = serde_json::from_slice(json)
            .map_err(|source| TokenizerError::Json { file: "tokenizer.json".to_owned(), source })?;
        let mut warnings = Vec::new();
        let (post_processor, vocabulary, parts) = vocabulary(file, &mut warnings)?;
        let ids: HashMap<&str, u32> = (vocabulary.tokens.iter().enumerate())
            .filter(|(_, token)| !token.text.is_empty())
            .map(|(id, token)| (token.text.as_str(), id as u32))
            .collect();
        let mut named = |key: &str| {
            let text = special_text(&config[key]).or_else(|| special_text(&map[key]))?;
            let id = ids.get(text).copied();
            if id.is_none() {
                warnings.push(format!("`{key}` is `{text}`, which is not in the vocabulary"));
            }
            id
        };
        let mut marks = Marks {
            bos: named("bos_token"),
            eos: named("eos_token"),
            unknown: named("unk_token"),
            padding: named("pad_token"),
            eot: named("eot_token"),
            ..Marks::default()
        };
        let flags = ["add_bos_token", "add_eos_token"].map(|key| config[key].as_bool());
        if flags == [None, None] {
            (marks.prefix, marks.suffix) = around(&post_processor, &ids);
            // A directory without `tokenizer_config.json` says no more than this.
            marks.bos = marks.bos.or(marks.prefix.first().copied());
            marks.eos = marks.eos.or(marks.suffix.first().copied());
        } else {
            marks.prefix.extend(marks.bos.filter(|_| flags[0] == Some(true)));
            marks.suffix.extend(marks.eos.filter(|_| flags[1] == Some(true)));
        }
        drop(ids);
        Self::build(vocabulary, parts, marks, templates, warnings)
    }
}

/// The post-processor, which belongs to the marks, the description, and what the model is built of.
fn vocabulary(file: File, warnings: &mut Vec<String>) -> Result<(Value, Vocabulary, ModelParts)> {
    let model = file.model;
    check_model(&model)?;
    let alphabet = alphabet(&file.pre_tokenizer, &file.normalizer, &file.decoder)?;
    let mut tokens = rows(model.vocab.0, file.added_tokens.iter().map(|added| added.id))?;
    if alphabet == Alphabet::SentencePiece && model.byte_fallback {
        for token in &mut tokens {
            if from_byte_token(&token.text).is_some() {
                token.kind = TokenKind::Byte;
            }
        }
    }
    let unknown = model.unk_token.filter(|text| !text.is_empty());
    if let Some(unknown) = &unknown
        && let Some(token) = tokens.iter_mut().find(|token| token.text == *unknown)
    {
        token.kind = TokenKind::Unknown;
    }
    let mut vocabulary = Vocabulary {
        alphabet,
        tokens,
        merges: Vec::new(),
        scores: None,
        added: Vec::new(),
        normalizer: file.normalizer,
        pre_tokenizer: file.pre_tokenizer,
        unknown,
        fuse_unknown: model.fuse_unk,
        byte_fallback: model.byte_fallback,
        ignore_merges: model.ignore_merges,
        strip_space: strips_space(&file.decoder),
    };
    let mut ids: HashMap<String, Option<u32>> =
        file.added_tokens.iter().map(|added| (added.token.content.clone(), None)).collect();
    for (id, token) in vocabulary.tokens.iter().enumerate().filter(|(_, token)| token.in_model) {
        if let Some(row) = ids.get_mut(&token.text) {
            *row = Some(id as u32);
        }
    }
    for added in file.added_tokens {
        let AddedToken { content, .. } = &added.token;
        if content.is_empty() {
            continue;
        }
        // The vocabulary's id wins, as it does in the `tokenizers` crate, and then the first one.
        let id = *ids.entry(content.clone()).or_default().get_or_insert(added.id);
        if id != added.id {
            warnings.push(format!(
                "added token `{content}` says its id is {}, the vocabulary says {id}",
                added.id
            ));
        }
        vocabulary.add(id, added.token)?;
    }
    let merges = model.merges.into_iter().map(|Merge(left, right)| (left, right)).collect();
    let (parts, broken) = vocabulary.set_merges(merges)?;
    if broken > 0 {
        return Err(TokenizerError::Inconsistent(format!(
            "{broken} merges are of tokens that the vocabulary lacks"
        )));
    }
    Ok((file.post_processor, vocabulary, parts))
}

fn check_model(model: &Model) -> Result<()> {
    match model.kind.as_deref() {
        Some("BPE") => {}
        None if !model.merges.is_empty() => {}
        kind => return Err(TokenizerError::UnknownKind(kind.unwrap_or("unnamed").to_owned())),
    }
    let given = |affix: &Option<String>| affix.as_ref().is_some_and(|text| !text.is_empty());
    if given(&model.continuing_subword_prefix) || given(&model.end_of_word_suffix) {
        return Err(TokenizerError::Unsupported("marks within or after words".to_owned()));
    }
    Ok(())
}

/// The rows of the vocabulary, with holes where no token has the id.
fn rows(vocab: Vec<(String, u32)>, added: impl Iterator<Item = u32>) -> Result<Vec<Token>> {
    let (mut count, mut highest) = (vocab.len(), None);
    for id in vocab.iter().map(|&(_, id)| id) {
        highest = highest.max(Some(id));
    }
    for id in added {
        count += 1;
        highest = highest.max(Some(id));
    }
    let size = highest.map_or(0, |id| id as usize + 1);
    // A few holes are normal; ids in the billions are not, and their rows would fill the memory.
    if size > 2 * count + 65536 {
        return Err(TokenizerError::Inconsistent(format!(
            "one of its {count} tokens has the id {}",
            size - 1
        )));
    }
    let mut tokens = vec![Token::hole(); size];
    for (text, id) in vocab {
        let row = &mut tokens[id as usize];
        if row.in_model {
            return Err(TokenizerError::Inconsistent(format!(
                "token {id} is both `{}` and `{text}`",
                row.text
            )));
        }
        *row = Token { text, kind: TokenKind::Normal, in_model: true };
    }
    Ok(tokens)
}

/// All objects in a part and in the parts it is a sequence of.
pub(super) fn parts(part: &Value) -> Vec<&Value> {
    let inner = ["pretokenizers", "normalizers", "decoders", "processors"];
    let mut inner = inner.iter().filter_map(|key| part[*key].as_array()).peekable();
    match inner.peek() {
        None => vec![part],
        Some(_) => inner.flatten().flat_map(parts).collect(),
    }
}

fn is(part: &Value, kind: &str) -> bool {
    part["type"] == kind
}

fn alphabet(pre_tokenizer: &Value, normalizer: &Value, decoder: &Value) -> Result<Alphabet> {
    let any = |part: &Value, kind: &str| parts(part).iter().any(|part| is(part, kind));
    if [pre_tokenizer, normalizer, decoder].iter().any(|part| any(part, "ByteLevel")) {
        return Ok(Alphabet::ByteLevel);
    }
    let replaces = parts(normalizer).iter().any(|part| part["content"] == "▁");
    if replaces || any(pre_tokenizer, "Metaspace") || any(decoder, "Metaspace") {
        return Ok(Alphabet::SentencePiece);
    }
    Err(TokenizerError::Unsupported("neither byte-level nor SentencePiece text".to_owned()))
}

fn strips_space(decoder: &Value) -> bool {
    parts(decoder).iter().any(|part| {
        (is(part, "Strip") && part["content"] == " " && part["start"] == 1)
            || (is(part, "Metaspace") && part["prepend_scheme"] != "never")
    })
}

/// The ids a post-processor puts before and after a text.
fn around(post_processor: &Value, ids: &HashMap<&str, u32>) -> (Vec<u32>, Vec<u32>) {
    let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
    for part in parts(post_processor) {
        if is(part, "TemplateProcessing") {
            let mut into = &mut prefix;
            for piece in part["single"].as_array().into_iter().flatten() {
                if piece.get("Sequence").is_some() {
                    into = &mut suffix;
                } else if let Some(text) = piece["SpecialToken"]["id"].as_str() {
                    into.extend(ids.get(text));
                }
            }
        } else if is(part, "BertProcessing") || is(part, "RobertaProcessing") {
            prefix.extend(part["cls"][0].as_str().and_then(|text| ids.get(text)));
            suffix.extend(part["sep"][0].as_str().and_then(|text| ids.get(text)));
        }
    }
    (prefix, suffix)
}

/// A special token is a string or an object with its `content`.
fn special_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// One template, or a list of named ones.
fn templates_in(value: &Value) -> Vec<(String, String)> {
    if let Some(source) = value.as_str() {
        return vec![("default".to_owned(), source.to_owned())];
    }
    (value.as_array().into_iter().flatten())
        .filter_map(|entry| {
            Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()))
        })
        .collect()
}

fn template_files(dir: &Path) -> Result<Vec<(String, String)>> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|source| TokenizerError::Io { path: path.display().to_string(), source })
    };
    let mut templates = Vec::new();
    let default = dir.join("chat_template.jinja");
    if default.is_file() {
        templates.push(("default".to_owned(), read(&default)?));
    }
    if let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) {
        let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let mut paths: Vec<_> =
            paths.filter(|path| path.extension().is_some_and(|end| end == "jinja")).collect();
        paths.sort();
        for path in paths {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            templates.push((name, read(&path)?));
        }
    }
    Ok(templates)
}

/// The file's JSON, null where there is no file.
fn read_json(path: &Path) -> Result<Value> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|source| TokenizerError::Json { file: path.display().to_string(), source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(TokenizerError::Io { path: path.display().to_string(), source }),
    }
}
