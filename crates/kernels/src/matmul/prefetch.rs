//! Asking memory for weights before they are needed.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Asks for what lies `ahead` bytes after some numbers, a cache line for each of theirs.
///
/// What the processor fetches by itself it fetches up to the page's end, and a kernel that works on its
/// numbers for long has few reads under way: with this, products with one token take up to half as much
/// less time. From 4 KiB on the distance matters little.
#[inline(always)]
pub(super) fn fetch_ahead(numbers: &[u8], ahead: usize) {
    for line in numbers.chunks(64) {
        // SAFETY: a prefetch has no effect but on time, at whatever address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(ahead).cast()) };
    }
}
