use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Zeroed bytes on a 64-byte boundary whose allocation may be refused.
pub(super) struct Memory {
    /// The allocation: `len` bytes and room to align them.
    raw: NonNull<u8>,
    /// Bytes before the boundary.
    skip: usize,
    len: usize,
}

const ALIGN: usize = 64;

impl Memory {
    /// `len` zeros, `None` where the system refuses them.
    pub(super) fn zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self { raw: NonNull::<[u64; 8]>::dangling().cast(), skip: 0, len });
        }
        // Small alignment: for a large one the standard allocator writes the zeros itself, while
        // here untouched pages are to cost nothing.
        // SAFETY: the size is not zero.
        let raw = NonNull::new(unsafe { alloc_zeroed(Self::layout(len)?) })?;
        Some(Self { raw, skip: raw.as_ptr().align_offset(ALIGN), len })
    }

    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len.checked_add(ALIGN)?, 8).ok()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `skip` + `len` zeroed bytes were allocated at `raw`.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr().add(self.skip), self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.raw.as_ptr().add(self.skip), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.len != 0 {
            let layout = Self::layout(self.len).expect("checked in `zeroed`");
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.raw.as_ptr(), layout) }
        }
    }
}

// SAFETY: the bytes are owned, as a `Vec<u8>`'s are.
unsafe impl Send for Memory {}
// SAFETY: shared access only reads.
unsafe impl Sync for Memory {}
