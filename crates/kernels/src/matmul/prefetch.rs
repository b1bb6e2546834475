//! Asking memory for weights before they are needed.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// How far ahead: a page of 4 KiB. What the processor fetches by itself it fetches up to the page's end,
/// and nearer ones come no sooner; of 1 to 12 KiB the fastest, if by little.
const AHEAD: usize = 4096;

/// Asks for the codes that lie [`AHEAD`] of `registers`, a group's codes of `bits` bits each, while a
/// kernel multiplies with `tokens` tokens.
///
/// A kernel that works on a group for long has few reads under way, as it is, and takes up to half as
/// long again. One that does little else than read, 8-bit codes with a token or two, is as fast as the
/// processor fetches by itself, and slower with this.
#[inline(always)]
pub(super) fn fetch_ahead(registers: &[[u8; 64]], bits: usize, tokens: usize) {
    if bits == 8 && tokens <= 2 {
        return;
    }
    for register in registers {
        // SAFETY: a prefetch has no effect but on time, at whatever address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(register.as_ptr().wrapping_add(AHEAD).cast()) };
    }
}
