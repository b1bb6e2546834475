use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use memmap2::{MmapMut, MmapOptions};

/// A zero-initialised buffer for weights, which are written once and then read from end to end for
/// every token. It lies on a 64-byte boundary in pages of 2 MiB, where the system has them.
///
/// Hardware fetches ahead of a reader up to the end of a page and each page costs a search in the page
/// table, so that one thread reads twice as fast from large pages as from pages of 4 KiB. Buffers share
/// slabs of memory: a model is hundreds of matrices, most of them smaller than such a page.
/// Memory is taken where it is written, and given back when the buffer is dropped.
pub struct SlabBytes {
    /// The first byte; `len` bytes of the slab belong to this buffer alone.
    start: NonNull<u8>,
    len: usize,
    slab: Option<Arc<Slab>>,
}

/// A stretch of memory that buffers are cut from, front to back. What is dropped is not cut again:
/// addresses are plenty.
struct Slab {
    map: MmapMut,
}

/// The slab that buffers are being cut from, and the bytes used of it.
struct Open {
    slab: Weak<Slab>,
    used: usize,
}

static OPEN: Mutex<Open> = Mutex::new(Open { slab: Weak::new(), used: 0 });

/// A cache line, which is also the widest vector register.
#[repr(align(64))]
struct Line;

const ALIGN: usize = align_of::<Line>();
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of addresses in a slab, or a multiple of these where a buffer needs more.
const SLAB: usize = 64 << 20;

impl SlabBytes {
    /// `len` zeros.
    ///
    /// # Panics
    /// Where the system refuses the addresses.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::<Line>::dangling().cast(), len, slab: None };
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let place = open.used.next_multiple_of(ALIGN);
        let (slab, place) = match open.slab.upgrade() {
            Some(slab) if place <= slab.map.len() && len <= slab.map.len() - place => (slab, place),
            _ => {
                let slab = Arc::new(Slab::with_room(len));
                open.slab = Arc::downgrade(&slab);
                // To where large pages start.
                let place = slab.map.as_ptr().align_offset(HUGE_PAGE);
                (slab, place)
            }
        };
        open.used = place + len;
        // SAFETY: the place lies inside the mapping, whose address is not zero.
        let start = unsafe { NonNull::new_unchecked(slab.map.as_ptr().add(place).cast_mut()) };
        Self { start, len, slab: Some(slab) }
    }

    /// The buffer's place in its slab.
    fn range(&self, slab: &Slab) -> Range<usize> {
        let start = self.start.as_ptr() as usize - slab.map.as_ptr() as usize;
        start..start + self.len
    }
}

impl Slab {
    /// A slab with room for a buffer of `len` bytes and for what aligns it.
    fn with_room(len: usize) -> Self {
        let bytes = len.checked_next_multiple_of(SLAB).and_then(|len| len.checked_add(HUGE_PAGE));
        let bytes = bytes.expect("buffer length overflows");
        let map = MmapOptions::new().len(bytes).map_anon().unwrap_or_else(|error| {
            panic!("the system refuses {} MiB of memory: {error}", bytes >> 20)
        });
        // A system without large pages says no; its small ones hold the same.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self { map }
    }
}

impl Drop for SlabBytes {
    fn drop(&mut self) {
        let Some(slab) = &self.slab else { return };
        // The last buffer's slab is unmapped as a whole.
        if Arc::strong_count(slab) > 1 {
            let page = crate::mapping::page_size();
            let range = self.range(slab);
            let (start, end) = (range.start.next_multiple_of(page), range.end / page * page);
            if start < end {
                #[cfg(unix)]
                // SAFETY: these pages hold bytes of this buffer only, which ends here.
                let _ = unsafe {
                    slab.map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        start,
                        end - start,
                    )
                };
            }
        }
    }
}

impl Deref for SlabBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` on are mapped while the slab lives, were zeroed by the
        // system, and belong to this buffer.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for SlabBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for SlabBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlabBytes").field("len", &self.len).finish()
    }
}

// SAFETY: the bytes are owned, as a `Vec<u8>`'s are.
unsafe impl Send for SlabBytes {}
// SAFETY: shared access gives only `&[u8]`.
unsafe impl Sync for SlabBytes {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_apart() {
        let mut buffers: Vec<SlabBytes> =
            [0, 1, 7, 64, 1000, SLAB - 5000, SLAB, SLAB + 1, 3, HUGE_PAGE]
                .map(SlabBytes::zeroed)
                .into();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!((buffer.as_ptr() as usize).is_multiple_of(ALIGN));
            assert!(buffer.iter().all(|&byte| byte == 0), "buffer {i}");
            buffer.fill(i as u8 + 1);
        }
        // Dropping one leaves its neighbours alone, and what comes after it is zero again.
        buffers.remove(4);
        buffers.remove(5);
        let fresh = SlabBytes::zeroed(5000);
        assert!(fresh.iter().all(|&byte| byte == 0));
        for (buffer, i) in buffers.iter().zip([1, 2, 3, 4, 6, 8, 9, 10]) {
            assert!(buffer.iter().all(|&byte| byte == i), "buffer {i}");
        }
    }

    #[test]
    fn slabs_of_several_threads_do_not_mix() {
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                scope.spawn(move || {
                    for round in 0..50 {
                        let mut a = SlabBytes::zeroed(10_000 + round);
                        let mut b = SlabBytes::zeroed(1 << 20);
                        a.fill(thread + 1);
                        b.fill(thread + 101);
                        assert!(a.iter().all(|&byte| byte == thread + 1));
                        assert!(b.iter().all(|&byte| byte == thread + 101));
                    }
                });
            }
        });
    }
}
