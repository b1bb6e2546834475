use std::fmt::Write;

use super::{Share, escape};
use crate::ui::units::bytes;

/// Colours in `page.css`.
const COLOURS: usize = 10;

/// A model as a bar.
pub(super) struct Bar<'a> {
    pub(super) name: &'a str,
    pub(super) shares: &'a [Share],
}

/// For each model a bar as long as it is large, divided by the types of its tensors.
pub(super) fn html(bars: &[Bar<'_>]) -> String {
    let mut formats: Vec<&str> = Vec::new();
    for share in bars.iter().flat_map(|bar| bar.shares) {
        if !formats.contains(&share.format.as_str()) {
            formats.push(&share.format);
        }
    }
    let colour = |format: &str| formats.iter().position(|f| *f == format).unwrap_or(0) % COLOURS;
    let size = |bar: &Bar<'_>| bar.shares.iter().map(|share| share.bytes).sum::<u64>();
    let largest = bars.iter().map(size).max().unwrap_or(1).max(1);

    let mut out = String::from("<h2>Bytes by type</h2>\n<p class=\"legend\">");
    for format in &formats {
        let _ = write!(out, "<span><i class=\"c{}\"></i>{}</span>", colour(format), escape(format));
    }
    out += "</p>\n<div class=\"bars\">\n";
    for bar in bars {
        let _ = write!(out, "<span>{}</span><div class=\"bar\">", escape(bar.name));
        for share in bar.shares {
            let _ = write!(
                out,
                "<i class=\"c{}\" style=\"width:{:.3}%\" title=\"{}: {} tensors, {}\"></i>",
                colour(&share.format),
                100.0 * share.bytes as f64 / largest as f64,
                escape(&share.format),
                share.tensors,
                bytes(share.bytes)
            );
        }
        let _ = writeln!(out, "</div><span class=\"size\">{}</span>", bytes(size(bar)));
    }
    out + "</div>\n"
}
