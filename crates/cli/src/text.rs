//! Text from files and pipes.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Reads a UTF-8 text; `-` is stdin.
pub(crate) fn read(path: &Path) -> Result<String> {
    if path.as_os_str() == "-" {
        return read_stdin();
    }
    let shown = path.display();
    let bytes = std::fs::read(path).with_context(|| format!("cannot read `{shown}`"))?;
    utf8(bytes, &format!("`{shown}`"))
}

/// Reads a UTF-8 text from stdin, up to its end.
pub(crate) fn read_stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read stdin")?;
    utf8(bytes, "stdin")
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
