//! Text from files and pipes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Bytes that a text may have: far more than a context holds or an evaluation needs, but a stream
/// without an end gets an end.
pub(crate) const MOST: u64 = 1 << 30;

/// Reads a UTF-8 text; `-` is stdin.
pub(crate) fn read(path: &Path) -> Result<String> {
    if path.as_os_str() == "-" {
        return read_stdin();
    }
    let shown = format!("`{}`", path.display());
    let file = File::open(path).with_context(|| format!("cannot read {shown}"))?;
    utf8(all_of(file, &shown, MOST)?, &shown)
}

/// Reads a UTF-8 text from stdin, up to its end.
pub(crate) fn read_stdin() -> Result<String> {
    utf8(all_of(std::io::stdin().lock(), "stdin", MOST)?, "stdin")
}

/// All bytes of `source`, which `shown` names, if they are at most `most`.
fn all_of(source: impl Read, shown: &str, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = || format!("cannot read {shown}");
    source.take(most + 1).read_to_end(&mut bytes).with_context(failed)?;
    ensure!(bytes.len() as u64 <= most, "{shown} has more than {most} bytes; give a shorter text");
    Ok(bytes)
}

/// Checks that `bytes`, read from `source`, are UTF-8; a byte-order mark in front is dropped.
fn utf8(bytes: Vec<u8>, source: &str) -> Result<String> {
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let byte = error.as_bytes()[at];
            let line = 1 + error.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
            bail!(
                "{source} is not UTF-8 text: byte 0x{byte:02X} at offset {at} (line {line}); convert it, for example with `iconv -t utf-8`"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::all_of;

    #[test]
    fn endless_streams_end() {
        let error = all_of(std::io::repeat(b'y'), "stdin", 1000).unwrap_err().to_string();
        assert_eq!(error, "stdin has more than 1000 bytes; give a shorter text");
        assert_eq!(all_of(&b"yes"[..], "stdin", 3).unwrap(), b"yes");
    }
}
