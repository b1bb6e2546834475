/// Makes a file that grows past the limit of `ulimit -f` an error of the write, which cleans up and
/// says so, where the system would end the process and leave what it had written. For programs; a
/// library leaves its host's signals alone.
pub fn refuse_writes_past_the_limit() {
    #[cfg(unix)]
    // SAFETY: ignoring a signal installs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
