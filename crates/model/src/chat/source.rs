//! What changes in a template's source before it is compiled.

use super::limits::KEPT;

/// Replaces two tags:
/// - `{% generation %}` … `{% endgeneration %}`, by which `transformers` marks what the assistant
///   wrote, become a scope that writes nothing;
/// - `{% set namespace.name = value %}` passes its value through the filter [`KEPT`].
///
/// Comments, raw blocks and texts in quotes stay as they are.
pub(super) fn prepare(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (text, tag) = rest.split_at(start);
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag[2..].find("#}").map(|end| end + 4),
            Some(b'{') => tag_len(tag, "}}"),
            Some(b'%') => raw_len(tag).or_else(|| tag_len(tag, "%}")),
            _ => Some(1),
        };
        // What never ends is for the compiler to complain about.
        let Some(len) = len else { break };
        let (tag, after) = tag.split_at(len);
        out.push_str(text);
        match rewritten(tag) {
            Some(tag) => out.push_str(&tag),
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Bytes up to the end of the tag that `tag` begins with. As in Jinja, the end is not looked for in
/// quotes and brackets.
fn tag_len(tag: &str, end: &str) -> Option<usize> {
    let bytes = tag.as_bytes();
    let (mut at, mut depth) = (2, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'\'' | b'"' => {
                at += quoted_len(&bytes[at..])?;
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            _ if depth == 0 && bytes[at..].starts_with(end.as_bytes()) => return Some(at + 2),
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
    None
}

/// Bytes of the text in quotes that `bytes` begins with.
fn quoted_len(bytes: &[u8]) -> Option<usize> {
    let mut at = 1;
    while *bytes.get(at)? != bytes[0] {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    Some(at + 1)
}

/// Bytes of the block `{% raw %}` … `{% endraw %}` that `text` begins with.
fn raw_len(text: &str) -> Option<usize> {
    let mut at = bare_tag_len(text, "raw")?;
    loop {
        at += text[at..].find("{%")?;
        match bare_tag_len(&text[at..], "endraw") {
            Some(len) => return Some(at + len),
            None => at += 2,
        }
    }
}

/// Bytes of the tag `{% name %}` that `text` begins with.
fn bare_tag_len(text: &str, name: &str) -> Option<usize> {
    let rest = without_sign(text.strip_prefix("{%")?).trim_start().strip_prefix(name)?;
    let rest = without_sign(rest.trim_start()).strip_prefix("%}")?;
    Some(text.len() - rest.len())
}

fn without_sign(text: &str) -> &str {
    text.strip_prefix(['-', '+']).unwrap_or(text)
}

/// The tag that takes the place of `tag`, where another one does.
fn rewritten(tag: &str) -> Option<String> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let body = without_sign(inner);
    let opening = &inner[..inner.len() - body.len()];
    let words = body.strip_suffix(['-', '+']).unwrap_or(body);
    let closing = &body[words.len()..];
    let words = match words.trim() {
        "generation" => "with".to_owned(),
        "endgeneration" => "endwith".to_owned(),
        _ => kept(words)?,
    };
    Some(format!("{{%{opening} {words} {closing}%}}"))
}

/// `set namespace.name = value` or `set namespace.name | filters`, with one filter more.
fn kept(words: &str) -> Option<String> {
    let set = words.trim_start().strip_prefix("set")?;
    let target = |c: char| c.is_alphanumeric() || c.is_whitespace() || "_.,()".contains(c);
    let end = set.find(|c| !target(c)).unwrap_or(set.len());
    let (target, value) = set.split_at(end);
    if !target.starts_with(|c: char| c.is_whitespace() || c == '(') || !target.contains('.') {
        return None;
    }
    match value.strip_prefix('=') {
        // What is no expression must not become one in brackets.
        Some(value) => is_balanced(value).then(|| format!("set{target}= ({value}) | {KEPT}")),
        None => Some(format!("set{target}{value} | {KEPT}")),
    }
}

/// Whether no bracket closes before it opens.
fn is_balanced(expression: &str) -> bool {
    let bytes = expression.as_bytes();
    let (mut at, mut depth) = (0, 0);
    while at < bytes.len() && depth >= 0 {
        match bytes[at] {
            b'\'' | b'"' => at += quoted_len(&bytes[at..]).unwrap_or(1) - 1,
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
    depth == 0
}
