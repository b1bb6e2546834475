use std::path::PathBuf;

/// What can be typed besides messages.
pub(super) const HELP: &str = "\
In the conversation:
  /help           show this
  /clear          begin anew; the instructions stay
  /system TEXT    change the instructions; without TEXT, remove them
  /regen          give the last answer again, differently
  /save FILE      write the conversation as JSON
  /load FILE      go on with a saved conversation
  /stats          show tokens per second and how full the context is
  /exit           end, as Ctrl-D does
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
Ctrl-C stops an answer.";

/// A line that begins with a slash.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    Help,
    Clear,
    System(String),
    Regenerate,
    Save(PathBuf),
    Load(PathBuf),
    Stats,
    Exit,
}

impl Command {
    /// The command in `text`; `None` where it is a message. A slash followed by anything but letters
    /// (a path, a comment) begins a message.
    pub(super) fn parse(text: &str) -> Option<Result<Self, String>> {
        let text = text.trim();
        let rest = text.strip_prefix('/')?;
        let (name, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphabetic()) {
            return None;
        }
        let argument = argument.trim();
        let file = || match argument {
            "" => Err(format!("/{name} needs the name of a file")),
            path => Ok(PathBuf::from(path)),
        };
        Some(match name {
            "help" => Ok(Self::Help),
            "clear" => Ok(Self::Clear),
            "system" => Ok(Self::System(argument.to_owned())),
            "regen" => Ok(Self::Regenerate),
            "save" => file().map(Self::Save),
            "load" => file().map(Self::Load),
            "stats" => Ok(Self::Stats),
            "exit" | "quit" | "bye" => Ok(Self::Exit),
            _ => Err(format!("/{name} is no command; /help shows those there are")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes() {
        assert_eq!(Command::parse("hello /exit"), None);
        assert_eq!(Command::parse("/usr/bin is a path"), None);
        assert_eq!(Command::parse("// a comment"), None);
        assert_eq!(Command::parse(" /exit "), Some(Ok(Command::Exit)));
        assert_eq!(
            Command::parse("/system Be brief.\nBe kind."),
            Some(Ok(Command::System("Be brief.\nBe kind.".to_owned())))
        );
        assert_eq!(Command::parse("/save a b.json"), Some(Ok(Command::Save("a b.json".into()))));
        assert!(matches!(Command::parse("/save"), Some(Err(_))));
        assert!(matches!(Command::parse("/frobnicate"), Some(Err(_))));
    }
}
