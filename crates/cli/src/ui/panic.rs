//! A panic is a defect of bevel, and says so in one line.

use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};

/// Replaces the standard message. `RUST_BACKTRACE=1` brings it back.
pub(crate) fn install() {
    if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
        return;
    }
    std::panic::set_hook(Box::new(report));
}

fn report(info: &PanicHookInfo<'_>) {
    // A panic in a worker thread becomes one in the main thread; the first tells more.
    static REPORTED: AtomicBool = AtomicBool::new(false);
    if REPORTED.swap(true, Ordering::Relaxed) {
        return;
    }
    let what = info.payload_as_str().unwrap_or("a panic without a message");
    let place = info.location().map(|l| format!(" ({l})")).unwrap_or_default();
    eprintln!(
        "error: this is a bug in bevel, please report it with the command and the model: {what}{place}"
    );
}
