//! Codes of a few bits, one after another from the lowest bit of 32-bit words on. Where the width
//! does not divide 32, codes straddle words: 32 codes take as many words as a code has bits.

/// The words that `len` codes take; `None` where the count overflows.
pub(super) fn words(len: usize, bits: u32) -> Option<usize> {
    Some(len.checked_mul(bits as usize)?.div_ceil(32))
}

/// Takes codes from words until `out` is full; words that are missing count as zero.
#[inline]
pub(super) fn unpack(words: impl IntoIterator<Item = u32>, bits: u32, out: &mut [u8]) {
    let mut words = words.into_iter();
    let (mut buffer, mut held) = (0u64, 0);
    let mask = (1u64 << bits) - 1;
    for code in out {
        if held < bits {
            buffer |= u64::from(words.next().unwrap_or(0)) << held;
            held += 32;
        }
        *code = (buffer & mask) as u8;
        buffer >>= bits;
        held -= bits;
    }
}

/// Puts codes into words, as many as [`words`] says.
#[inline]
pub(super) fn pack(codes: impl IntoIterator<Item = u8>, bits: u32, mut word: impl FnMut(u32)) {
    let (mut buffer, mut held) = (0u64, 0);
    for code in codes {
        buffer |= u64::from(code) << held;
        held += bits;
        if held >= 32 {
            word(buffer as u32);
            buffer >>= 32;
            held -= 32;
        }
    }
    if held > 0 {
        word(buffer as u32);
    }
}
