//! Ctrl-C, and the system's request to end (SIGTERM). A verb that knows how to stop asks for it with
//! [`handle`] and looks at [`requested`]; everywhere else, and at a second signal, the program ends at
//! once.

use std::sync::atomic::{AtomicBool, Ordering};

/// Exit codes of a program that Ctrl-C, or the system, ended.
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

static HANDLED: AtomicBool = AtomicBool::new(false);
static REQUESTED: AtomicBool = AtomicBool::new(false);
static BY_SYSTEM: AtomicBool = AtomicBool::new(false);

/// The error of a verb that a signal ended: nothing more is printed, and the exit code says it.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped by Ctrl-C or the system")
    }
}

impl std::error::Error for Interrupted {}

/// The exit code of a verb that a signal ended.
pub(crate) fn exit_code() -> u8 {
    if BY_SYSTEM.load(Ordering::SeqCst) { TERMINATED } else { INTERRUPTED }
}

/// Takes the signals over from the system.
pub(crate) fn install() {
    bevel_base::on_termination(|| {
        BY_SYSTEM.store(true, Ordering::SeqCst);
        HANDLED.load(Ordering::SeqCst) && !REQUESTED.swap(true, Ordering::SeqCst)
    });
    // Without a handler Ctrl-C still ends the program, so a refusal needs no message.
    let _ = ctrlc::set_handler(|| {
        if !HANDLED.load(Ordering::SeqCst) || REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    });
}

/// While this lives, the first signal is a request.
#[must_use]
pub(crate) struct Handler(());

/// Begins to handle signals; an older request is forgotten.
pub(crate) fn handle() -> Handler {
    REQUESTED.store(false, Ordering::SeqCst);
    HANDLED.store(true, Ordering::SeqCst);
    Handler(())
}

impl Drop for Handler {
    fn drop(&mut self) {
        HANDLED.store(false, Ordering::SeqCst);
    }
}

/// True once a signal asked for it.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
