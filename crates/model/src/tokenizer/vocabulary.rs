//! What describes a tokenizer, whichever file it came from.

use std::collections::{HashMap, HashSet};

use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::Vocab;

use super::error::{Result, TokenizerError};

/// What a token stands for, numbered as in GGUF's `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal = 1,
    /// What text turns into that no other token can express.
    Unknown = 2,
    /// A mark such as the end of a turn, which plain text must not be able to spell.
    Control = 3,
    /// A piece of text that is found before any merge is tried.
    UserDefined = 4,
    /// A row of the embedding without a meaning.
    Unused = 5,
    /// One byte, `<0x00>` to `<0xFF>`.
    Byte = 6,
}

impl TokenKind {
    /// The kind numbered `number`; numbers nobody defined are [`TokenKind::Unused`].
    pub(super) fn from_number(number: i64) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Unused,
        }
    }
}

/// How a token's text spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alphabet {
    /// GPT-2's: every byte is one printable character (`Ġ` is the space).
    ByteLevel,
    /// SentencePiece's: `▁` is the space, `<0x0A>` is a byte, all else is itself.
    SentencePiece,
}

/// One row of the vocabulary.
#[derive(Clone, Debug)]
pub(super) struct Token {
    /// As the file spells it; empty where the vocabulary has a hole.
    pub(super) text: String,
    pub(super) kind: TokenKind,
    /// Whether merges can reach it; added tokens are mostly beside the model.
    pub(super) in_model: bool,
}

impl Token {
    pub(super) fn hole() -> Self {
        Self { text: String::new(), kind: TokenKind::Unused, in_model: false }
    }
}

/// The description both file formats are read into and written from.
#[derive(Clone, Debug)]
pub(super) struct Vocabulary {
    pub(super) alphabet: Alphabet,
    /// By id.
    pub(super) tokens: Vec<Token>,
    /// Pairs of ids, the most urgent merge first.
    pub(super) merges: Vec<(u32, u32)>,
    /// SentencePiece's log-probabilities, by id, where the file has them.
    pub(super) scores: Option<Vec<f32>>,
    /// Tokens that are found in the text before the model sees it, with their ids.
    pub(super) added: Vec<(u32, AddedToken)>,
    /// As in `tokenizer.json`.
    pub(super) normalizer: Value,
    /// As in `tokenizer.json`.
    pub(super) pre_tokenizer: Value,
    pub(super) unknown: Option<String>,
    pub(super) fuse_unknown: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
    /// Whether decoding drops one space at the start of the text.
    pub(super) strip_space: bool,
}

impl Vocabulary {
    /// Adds `token` at `id`, marking the row as control or user-defined.
    pub(super) fn add(&mut self, id: u32, token: AddedToken) -> Result<()> {
        let row = &mut self.tokens[id as usize];
        if row.text.is_empty() {
            row.text = token.content.clone();
        } else if row.text != token.content {
            return Err(TokenizerError::Inconsistent(format!(
                "token {id} is both `{}` and `{}`",
                row.text, token.content
            )));
        }
        row.kind = match row.kind {
            TokenKind::Unknown => TokenKind::Unknown,
            _ if token.special => TokenKind::Control,
            _ => TokenKind::UserDefined,
        };
        self.added.push((id, token));
        Ok(())
    }

    /// Takes the merges, the most urgent first, and returns what the model is built from.
    ///
    /// Merges of tokens that are found in the text before the model sees it can never happen and
    /// are left out. So are merges of tokens that do not exist, which are counted.
    ///
    /// # Errors
    /// Where two tokens are spelt alike.
    pub(super) fn set_merges(
        &mut self,
        merges: Vec<(String, String)>,
    ) -> Result<(ModelParts, usize)> {
        let mut vocab = Vocab::default();
        vocab.reserve(self.tokens.len());
        let mut beside = HashSet::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if token.in_model {
                if let Some(other) = vocab.insert(token.text.clone(), id as u32) {
                    return Err(TokenizerError::Inconsistent(format!(
                        "tokens {other} and {id} are both `{}`",
                        token.text
                    )));
                }
            } else {
                beside.insert(token.text.as_str());
            }
        }
        let mut parts = ModelParts { vocab, merges: Vec::with_capacity(merges.len()) };
        let mut broken = 0;
        let mut joined = String::new();
        self.merges = Vec::with_capacity(merges.len());
        for (left, right) in merges {
            joined.clear();
            joined.push_str(&left);
            joined.push_str(&right);
            let texts = [left.as_str(), &right, &joined];
            match texts.map(|text| parts.vocab.get(text).copied()) {
                [Some(left_id), Some(right_id), Some(_)] => {
                    self.merges.push((left_id, right_id));
                    parts.merges.push((left, right));
                }
                ids => {
                    let exists =
                        |(text, id): (&str, Option<u32>)| id.is_some() || beside.contains(text);
                    broken += usize::from(!texts.into_iter().zip(ids).all(exists));
                }
            }
        }
        Ok((parts, broken))
    }

    /// The texts of each merge, the most urgent first.
    pub(super) fn merge_texts(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        let text = |id: u32| self.tokens[id as usize].text.as_str();
        self.merges.iter().map(move |&(left, right)| (text(left), text(right)))
    }
}

/// What the model is built from; it keeps neither in this form.
pub(super) struct ModelParts {
    pub(super) vocab: Vocab,
    pub(super) merges: Vec<(String, String)>,
}

/// The merges a SentencePiece model with these tokens and scores does, best score first.
///
/// `transformers` orders merges into tokens of one score by the lengths of their parts, the longer
/// left part first, and so do we.
pub(super) fn merges_from_scores(tokens: &[Token], scores: &[f32]) -> Vec<(String, String)> {
    let normal = |token: &&Token| token.kind == TokenKind::Normal && !token.text.is_empty();
    let ids: HashMap<&str, usize> = (tokens.iter().enumerate())
        .filter(|(_, token)| normal(token))
        .map(|(id, token)| (token.text.as_str(), id))
        .collect();
    struct Merge<'a> {
        score: f32,
        left: &'a str,
        right: &'a str,
        lengths: (usize, usize),
    }
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(_, token)| normal(token)) {
        let score = scores.get(id).copied().unwrap_or(0.0);
        let characters = token.text.chars().count();
        let first = merges.len();
        for (index, (cut, _)) in token.text.char_indices().enumerate().skip(1) {
            let (left, right) = token.text.split_at(cut);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push(Merge { score, left, right, lengths: (index, characters - index) });
            }
        }
        merges[first..].sort_by_key(|merge| (ids[merge.left], ids[merge.right]));
    }
    // A stable sort from high to low: equal keys keep the order of their ids.
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    merges.iter().map(|merge| (merge.left.to_owned(), merge.right.to_owned())).collect()
}

/// A score for each token that makes SentencePiece's algorithm merge in the vocabulary's order.
pub(super) fn scores_from_merges(vocabulary: &Vocabulary) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(vocabulary.merges.len());
    for (rank, (left, right)) in vocabulary.merge_texts().enumerate() {
        ranks.entry([left, right].concat()).or_insert(rank);
    }
    (vocabulary.tokens.iter().enumerate())
        .map(|(id, token)| match token.kind {
            TokenKind::Normal => {
                let rank = ranks.get(&token.text).copied().unwrap_or(vocabulary.merges.len() + id);
                -(rank as f32)
            }
            TokenKind::UserDefined | TokenKind::Unused => -1000.0,
            _ => 0.0,
        })
        .collect()
}
