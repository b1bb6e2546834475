//! Documents and conversations out of records: a choice of all of them, as one stream of tokens.

use bevel_formats::parquet::ParquetFile;
use bevel_formats::records::{self, DataFile, Place};
use bevel_model::chat::{ChatTemplate, DateTime, Message, TemplateError};
use bevel_model::tokenizer::Tokenizer;
use serde_json::Value;

use super::CalibrationConfig;
use super::choice::{Random, Reservoir};
use super::record::{Document, columns};
use super::sequences::cut;
use crate::{Error, Result};

/// Bytes of documents kept for each token that is wanted.
const BYTES_PER_TOKEN: usize = 8;
/// Of a document longer than so many sequences, that much is taken from a random place.
const LONGEST: usize = 16;

pub(super) fn read(
    config: &CalibrationConfig,
    files: &[DataFile],
    tokenizer: &Tokenizer,
) -> Result<(Vec<Vec<u32>>, Vec<String>)> {
    let budget = config.samples * config.tokens * BYTES_PER_TOKEN;
    let mut reservoir = Reservoir::new(budget, config.seed);
    let mut empty = 0u64;
    let mut passed = 0u64;
    let mut take = |place: Place<'_>, record: Value| {
        let document = Document::of(record, config.field.as_deref())
            .map_err(|reason| Error::Calibration { data: place.to_string(), reason })?;
        passed += 1;
        match document {
            None => empty += 1,
            Some(document) => {
                let longest = LONGEST * config.tokens * BYTES_PER_TOKEN;
                let document = shorten(document, longest, Random::new(config.seed, !passed));
                reservoir.push(document.bytes(), document);
            }
        }
        Ok(())
    };
    let wanted = |file: &ParquetFile| -> Result<Vec<String>> {
        let wanted = columns(&file.text_columns(), config.field.as_deref());
        Ok(wanted.into_iter().map(str::to_owned).collect())
    };
    for file in files {
        records::read(file, &wanted, &mut take)?;
    }
    let mut stream = Stream::new(tokenizer);
    for document in reservoir.into_kept() {
        stream.push(&document)?;
    }
    let mut warnings = stream.warnings();
    if empty > 0 {
        warnings.push(format!("{empty} of {passed} records hold no text"));
    }
    let found = cut(&stream.tokens, tokenizer, config.samples, config.tokens, config.seed);
    Ok((found, warnings))
}

/// A part of a text that is longer than `longest` bytes, from a random place.
fn shorten(document: Document, longest: usize, mut random: Random) -> Document {
    match document {
        Document::Text(text) if text.len() > longest => {
            let start = random.below((text.len() - longest) as u64) as usize;
            let start = text.ceil_char_boundary(start);
            let end = text.floor_char_boundary(start + longest);
            Document::Text(text[start..end].to_owned())
        }
        other => other,
    }
}

/// Documents as tokens, one after another.
struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    template: Result<ChatTemplate, TemplateError>,
    tokens: Vec<u32>,
    conversations: usize,
    /// Conversations that the template refused, and what it said of the first.
    refused: (usize, String),
}

impl<'a> Stream<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            template: fixed_template(tokenizer),
            tokens: Vec::new(),
            conversations: 0,
            refused: (0, String::new()),
        }
    }

    fn push(&mut self, document: &Document) -> Result<()> {
        match document {
            Document::Text(text) => self.push_text(text),
            Document::Chat(messages) => {
                self.conversations += 1;
                let Ok(template) = &self.template else {
                    return self.push_text(&plain(messages));
                };
                match template.render(messages, None, false, Default::default()) {
                    Ok(text) => {
                        self.tokens.extend(self.tokenizer.encode(&text, false, true)?);
                        Ok(())
                    }
                    Err(error) => {
                        if self.refused.0 == 0 {
                            self.refused.1 = error.to_string();
                        }
                        self.refused.0 += 1;
                        Ok(())
                    }
                }
            }
        }
    }

    /// A text begins as the model expects it to; where nothing marks that, a blank line parts it
    /// from the one before.
    fn push_text(&mut self, text: &str) -> Result<()> {
        if !self.tokens.is_empty() && !self.tokenizer.adds_bos() {
            self.tokens.extend(self.tokenizer.encode("\n\n", false, false)?);
        }
        self.tokens.extend(self.tokenizer.encode(text, true, false)?);
        Ok(())
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let (Err(error), true) = (&self.template, self.conversations > 0) {
            warnings.push(format!("conversations are read as plain text: {error}"));
        }
        if self.refused.0 > 0 {
            let (refused, why) = &self.refused;
            let all = self.conversations;
            warnings.push(format!("{refused} of {all} conversations were left out: {why}"));
        }
        warnings
    }
}

/// The model's chat template, with a clock that stands still: templates that write the date write
/// the same one in every run.
pub(super) fn fixed_template(tokenizer: &Tokenizer) -> Result<ChatTemplate, TemplateError> {
    let template = tokenizer.chat_template(false)?;
    let clock = || DateTime::from_unix(1_735_689_600);
    ChatTemplate::with_clock(template.source(), tokenizer.special_texts(), clock)
}

/// A conversation for a model that knows none.
fn plain(messages: &[Message]) -> String {
    let texts: Vec<&str> = messages.iter().filter_map(|m| m.content.as_str()).collect();
    texts.join("\n\n")
}
