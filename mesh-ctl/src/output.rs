//! Table, JSON or YAML; errors; exit codes.

use std::process::ExitCode;

use serde::Serialize;

use crate::ask::AskError;
use crate::cli::Format;
use crate::table::{Table, Tone};

/// How a command ended; scripts rely on the numbers. Of several the greatest wins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Fine; allowed.
    #[default]
    Fine = 0,
    /// Denied, unreachable or unhealthy.
    No = 1,
    /// Wrong usage, or a name that nothing has.
    Usage = 2,
    /// A node or the control plane could not be asked.
    Unreachable = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What a process leaves behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// For standard error.
    pub errors: String,
    /// The exit code.
    pub exit: Exit,
}

/// A part of what is shown to people.
#[derive(Debug, Clone)]
pub enum Block {
    /// A line.
    Line(Tone, String),
    /// A table.
    Table(Table),
    /// An empty line.
    Gap,
}

/// What a command found, before it is known whether the terminal has colours.
#[derive(Debug, Default)]
pub struct Report {
    document: Option<String>,
    blocks: Vec<Block>,
    errors: Vec<String>,
    exit: Exit,
}

impl Report {
    /// Shows `data` in full as JSON or YAML, or the blocks as a table.
    pub fn new(format: Format, data: &impl Serialize, blocks: impl FnOnce() -> Vec<Block>) -> Self {
        let document = match format {
            Format::Table => return Self { blocks: blocks(), ..Self::default() },
            Format::Json => {
                serde_json::to_string_pretty(data).map(|text| text + "\n").map_err(|e| e.to_string())
            }
            Format::Yaml => serde_saphyr::to_string(data).map_err(|e| e.to_string()),
            Format::Hubble => {
                return Self::failed(
                    Exit::Usage,
                    "-o hubble is for `meshctl flows` and `meshctl trace` only",
                );
            }
        };
        match document {
            Ok(document) => Self { document: Some(document), ..Self::default() },
            Err(error) => {
                Self::failed(Exit::Usage, format!("cannot write the answer in this format: {error}"))
            }
        }
    }

    /// Text as it is, for scripts.
    pub fn text(document: String) -> Self {
        Self { document: Some(document), ..Self::default() }
    }

    /// Nothing but an error.
    pub fn failed(exit: Exit, error: impl Into<String>) -> Self {
        Self { errors: vec![error.into()], exit, ..Self::default() }
    }

    /// Adds an error; the exit code becomes at least that.
    #[must_use]
    pub fn error(mut self, exit: Exit, error: impl Into<String>) -> Self {
        self.errors.push(error.into());
        self.exit(exit)
    }

    /// Adds endpoints that did not answer; the exit code becomes at least that, if there are any.
    #[must_use]
    pub fn unanswered(mut self, exit: Exit, errors: &[AskError]) -> Self {
        for error in errors {
            self = self.error(exit, error.to_string());
        }
        self
    }

    /// The exit code becomes at least that.
    #[must_use]
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = self.exit.max(exit);
        self
    }

    /// Renders everything.
    #[must_use]
    pub fn finish(self, colour: bool) -> Answer {
        let mut text = self.document.unwrap_or_default();
        for block in self.blocks {
            match block {
                Block::Line(tone, line) => text.push_str(&(tone.paint(&line, colour) + "\n")),
                Block::Table(table) => text.push_str(&table.render(colour)),
                Block::Gap => text.push('\n'),
            }
        }
        // An error may have a second line with the fix; escape codes from a server must not get through.
        let clean = |line: &str| Tone::Plain.paint(line, false);
        let error = |e: &String| {
            let lines: Vec<String> = e.lines().map(clean).collect();
            format!("error: {}\n", lines.join("\n"))
        };
        let errors = self.errors.iter().map(error).collect();
        Answer { text, errors, exit: self.exit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_of_data_is_json_yaml_or_a_table() {
        let data = serde_json::json!([{"name": "a: b", "n": 1}]);
        let print = |format| {
            let table = || vec![Block::Line(Tone::Title, "a".into()), Block::Gap];
            Report::new(format, &data, table).finish(false).text
        };
        assert_eq!(serde_json::from_str::<serde_json::Value>(&print(Format::Json)).unwrap(), data);
        assert_eq!(serde_saphyr::from_str::<serde_json::Value>(&print(Format::Yaml)).unwrap(), data);
        assert_eq!(print(Format::Table), "a\n\n");
    }

    #[test]
    fn of_several_exit_codes_the_greatest_wins() {
        let report =
            Report::text(String::new()).exit(Exit::Unreachable).exit(Exit::No).error(Exit::Fine, "x");
        assert_eq!(report.finish(false).exit, Exit::Unreachable);
    }
}
