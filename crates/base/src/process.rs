//! What a program sets for its process; a library leaves its host's alone.

#[cfg(unix)]
use std::sync::OnceLock;

/// Has the allocator keep what is freed for the next buffer, up to 256 MB; those of 32 MB and more go
/// back to the system at once. glibc alone gives everything back when the heap's end is free, and a
/// solver, whose matrices are some MB large, then spends a tenth of its time on having the same pages
/// zeroed again. Elsewhere than with glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` changes settings of the allocator, with its own locking.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
        libc::mallopt(libc::M_TOP_PAD, 16 << 20);
    }
}

/// Makes a file that grows past the limit of `ulimit -f` an error of the write, which cleans up and
/// says so, where the system would end the process and leave what it had written.
pub fn refuse_writes_past_the_limit() {
    #[cfg(unix)]
    // SAFETY: ignoring a signal installs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Has all threads allocate from two pools. With one for each thread, as glibc has them, what one thread frees is no
/// other's, and a server with threads that come and go holds half as much again and grows for hours. To be called
/// before threads are started; elsewhere than on Linux with glibc it does nothing.
pub fn share_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` changes settings of the allocator, with its own locking.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives memory that was freed back to the system, which allocators put off. Elsewhere than on Linux with
/// glibc it does nothing.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call concerns memory only that nobody owns.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets this process have as many files and connections open as the system allows it to ask for, not only as
/// many as it begins with: often 1,024. Where that is refused, nothing changes.
pub fn raise_file_limit() {
    #[cfg(unix)]
    // SAFETY: the calls read and write the structure on the stack, which is initialised.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max
        {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

#[cfg(unix)]
static TERMINATION: OnceLock<fn() -> bool> = OnceLock::new();

/// Lets a program clean up when the system asks it to end (SIGTERM). `is_handled` is called in the
/// middle of anything and may do no more than look at atomic variables and set them; where it gives
/// false the program ends at once, as it would without. The first call counts, and there is no other
/// way back. Elsewhere than on Unix it does nothing.
pub fn on_termination(is_handled: fn() -> bool) {
    #[cfg(unix)]
    if TERMINATION.set(is_handled).is_ok() {
        let handler: extern "C" fn(libc::c_int) = terminate;
        // SAFETY: `terminate` does only what a signal handler may: it looks at atomic variables, resets
        // a signal and raises it.
        unsafe {
            libc::signal(libc::SIGTERM, handler as libc::sighandler_t);
        }
    }
    #[cfg(not(unix))]
    let _ = is_handled;
}

#[cfg(unix)]
extern "C" fn terminate(signal: libc::c_int) {
    if !TERMINATION.get().is_some_and(|is_handled| is_handled()) {
        // SAFETY: both may be called in a signal handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
}
