//! What the user sees: results on stdout, everything else on stderr.

pub(crate) mod interrupt;
mod message;
pub(crate) mod panic;
pub(crate) mod progress;
pub(crate) mod table;
pub(crate) mod units;

pub(crate) use message::{exit_code, plain, print_json, print_text};
