use std::fmt::Write;

use super::{Variant, escape};
use crate::ui::units::bytes;

/// Colours in `page.css`.
const COLOURS: usize = 10;

/// For each variant a bar as long as it is large, divided by the types of its tensors.
pub(super) fn html(variants: &[Variant]) -> String {
    let mut formats: Vec<&str> = Vec::new();
    for share in variants.iter().flat_map(|v| &v.shares) {
        if !formats.contains(&share.format) {
            formats.push(share.format);
        }
    }
    let colour = |format: &str| formats.iter().position(|f| *f == format).unwrap_or(0) % COLOURS;
    let largest = variants.iter().map(|v| v.bytes).max().unwrap_or(1).max(1);

    let mut out = String::from("<h2>Bytes by type</h2>\n<p class=\"legend\">");
    for format in &formats {
        let _ = write!(out, "<span><i class=\"c{}\"></i>{}</span>", colour(format), escape(format));
    }
    out += "</p>\n<div class=\"bars\">\n";
    for variant in variants {
        let _ = write!(out, "<span>{}</span><div class=\"bar\">", escape(&variant.name));
        for share in &variant.shares {
            let _ = write!(
                out,
                "<i class=\"c{}\" style=\"width:{:.3}%\" title=\"{}: {} tensors, {}\"></i>",
                colour(share.format),
                100.0 * share.bytes as f64 / largest as f64,
                escape(share.format),
                share.tensors,
                bytes(share.bytes)
            );
        }
        let _ = writeln!(out, "</div><span class=\"size\">{}</span>", bytes(variant.bytes));
    }
    out + "</div>\n"
}
