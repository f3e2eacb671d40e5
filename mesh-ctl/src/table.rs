//! Tables that line up, and colour where it means something.

/// What a text means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Tone {
    /// Nothing in particular.
    #[default]
    Plain,
    /// As it should be.
    Good,
    /// Worth a look.
    Warn,
    /// Broken, or denied.
    Bad,
    /// A title.
    Title,
}

impl Tone {
    fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Good => Some("32"),
            Self::Warn => Some("33"),
            Self::Bad => Some("31"),
            Self::Title => Some("1"),
        }
    }

    /// The text with the terminal's colour around it. Text comes from servers: control characters, which could
    /// steer the terminal, become spaces.
    #[must_use]
    pub fn paint(self, text: &str, colour: bool) -> String {
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        match self.code().filter(|_| colour && !text.is_empty()) {
            Some(code) => format!("\x1b[{code}m{text}\x1b[0m"),
            None => text,
        }
    }
}

/// One cell. An empty one is shown as `-`, so that columns stay countable for `awk`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A text with a meaning.
    pub fn new(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }
}

impl Cell {
    /// Its text and what it means.
    #[must_use]
    pub fn into_parts(self) -> (String, Tone) {
        (self.text, self.tone)
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// Column titles and rows of as many cells.
#[derive(Debug, Clone, Default)]
pub struct Table {
    titles: Vec<&'static str>,
    rows: Vec<Row>,
}

#[derive(Debug, Clone)]
enum Row {
    Cells(Vec<Cell>),
    /// Belongs to the last column of the row before it.
    More(Cell),
}

impl Table {
    /// An empty table.
    #[must_use]
    pub fn new(titles: &[&'static str]) -> Self {
        Self { titles: titles.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, surplus ones are left out.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let mut cells: Vec<Cell> = cells.into_iter().collect();
        cells.resize(self.titles.len(), Cell::default());
        self.rows.push(Row::Cells(cells));
    }

    /// Adds a line below the last column of the last row.
    pub fn more(&mut self, cell: impl Into<Cell>) {
        self.rows.push(Row::More(cell.into()));
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as lines: columns as wide as their widest cell, two spaces apart, no space at the end of a line.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let mut widths: Vec<usize> = self.titles.iter().map(|title| title.chars().count()).collect();
        for row in &self.rows {
            let Row::Cells(cells) = row else { continue };
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(shown(cell).chars().count());
            }
        }
        let last = widths.len().saturating_sub(1);
        let indent: usize = widths.iter().take(last).map(|width| width + 2).sum();
        let line = |cells: &[Cell]| {
            let mut line = String::new();
            for (i, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                let text = shown(cell);
                line.push_str(&cell.tone.paint(text, colour));
                if i < last {
                    line.extend(std::iter::repeat_n(' ', width + 2 - text.chars().count()));
                }
            }
            line.push('\n');
            line
        };
        let titles: Vec<Cell> = self.titles.iter().map(|title| Cell::new(*title, Tone::Title)).collect();
        let mut out = line(&titles);
        for row in &self.rows {
            match row {
                Row::Cells(cells) => out.push_str(&line(cells)),
                Row::More(cell) => {
                    out.extend(std::iter::repeat_n(' ', indent));
                    out.push_str(&cell.tone.paint(&cell.text, colour));
                    out.push('\n');
                }
            }
        }
        out
    }
}

fn shown(cell: &Cell) -> &str {
    if cell.text.is_empty() { "-" } else { &cell.text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let mut table = Table::new(&["NAME", "STATE", "DETAIL"]);
        table.row(["frontend-7d".into(), Cell::new("ok", Tone::Good), "fine".into()]);
        table.row(["größer".into(), "".into()]);
        table.more("fix: nothing");
        let expected = "\
NAME         STATE  DETAIL
frontend-7d  ok     fine
größer       -      -
                    fix: nothing
";
        assert_eq!(table.render(false), expected);
    }

    #[test]
    fn colour_does_not_move_columns() {
        let mut table = Table::new(&["A", "B"]);
        table.row([Cell::new("bad", Tone::Bad), "x".into()]);
        let coloured = table.render(true);
        assert!(coloured.contains("\x1b[31mbad\x1b[0m  x\n"), "{coloured:?}");
        let mut bare = coloured;
        for code in ["\x1b[31m", "\x1b[1m", "\x1b[0m"] {
            bare = bare.replace(code, "");
        }
        assert_eq!(bare, table.render(false));
    }

    #[test]
    fn text_from_a_server_cannot_steer_the_terminal() {
        let mut table = Table::new(&["A"]);
        table.row(["x\x1b[2Jy\nz".into()]);
        assert_eq!(table.render(true).lines().nth(1), Some("x [2Jy z"));
    }
}
