//! Text files. A short text is cut into tokens whole; of a long one, only the pieces that are wanted
//! are read.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bevel_model::tokenizer::Tokenizer;

use super::CalibrationConfig;
use super::choice::Random;
use super::sequences::{cut, sequence};
use crate::{Error, Result};

/// Texts up to this many bytes are read whole, however few tokens are wanted.
const WHOLE: u64 = 4 << 20;
/// Bytes read for each token that is wanted. Text has 3 to 5.
const BYTES_PER_TOKEN: u64 = 8;
/// More are not read: what has so few tokens is no text.
const MOST_PER_TOKEN: u64 = 256;
/// A piece begins after the first line that ends within so many bytes.
const LONGEST_LINE: usize = 1024;

pub(super) fn read(
    config: &CalibrationConfig,
    files: &[PathBuf],
    tokenizer: &Tokenizer,
) -> Result<(Vec<Vec<u32>>, Vec<String>)> {
    let sizes = files.iter().map(|path| {
        let data = std::fs::metadata(path).map_err(Error::io("read", path))?;
        Ok(data.len())
    });
    let sizes = sizes.collect::<Result<Vec<u64>>>()?;
    let total: u64 = sizes.iter().sum();
    let wanted = (config.samples * config.tokens) as u64 * BYTES_PER_TOKEN;
    if total > WHOLE.max(2 * wanted) {
        return pieces(config, files, &sizes, tokenizer);
    }
    let mut stream = Vec::new();
    for (path, &size) in files.iter().zip(&sizes) {
        let bytes = read_span(path, 0, size)?;
        let text = str::from_utf8(&bytes).map_err(|e| no_utf8(path, e.valid_up_to() as u64))?;
        stream.extend(tokenizer.encode(text.trim_start_matches('\u{feff}'), false, false)?);
    }
    let found = cut(&stream, tokenizer, config.samples, config.tokens, config.seed);
    Ok((found, Vec::new()))
}

/// One piece from each of `samples` equal parts of the text.
fn pieces(
    config: &CalibrationConfig,
    files: &[PathBuf],
    sizes: &[u64],
    tokenizer: &Tokenizer,
) -> Result<(Vec<Vec<u32>>, Vec<String>)> {
    let total: u64 = sizes.iter().sum();
    let samples = config.samples as u64;
    let mut random = Random::new(config.seed, 0);
    let mut found = Vec::with_capacity(config.samples);
    for i in 0..samples {
        let edge = |i: u64| (u128::from(i) * u128::from(total) / u128::from(samples)) as u64;
        let mut at = edge(i) + random.below((edge(i + 1) - edge(i)).max(1));
        let mut file = 0;
        while at >= sizes[file] && file + 1 < sizes.len() {
            at -= sizes[file];
            file += 1;
        }
        found.extend(piece(&files[file], at, sizes[file], config.tokens, tokenizer)?);
    }
    Ok((found, Vec::new()))
}

/// The sequence that begins at the first line after byte `at`, or further before where the file
/// ends too early; `None` where there are too few tokens.
fn piece(
    path: &Path,
    at: u64,
    size: u64,
    tokens: usize,
    tokenizer: &Tokenizer,
) -> Result<Option<Vec<u32>>> {
    let mut len = tokens as u64 * BYTES_PER_TOKEN + LONGEST_LINE as u64;
    loop {
        let start = at.min(size.saturating_sub(len));
        let bytes = read_span(path, start, len.min(size - start))?;
        let text = inner_text(&bytes, start > 0, start + (bytes.len() as u64) < size)
            .map_err(|position| no_utf8(path, start + position as u64))?;
        // The last tokens of a piece depend on what was cut off.
        let mut ids = tokenizer.encode(text, false, false)?;
        if ids.len() >= tokens + 8 {
            ids.truncate(tokens + 8);
            return Ok(Some(sequence(&ids, tokenizer, tokens)));
        }
        if len >= size || len >= tokens as u64 * MOST_PER_TOKEN {
            return Ok(None);
        }
        len *= 2;
    }
}

/// The text within `bytes`: from the first line that begins in it where something was cut off
/// before, without a character that was cut in two. Gives the position of what is no UTF-8.
fn inner_text(bytes: &[u8], cut_before: bool, cut_after: bool) -> Result<&str, usize> {
    let mut start = 0;
    if cut_before {
        let head = &bytes[..bytes.len().min(LONGEST_LINE)];
        let line = head.iter().position(|&b| b == b'\n').map(|end| end + 1);
        let is_start = |&b: &u8| b & 0xc0 != 0x80;
        let character = || head.iter().take(4).position(is_start).unwrap_or(0);
        start = line.unwrap_or_else(character);
    }
    match str::from_utf8(&bytes[start..]) {
        Ok(text) => Ok(text),
        Err(error) if cut_after && error.error_len().is_none() => {
            str::from_utf8(&bytes[start..start + error.valid_up_to()]).map_err(|_| start)
        }
        Err(error) => Err(start + error.valid_up_to()),
    }
}

fn read_span(path: &Path, start: u64, len: u64) -> Result<Vec<u8>> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    file.seek(SeekFrom::Start(start)).map_err(Error::io("read", path))?;
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}

fn no_utf8(path: &Path, position: u64) -> Error {
    Error::Calibration {
        data: path.display().to_string(),
        reason: format!(
            "byte {position} is no UTF-8; convert the file to UTF-8 (`iconv -t UTF-8`), or leave it out if it is no text"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_begin_and_end_at_whole_characters() {
        let bytes = "éé\nxyé".as_bytes();
        assert_eq!(inner_text(bytes, false, false), Ok("éé\nxyé"));
        assert_eq!(inner_text(&bytes[1..], true, false), Ok("xyé"));
        assert_eq!(inner_text(&bytes[..bytes.len() - 1], true, true), Ok("xy"));
        assert_eq!(inner_text(&bytes[1..4], true, true), Ok("é"), "no line ends here");
        assert_eq!(inner_text(&bytes[..bytes.len() - 1], false, false), Err(7));
        assert_eq!(inner_text(b"a\xffb", false, true), Err(1));
    }
}
