//! GPT-2's alphabet: one printable character for every byte.

use std::sync::LazyLock;

/// The character that stands for each byte: printable Latin-1 for itself, the other 68 bytes in
/// order from U+0100.
static CHARACTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100_u32;
    std::array::from_fn(|byte| match byte as u8 {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte as u8),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("68 characters from U+0100 are all assigned")
        }
    })
});

/// The byte that `character` stands for.
fn byte(character: char) -> Option<u8> {
    static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
        let mut bytes = [None; 0x144];
        for (byte, &character) in CHARACTERS.iter().enumerate() {
            bytes[character as usize] = Some(byte as u8);
        }
        bytes
    });
    BYTES.get(character as usize).copied().flatten()
}

/// The bytes `text` spells in GPT-2's alphabet; `None` where a character is not of it.
pub(super) fn from_byte_level(text: &str) -> Option<Vec<u8>> {
    text.chars().map(byte).collect()
}

/// The byte that a SentencePiece token such as `<0x0A>` names.
pub(super) fn from_byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}
