//! Plain tables: columns aligned, two spaces between them.

use std::fmt;

use super::plain;

/// Rows of cells below a heading.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// For each column whether it is text, aligned left; numbers are aligned right.
    left: Vec<bool>,
}

impl Table {
    /// A table with these headings. A heading that begins with `<` marks a column of text.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let left = headings.iter().map(|h| h.starts_with('<')).collect();
        let headings = headings.iter().map(|h| h.trim_start_matches('<').to_owned()).collect();
        Self { rows: vec![headings], left }
    }

    /// Adds a row, one cell a column. Control characters in it are spelt out.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> =
            cells.into_iter().map(|cell| plain(&cell).replace('\n', "\\n")).collect();
        assert_eq!(cells.len(), self.left.len(), "one cell a column");
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.left.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &width), &left) in row.iter().zip(&widths).zip(&self.left) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                line += &if left { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["<type", "size"]);
        table.row(["Q8_0".to_owned(), "9 MB".to_owned()]);
        table.row(["F32".to_owned(), "117 MB".to_owned()]);
        assert_eq!(table.to_string(), "type    size\nQ8_0    9 MB\nF32   117 MB\n");
    }
}
