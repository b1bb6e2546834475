use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A fixed-length, zero-initialised buffer whose first element lies on a 64-byte boundary: the
/// width of a cache line and of the widest vector register.
///
/// Large buffers take memory only where they are written: the zeros are the system's own pages.
pub struct AlignedVec<T: bytemuck::Pod> {
    /// The first element.
    ptr: NonNull<T>,
    len: usize,
    /// What was allocated: `ALIGN` bytes more than the elements need, the first one's place within.
    allocation: NonNull<u8>,
}

const ALIGN: usize = 64;

impl<T: bytemuck::Pod> AlignedVec<T> {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 || size_of::<T>() == 0 {
            return Self { ptr: NonNull::dangling(), len, allocation: NonNull::dangling() };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero (checked above).
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(raw) else { handle_alloc_error(layout) };
        let offset = raw.align_offset(ALIGN);
        // SAFETY: the offset is less than `ALIGN`, by which the allocation is longer than needed.
        let ptr = unsafe { allocation.add(offset) }.cast::<T>();
        Self { ptr, len, allocation }
    }

    /// The allocator is asked for a small alignment: for a large one it would write the zeros itself.
    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(ALIGN));
        Layout::from_size_align(bytes.expect("buffer length overflows"), align_of::<T>())
            .expect("buffer length overflows")
    }
}

impl<T: bytemuck::Pod> Default for AlignedVec<T> {
    /// Nothing.
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: bytemuck::Pod> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if self.len != 0 && size_of::<T>() != 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.allocation.as_ptr(), Self::layout(self.len)) }
        }
    }
}

impl<T: bytemuck::Pod> Deref for AlignedVec<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were allocated, zeroed, and `T: Pod` accepts every bit pattern.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: bytemuck::Pod> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: bytemuck::Pod> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: bytemuck::Pod> From<&[T]> for AlignedVec<T> {
    fn from(values: &[T]) -> Self {
        let mut copy = Self::zeroed(values.len());
        copy.copy_from_slice(values);
        copy
    }
}

impl<T: bytemuck::Pod + std::fmt::Debug> std::fmt::Debug for AlignedVec<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

// SAFETY: the buffer owns its elements like a `Vec` does; `Pod` types are `Send + Sync` data.
unsafe impl<T: bytemuck::Pod + Send> Send for AlignedVec<T> {}
// SAFETY: shared access gives only `&[T]`.
unsafe impl<T: bytemuck::Pod + Sync> Sync for AlignedVec<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_whole() {
        for len in [0, 1, 7, 64, 1000, 1 << 20] {
            let mut buffer = AlignedVec::<f32>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(len == 0 || (buffer.as_ptr() as usize).is_multiple_of(64));
            assert!(buffer.iter().all(|&x| x == 0.0));
            buffer.fill(1.0);
            assert_eq!(buffer.clone().iter().sum::<f32>(), len as f32);
        }
    }
}
