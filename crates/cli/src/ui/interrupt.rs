//! Ctrl-C. A verb that knows how to stop asks for it with [`handle`] and looks at [`requested`];
//! everywhere else, and at a second Ctrl-C, the program ends at once.

use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code of a program that Ctrl-C ended.
pub(crate) const EXIT_CODE: u8 = 130;

static HANDLED: AtomicBool = AtomicBool::new(false);
static REQUESTED: AtomicBool = AtomicBool::new(false);

/// The error of a verb that Ctrl-C ended: nothing more is printed, and the exit code says it.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped by Ctrl-C")
    }
}

impl std::error::Error for Interrupted {}

/// Takes the signal over from the system.
pub(crate) fn install() {
    // Without a handler Ctrl-C still ends the program, so a refusal needs no message.
    let _ = ctrlc::set_handler(|| {
        if !HANDLED.load(Ordering::SeqCst) || REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(EXIT_CODE));
        }
    });
}

/// While this lives, the first Ctrl-C is a request.
#[must_use]
pub(crate) struct Handler(());

/// Begins to handle Ctrl-C; an older request is forgotten.
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

/// True once Ctrl-C was pressed.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
