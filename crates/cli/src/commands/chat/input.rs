//! Messages typed at a terminal, with line editing and history, or read from a pipe.

use std::io::{self, BufRead, IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use crate::text::MOST;

/// Where messages come from.
pub(super) struct Input {
    /// `None` for a pipe.
    editor: Option<DefaultEditor>,
    history: PathBuf,
}

impl Input {
    /// The terminal, if stdin and stdout are one; earlier lines are read from `history`.
    pub(super) fn new(history: PathBuf) -> Self {
        let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
        let config = Config::builder()
            .max_history_size(1000)
            .map_or_else(|_| Config::default(), |builder| builder.auto_add_history(false).build());
        let mut editor = is_terminal.then(|| DefaultEditor::with_config(config).ok()).flatten();
        if let Some(editor) = &mut editor {
            // The first time there is none.
            let _ = editor.load_history(&history);
        }
        Self { editor, history }
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.editor.is_some()
    }

    /// The next message, its lines joined; `None` at the end of the input.
    pub(super) fn read(&mut self) -> Result<Option<String>> {
        let Some(first) = self.line("> ")? else { return Ok(None) };
        let mut message = Message::begin(&first);
        while !message.complete {
            match self.line("… ")? {
                Some(line) => message.add(&line),
                None => break,
            }
        }
        if let Some(editor) = &mut self.editor
            && !message.text.trim().is_empty()
        {
            let _ = editor.add_history_entry(message.text.as_str());
        }
        Ok(Some(message.text))
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        let Some(editor) = &mut self.editor else { return pipe_line() };
        loop {
            match editor.readline(prompt) {
                Ok(line) => return Ok(Some(line)),
                Err(ReadlineError::Eof) => return Ok(None),
                Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /exit ends)"),
                Err(error) => return Err(error).context("cannot read from the terminal"),
            }
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Some(editor) = &mut self.editor {
            // A conversation is worth more than its history: an unwritable cache is no error.
            if let Some(dir) = self.history.parent() {
                let _ = std::fs::create_dir_all(dir);
            }
            let _ = editor.save_history(&self.history);
        }
    }
}

/// A line of a pipe, without its end.
fn pipe_line() -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let mut stdin = io::stdin().lock().take(MOST);
    if stdin.read_until(b'\n', &mut bytes).context("cannot read stdin")? == 0 {
        return Ok(None);
    }
    ensure!(stdin.limit() > 0, "a line of stdin has {MOST} bytes and more");
    while bytes.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
        bytes.pop();
    }
    match String::from_utf8(bytes) {
        Ok(line) => Ok(Some(line)),
        Err(_) => bail!("a line of stdin is not UTF-8 text"),
    }
}

/// A message that may take several lines.
struct Message {
    text: String,
    in_block: bool,
    complete: bool,
}

const QUOTES: &str = "\"\"\"";

impl Message {
    fn begin(line: &str) -> Self {
        let mut message = Self { text: String::new(), in_block: false, complete: false };
        match line.trim_start().strip_prefix(QUOTES) {
            Some(rest) => {
                message.in_block = true;
                // Quotes alone in their line belong to no line of the text.
                if !rest.trim().is_empty() {
                    message.add(rest);
                }
            }
            None => message.add(line),
        }
        message
    }

    fn add(&mut self, line: &str) {
        if self.in_block {
            match line.trim_end().strip_suffix(QUOTES) {
                Some(last) => {
                    self.complete = true;
                    self.text += last;
                    if last.is_empty() && self.text.ends_with('\n') {
                        self.text.pop();
                    }
                }
                None => {
                    self.text += line;
                    self.text.push('\n');
                }
            }
        } else if let Some(line) = line.strip_suffix('\\') {
            self.text += line;
            self.text.push('\n');
        } else {
            self.text += line;
            self.complete = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lines: &[&str], expected: &str, complete: bool) {
        let mut message = Message::begin(lines[0]);
        for line in &lines[1..] {
            assert!(!message.complete, "before {line:?}");
            message.add(line);
        }
        assert_eq!((message.text.as_str(), message.complete), (expected, complete));
    }

    #[test]
    fn several_lines() {
        check(&["hello"], "hello", true);
        check(&["a \\", "b\\", "c"], "a \nb\nc", true);
        check(&["\"\"\"", "a", "", "b", "\"\"\""], "a\n\nb", true);
        check(&["\"\"\"a", "b\"\"\""], "a\nb", true);
        check(&["\"\"\"one line\"\"\""], "one line", true);
        check(&["\"\"\"", "a\\"], "a\\\n", false);
        check(&["say \"\"\" twice"], "say \"\"\" twice", true);
    }
}
