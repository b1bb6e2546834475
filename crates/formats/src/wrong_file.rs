use std::path::Path;

use crate::Error;

/// The error for a file that does not begin like a file of the `expected` format: names what the
/// bytes look like and what to do about it.
pub(crate) fn wrong_file(path: &Path, expected: &'static str, bytes: &[u8]) -> Error {
    Error::WrongFile { path: path.to_owned(), expected, found: recognize(bytes) }
}

fn recognize(bytes: &[u8]) -> String {
    let words = if bytes.is_empty() {
        "it is empty; copy or download it again"
    } else if bytes.starts_with(b"version https://git-lfs") {
        "it is a git-lfs pointer, a few lines of text that stand for the real file; run `git lfs pull` in its directory or download the file itself"
    } else if bytes.starts_with(b"PK\x03\x04") || is_pickle(bytes) {
        PICKLE
    } else if bytes.starts_with(b"GGUF") {
        "it is a GGUF file; give it a name that ends in `.gguf`"
    } else if bytes.get(8) == Some(&b'{') {
        "it looks like a safetensors file; name the directory that holds it and its `config.json`"
    } else if [b"lmgg", b"fmgg", b"tjgg", b"algg"].iter().any(|magic| bytes.starts_with(*magic)) {
        "it is in a llama.cpp format from before GGUF; convert the original model again"
    } else if begins_with_text(bytes, b"<!doctype") || begins_with_text(bytes, b"<html") {
        "it is a web page, probably an error page saved by a download; download the file again"
    } else {
        let first = &bytes[..bytes.len().min(8)];
        return format!("it begins with the bytes `{}`", first.escape_ascii());
    };
    words.to_owned()
}

/// What users are told who hand over a pickle.
pub(crate) const PICKLE: &str = "it is a Python pickle, which bevel does not read because loading one can run any code hidden in it; convert the model to safetensors first";

/// Opcode PROTO with a protocol version that exists.
fn is_pickle(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80, 2..=5, ..])
}

fn begins_with_text(bytes: &[u8], lower: &[u8]) -> bool {
    let text = bytes.trim_ascii_start();
    text.len() >= lower.len() && text[..lower.len()].eq_ignore_ascii_case(lower)
}
