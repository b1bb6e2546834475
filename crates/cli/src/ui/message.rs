//! Notes, warnings and errors on stderr; results on stdout.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

use super::interrupt::{self, Interrupted};
use super::progress;
use crate::args::{Color, Global};

impl Global {
    /// A line on stderr, unless `-q`.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            print(&plain(text.as_ref()));
        }
    }

    /// A line on stderr with `-v`.
    pub(crate) fn detail(&self, text: impl AsRef<str>) {
        if self.verbose {
            print(&plain(text.as_ref()));
        }
    }

    /// Something that went otherwise than asked for; `-q` does not hide it.
    pub(crate) fn warn(&self, text: impl AsRef<str>) {
        print(&format!("{} {}", self.paint("33;1", "warning:"), plain(text.as_ref())));
    }

    /// True where bars and colours may be drawn on stderr.
    pub(crate) fn draws(&self) -> bool {
        !self.quiet && !self.json && io::stderr().is_terminal()
    }

    /// `text` in an ANSI style, where stderr takes colours.
    pub(crate) fn paint(&self, style: &str, text: &str) -> String {
        let paints = match self.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                io::stderr().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        if paints { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// The seed asked for, or a random one, which `-v` shows.
    pub(crate) fn seed_or_random(&self) -> u64 {
        use std::hash::{BuildHasher, Hasher};
        self.seed.unwrap_or_else(|| {
            let seed = std::hash::RandomState::new().build_hasher().finish() >> 32;
            self.detail(format!("seed {seed}"));
            seed
        })
    }
}

fn print(text: &str) {
    progress::suspend(|| {
        // Nobody is left to be told that stderr is closed.
        let _ = writeln!(io::stderr(), "{text}");
    });
}

/// Prints a result for people.
pub(crate) fn print_text(text: &str) -> anyhow::Result<()> {
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Prints the one JSON object of `--json`.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(io::stdout(), "{text}")?;
    Ok(())
}

/// Reports how the program ended.
pub(crate) fn exit_code(
    global: &Global,
    outcome: std::thread::Result<anyhow::Result<()>>,
) -> ExitCode {
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<Interrupted>() => ExitCode::from(interrupt::exit_code()),
        // The reader of our output, `head` for example, has seen enough.
        Ok(Err(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // Whatever fails with a file names it.
            let is_bare = error.chain().len() == 1 && error.is::<io::Error>();
            let error = if is_bare { error.context("cannot write to stdout") } else { error };
            print(&format!("{} {}", global.paint("31;1", "error:"), plain(&sentence(&error))));
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    kind == Some(io::ErrorKind::BrokenPipe)
}

/// A text in which control characters are spelt out: names and values in a file must not steer the
/// terminal. Line ends stay.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n';
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut spelt = String::new();
    for c in text.chars() {
        if steers(c) { spelt.extend(c.escape_default()) } else { spelt.push(c) }
    }
    Cow::Owned(spelt)
}

/// An error with its causes, those left out that are part of what was said before.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        let words = cause.split(" (os error").next().unwrap_or(&cause).to_lowercase();
        if text.is_empty() {
            text = cause;
        } else if !text.to_lowercase().contains(&words) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let io = || io::Error::new(io::ErrorKind::NotFound, "gone");
        let told = anyhow::Error::new(io()).context("cannot read `a`: gone");
        assert_eq!(sentence(&told), "cannot read `a`: gone");
        let system = io::Error::from_raw_os_error(2);
        let reworded = system.to_string().split(" (os").next().unwrap().to_lowercase();
        let told = anyhow::Error::new(system).context(reworded.clone());
        assert_eq!(sentence(&told), reworded);
        let untold = anyhow::Error::new(io()).context("cannot read `a`");
        assert_eq!(sentence(&untold), "cannot read `a`: gone");
    }

    #[test]
    fn names_do_not_steer_the_terminal() {
        assert_eq!(plain("a `é\n` b"), "a `é\n` b");
        assert_eq!(plain("\x1b[2Ja\0\u{9b}"), "\\u{1b}[2Ja\\u{0}\\u{9b}");
    }
}
