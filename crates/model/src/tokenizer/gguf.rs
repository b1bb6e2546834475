//! Reading a tokenizer from GGUF metadata alone.

use std::collections::{HashMap, HashSet};

use bevel_formats::gguf::{Metadata, Value};
use serde_json::json;
use tokenizers::AddedToken;

use super::error::{Result, TokenizerError};
use super::json::Added;
use super::vocabulary::{Alphabet, Token, TokenKind, Vocabulary, merges_from_scores};
use super::{Marks, Tokenizer, pre};

/// The keys bevel adds where GGUF has no word for what `tokenizer.json` says: JSON as in that file.
pub(super) const NORMALIZER: &str = "bevel.tokenizer.normalizer";
pub(super) const PRE_TOKENIZER: &str = "bevel.tokenizer.pre_tokenizer";
pub(super) const ADDED_TOKENS: &str = "bevel.tokenizer.added_tokens";

impl Tokenizer {
    /// Builds the tokenizer that the `tokenizer.*` keys of a GGUF file describe.
    ///
    /// A pre-tokenizer that bevel does not know by its name is replaced by llama.cpp's default,
    /// which [`Tokenizer::warnings`] then says.
    ///
    /// # Errors
    /// Where keys are missing, have the wrong type, contradict each other or ask for another kind
    /// of tokenizer.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self> {
        let keys = Keys(metadata);
        let alphabet = match keys.text("tokenizer.ggml.model")? {
            Some("gpt2") => Alphabet::ByteLevel,
            Some("llama") => Alphabet::SentencePiece,
            Some(kind) => return Err(TokenizerError::UnknownKind(kind.to_owned())),
            None => return Err(TokenizerError::MissingKey("tokenizer.ggml.model".to_owned())),
        };
        let mut warnings = Vec::new();
        let tokens = tokens(&keys)?;
        let scores = keys.floats("tokenizer.ggml.scores", tokens.len())?;
        let mut vocabulary = Vocabulary {
            alphabet,
            tokens,
            merges: Vec::new(),
            scores,
            added: Vec::new(),
            normalizer: serde_json::Value::Null,
            pre_tokenizer: serde_json::Value::Null,
            unknown: None,
            fuse_unknown: false,
            byte_fallback: false,
            ignore_merges: false,
            strip_space: false,
        };
        let mut merges = merges(&keys)?;
        let mut marks = marks(&keys, &vocabulary, &mut warnings)?;
        let mut add_bos = alphabet == Alphabet::SentencePiece;
        match alphabet {
            Alphabet::ByteLevel => {
                let named = named_pre_tokenizer(&keys, &mut warnings)?;
                vocabulary.normalizer = named.normalizer();
                vocabulary.pre_tokenizer = named.pre_tokenizer();
                vocabulary.ignore_merges = named.ignore_merges;
                add_bos = named.add_bos;
            }
            Alphabet::SentencePiece => {
                sentence_piece(&keys, &mut vocabulary, &mut merges, &marks)?;
            }
        }
        if let Some(normalizer) = keys.json(NORMALIZER)? {
            vocabulary.normalizer = normalizer;
        }
        if let Some(pre_tokenizer) = keys.json(PRE_TOKENIZER)? {
            vocabulary.pre_tokenizer = pre_tokenizer;
        }
        let (parts, broken) = vocabulary.set_merges(merges)?;
        if broken > 0 {
            warnings.push(format!(
                "{broken} merges are of tokens that the vocabulary lacks; they are left out"
            ));
        }
        add_tokens(&keys, &mut vocabulary, &marks)?;
        if keys.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos) {
            marks.prefix.extend(marks.bos);
        }
        if keys.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false) {
            marks.suffix.extend(marks.eos);
        }
        Self::build(vocabulary, parts, marks, templates(&keys)?, warnings)
    }
}

/// Metadata with the types the tokenizer's keys should have.
struct Keys<'a>(&'a Metadata);

impl<'a> Keys<'a> {
    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let wrong =
            || TokenizerError::WrongKey { key: key.to_owned(), expected: expected.to_owned() };
        read(value).map(Some).ok_or_else(wrong)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "a string", Value::as_str)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "a Boolean", Value::as_bool)
    }

    fn texts(&self, key: &str) -> Result<Option<&'a [String]>> {
        self.get(key, "an array of strings", Value::as_strings)
    }

    /// `len` numbers of either kind; more than `len` are cut off.
    fn floats(&self, key: &str, len: usize) -> Result<Option<Vec<f32>>> {
        self.get(key, &format!("an array of {len} numbers"), |value| {
            let floats = match value.as_f32s() {
                Some(floats) => floats.to_vec(),
                None => value.as_ints()?.into_iter().map(|int| int as f32).collect(),
            };
            floats.get(..len).map(<[f32]>::to_vec)
        })
    }

    fn ints(&self, key: &str, len: usize) -> Result<Option<Vec<i64>>> {
        self.get(key, &format!("an array of {len} integers"), |value| {
            value.as_ints()?.get(..len).map(<[i64]>::to_vec)
        })
    }

    fn json(&self, key: &str) -> Result<Option<serde_json::Value>> {
        self.get(key, "JSON", |value| serde_json::from_str(value.as_str()?).ok())
    }

    fn is(&self, key: &str, text: &str) -> bool {
        self.0.get(key).and_then(Value::as_str) == Some(text)
    }
}

fn tokens(keys: &Keys<'_>) -> Result<Vec<Token>> {
    let key = "tokenizer.ggml.tokens";
    let texts = keys.texts(key)?.ok_or_else(|| TokenizerError::MissingKey(key.to_owned()))?;
    let kinds = keys.ints("tokenizer.ggml.token_type", texts.len())?;
    let kind =
        |id: usize| kinds.as_ref().map_or(TokenKind::Normal, |k| TokenKind::from_number(k[id]));
    let mut seen = HashSet::with_capacity(texts.len());
    let mut tokens = Vec::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        let kind = kind(id);
        if text.is_empty() {
            tokens.push(Token::hole());
        } else if seen.insert(text.as_str()) {
            // The others are found before the model sees the text.
            let in_model = matches!(kind, TokenKind::Normal | TokenKind::Byte | TokenKind::Unknown);
            tokens.push(Token { text: text.clone(), kind, in_model });
        } else if kind == TokenKind::Unused {
            tokens.push(Token::hole());
        } else {
            return Err(TokenizerError::Inconsistent(format!(
                "token {id} is `{text}`, which is another token already"
            )));
        }
    }
    Ok(tokens)
}

fn merges(keys: &Keys<'_>) -> Result<Vec<(String, String)>> {
    let key = "tokenizer.ggml.merges";
    let lines = keys.texts(key)?.unwrap_or_default();
    let split = |line: &String| {
        // The first character may itself be a space.
        let start = line.chars().next().map_or(0, char::len_utf8);
        let space = start + line[start..].find(' ')?;
        Some((line[..space].to_owned(), line[space + 1..].to_owned()))
    };
    lines
        .iter()
        .map(|line| {
            split(line).ok_or_else(|| TokenizerError::WrongKey {
                key: key.to_owned(),
                expected: format!("pairs of tokens with a space between, not `{line}`"),
            })
        })
        .collect()
}

fn marks(keys: &Keys<'_>, vocabulary: &Vocabulary, warnings: &mut Vec<String>) -> Result<Marks> {
    let size = vocabulary.tokens.len();
    let mut id = |name: &str, default: Option<usize>| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        // Some converters wrote -1 for a token that does not exist.
        let found = keys.get(&key, "a token id", |value| match value {
            Value::I32(..0) | Value::I64(..0) => Some(usize::MAX),
            _ => value.as_usize(),
        })?;
        match found.or(default) {
            Some(id) if id < size => Ok(Some(id as u32)),
            Some(id) if found.is_some() && id != usize::MAX && id != u32::MAX as usize => {
                warnings.push(format!("`{key}` is {id}, but there are only {size} tokens"));
                Ok(None)
            }
            _ => Ok(None),
        }
    };
    let sentence_piece = vocabulary.alphabet == Alphabet::SentencePiece;
    let or = |id: usize| sentence_piece.then_some(id);
    Ok(Marks {
        bos: id("bos", or(1))?,
        eos: id("eos", or(2))?,
        eot: id("eot", None)?,
        eom: id("eom", None)?,
        unknown: id("unknown", or(0))?,
        padding: id("padding", None)?,
        ..Marks::default()
    })
}

fn named_pre_tokenizer(keys: &Keys<'_>, warnings: &mut Vec<String>) -> Result<&'static pre::Named> {
    let default = || pre::by_name("default").expect("the table has a default");
    let Some(name) = keys.text("tokenizer.ggml.pre")? else {
        warnings.push(
            "the file does not name its pre-tokenizer; llama.cpp's default is used and the text \
             may be cut wrongly: convert the model again"
                .to_owned(),
        );
        return Ok(default());
    };
    Ok(pre::by_name(name).unwrap_or_else(|| {
        warnings.push(format!(
            "the pre-tokenizer `{name}` is unknown; llama.cpp's default is used and the text may \
             be cut wrongly"
        ));
        default()
    }))
}

/// The normalizer of `tokenizer.json` that does what the `llama` kind of tokenizer does.
pub(super) fn sentence_piece_normalizer(space_prefix: bool) -> serde_json::Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    if space_prefix {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
    } else {
        replace
    }
}

/// What the `llama` kind of tokenizer leaves to be understood.
fn sentence_piece(
    keys: &Keys<'_>,
    vocabulary: &mut Vocabulary,
    merges: &mut Vec<(String, String)>,
    marks: &Marks,
) -> Result<()> {
    let space_prefix = keys.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    vocabulary.normalizer = sentence_piece_normalizer(space_prefix);
    vocabulary.strip_space = space_prefix;
    vocabulary.fuse_unknown = true;
    vocabulary.byte_fallback = vocabulary.tokens.iter().any(|token| token.kind == TokenKind::Byte);
    if let Some(id) = marks.unknown {
        let token = &mut vocabulary.tokens[id as usize];
        if !token.text.is_empty() {
            (token.kind, token.in_model) = (TokenKind::Unknown, true);
            vocabulary.unknown = Some(token.text.clone());
        }
    }
    if merges.is_empty() {
        let scores = vocabulary
            .scores
            .as_ref()
            .ok_or_else(|| TokenizerError::MissingKey("tokenizer.ggml.scores".to_owned()))?;
        *merges = merges_from_scores(&vocabulary.tokens, scores);
    }
    Ok(())
}

/// Makes tokens that text finds before any merge of those whose type says so.
fn add_tokens(keys: &Keys<'_>, vocabulary: &mut Vocabulary, marks: &Marks) -> Result<()> {
    // Files without types mark at least the ends.
    let ends = [marks.bos, marks.eos, marks.eot, marks.eom, marks.unknown];
    // Phi-3's marks swallow the spaces and line breaks after them, which GGUF cannot say.
    let phi3 =
        keys.is("general.architecture", "phi3") && vocabulary.alphabet == Alphabet::SentencePiece;
    let swallows = |text: &str| phi3 && !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
    let mut flags: HashMap<String, AddedToken> = HashMap::new();
    if let Some(json) = keys.json(ADDED_TOKENS)? {
        let tokens: Vec<Added> = serde_json::from_value(json)
            .map_err(|source| TokenizerError::Json { file: ADDED_TOKENS.to_owned(), source })?;
        flags.extend(tokens.into_iter().map(|added| (added.token.content.clone(), added.token)));
    }
    let untyped = !keys.0.contains_key("tokenizer.ggml.token_type");
    for id in 0..vocabulary.tokens.len() as u32 {
        let token = &vocabulary.tokens[id as usize];
        let special = match token.kind {
            TokenKind::Control | TokenKind::Unknown => true,
            TokenKind::UserDefined => false,
            TokenKind::Normal if untyped && ends.contains(&Some(id)) => true,
            _ => continue,
        };
        let added = flags.remove(&token.text).map(|added| added.special(special));
        let added = added.unwrap_or_else(|| {
            AddedToken::from(token.text.clone(), special)
                .normalized(false)
                .rstrip(special && swallows(&token.text))
        });
        vocabulary.add(id, added)?;
    }
    Ok(())
}

fn templates(keys: &Keys<'_>) -> Result<Vec<(String, String)>> {
    let mut templates = Vec::new();
    if let Some(source) = keys.text("tokenizer.chat_template")? {
        templates.push(("default".to_owned(), source.to_owned()));
    }
    for name in keys.texts("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(source) = keys.text(&format!("tokenizer.chat_template.{name}"))? {
            templates.push((name.clone(), source.to_owned()));
        }
    }
    Ok(templates)
}
