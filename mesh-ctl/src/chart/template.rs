//! The part of Helm's template language that the chart uses, on JSON values.
//!
//! Known: `{{ .a.b }}`, `$`, `$variable`, texts, numbers, `true`, `false`, parentheses, pipelines; `if`, `else if`, `else`,
//! `with`, `range` (also `range $key, $value := …`), `define`, `template`, comments, `{{-` and `-}}`; the functions in
//! [`functions`]. Everything else is an error that names the line. A test renders the chart with this and with Helm itself.

mod functions;
mod parse;
mod run;

use std::collections::BTreeMap;

use serde_json::Value;

/// Why a template cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {problem}")]
pub struct TemplateError {
    /// Name of the template's file.
    pub file: String,
    /// Line in it, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

/// Templates that know each other's definitions.
#[derive(Debug, Default)]
pub struct Templates {
    files: Vec<(String, Vec<parse::Node>)>,
    defined: BTreeMap<String, (String, Vec<parse::Node>)>,
}

impl Templates {
    /// Reads a file.
    ///
    /// # Errors
    /// What is not understood, and where.
    pub fn add(&mut self, file: &str, text: &str) -> Result<(), TemplateError> {
        let parsed = parse::parse(text).map_err(|(line, problem)| TemplateError {
            file: file.to_owned(),
            line,
            problem,
        })?;
        for (name, body) in parsed.defined {
            self.defined.insert(name, (file.to_owned(), body));
        }
        self.files.push((file.to_owned(), parsed.body));
        Ok(())
    }

    /// Renders every file with `root` as `.` and `$`.
    ///
    /// # Errors
    /// A field that is not there, a function that cannot take what it is given, and where.
    pub fn render(&self, root: &Value) -> Result<Vec<(String, String)>, TemplateError> {
        let render = |(file, body): &(String, Vec<parse::Node>)| {
            let mut out = String::new();
            run::run(self, file, body, root, &mut out)?;
            Ok((file.clone(), out))
        };
        self.files.iter().map(render).collect()
    }
}

#[cfg(test)]
mod tests;
