//! Progress bars with the time left, on a terminal only.

use std::sync::LazyLock;
use std::time::Duration;

use bevel_formats::hub;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Global;

/// All bars, so that messages can be printed between them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes read, written or fetched.
    Bytes,
    /// Tokens, tensors, repetitions.
    Items,
}

/// A bar that vanishes when it is dropped; without a terminal it is nothing.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar that ends at `total`.
    pub(crate) fn new(global: &Global, label: &str, total: u64, unit: Unit) -> Self {
        if !global.draws() {
            return Self { bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()) };
        }
        let bar = BARS.add(ProgressBar::new(total));
        let numbers = match unit {
            Unit::Bytes => "{decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}",
            Unit::Items => "{human_pos}/{human_len}",
        };
        let template = format!("{{prefix}} [{{bar:28}}] {numbers}  {{eta}} left  {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(label.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar }
    }

    /// Moves to `position`.
    pub(crate) fn set(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// Sets the total, where it was not known before.
    pub(crate) fn set_total(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Text behind the numbers.
    pub(crate) fn message(&self, text: impl Into<String>) {
        self.bar.set_message(text.into());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Runs `print` while no bar is on the screen.
pub(crate) fn suspend(print: impl FnOnce()) {
    BARS.suspend(print);
}

/// The progress of fetching a model.
pub(crate) struct Fetch<'a> {
    global: &'a Global,
    bar: Option<Progress>,
    position: u64,
}

impl<'a> Fetch<'a> {
    pub(crate) fn new(global: &'a Global) -> Self {
        Self { global, bar: None, position: 0 }
    }
}

impl hub::Progress for Fetch<'_> {
    fn start(&mut self, file: &str, total: Option<u64>, resumed: u64) {
        if !self.global.draws() {
            self.global.note(format!("fetching {file}"));
        }
        let bar = Progress::new(self.global, file, total.unwrap_or(0), Unit::Bytes);
        bar.set(resumed);
        self.position = resumed;
        self.bar = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        self.position += bytes;
        if let Some(bar) = &self.bar {
            bar.set(self.position);
        }
    }

    fn finish(&mut self) {
        self.bar = None;
    }

    fn note(&mut self, message: &str) {
        self.global.note(message);
    }
}
