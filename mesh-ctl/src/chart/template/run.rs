//! A tree and a value to text.

use serde_json::Value;

use super::parse::{Loop, Node, Operand, Pipeline};
use super::{TemplateError, Templates, functions};

/// What a template sees.
struct Scope<'a> {
    templates: &'a Templates,
    file: &'a str,
    root: &'a Value,
    variables: Vec<(String, Value)>,
}

/// Appends what `body` renders to.
pub(super) fn run(
    templates: &Templates,
    file: &str,
    body: &[Node],
    root: &Value,
    out: &mut String,
) -> Result<(), TemplateError> {
    let mut scope = Scope { templates, file, root, variables: Vec::new() };
    scope.nodes(body, root, out)
}

impl Scope<'_> {
    fn error(&self, line: usize, problem: impl Into<String>) -> TemplateError {
        TemplateError { file: self.file.to_owned(), line, problem: problem.into() }
    }

    fn nodes(&mut self, nodes: &[Node], dot: &Value, out: &mut String) -> Result<(), TemplateError> {
        nodes.iter().try_for_each(|node| self.node(node, dot, out))
    }

    fn node(&mut self, node: &Node, dot: &Value, out: &mut String) -> Result<(), TemplateError> {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Output(line, pipeline) => {
                let value = self.pipeline(*line, pipeline, dot)?;
                if value.is_null() {
                    return Err(self.error(*line, "has no value"));
                }
                out.push_str(&functions::text(&value));
            }
            Node::If(line, branches, otherwise) => {
                for (test, body) in branches {
                    if functions::truth(&self.pipeline(*line, test, dot)?) {
                        return self.nodes(body, dot, out);
                    }
                }
                self.nodes(otherwise, dot, out)?;
            }
            Node::With(line, subject, body, otherwise) => {
                let value = self.pipeline(*line, subject, dot)?;
                if functions::truth(&value) {
                    self.nodes(body, &value, out)?;
                } else {
                    self.nodes(otherwise, dot, out)?;
                }
            }
            Node::Range(line, each) => self.range(*line, each, dot, out)?,
            Node::Template(line, name, pipeline) => {
                let value = self.pipeline(*line, pipeline, dot)?;
                let Some((file, body)) = self.templates.defined.get(name) else {
                    return Err(self.error(*line, format!("no template is called \"{name}\"")));
                };
                run(self.templates, file, body, &value, out)?;
            }
        }
        Ok(())
    }

    fn range(
        &mut self,
        line: usize,
        each: &Loop,
        dot: &Value,
        out: &mut String,
    ) -> Result<(), TemplateError> {
        let pairs: Vec<(Value, Value)> = match self.pipeline(line, &each.over, dot)? {
            Value::Array(items) => items.into_iter().enumerate().map(|(i, v)| (Value::from(i), v)).collect(),
            // Sorted by key, as Go does.
            Value::Object(map) => {
                let mut pairs: Vec<_> = map.into_iter().collect();
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
                pairs.into_iter().map(|(k, v)| (Value::String(k), v)).collect()
            }
            Value::Null => Vec::new(),
            _ => return Err(self.error(line, "range needs a list or a map")),
        };
        if pairs.is_empty() {
            return self.nodes(&each.otherwise, dot, out);
        }
        for (key, value) in pairs {
            let known = self.variables.len();
            if let Some(name) = &each.key {
                self.variables.push((name.clone(), key));
            }
            if let Some(name) = &each.value {
                self.variables.push((name.clone(), value.clone()));
            }
            self.nodes(&each.body, &value, out)?;
            self.variables.truncate(known);
        }
        Ok(())
    }

    fn pipeline(&self, line: usize, pipeline: &Pipeline, dot: &Value) -> Result<Value, TemplateError> {
        let mut last = None;
        for command in pipeline {
            last = Some(self.command(line, command, last, dot)?);
        }
        last.ok_or_else(|| self.error(line, "the action is empty"))
    }

    fn command(
        &self,
        line: usize,
        command: &[Operand],
        piped: Option<Value>,
        dot: &Value,
    ) -> Result<Value, TemplateError> {
        let [first, rest @ ..] = command else { return Err(self.error(line, "the action is empty")) };
        if let Operand::Function(name) = first {
            let mut arguments: Vec<Value> =
                rest.iter().map(|operand| self.operand(line, operand, dot)).collect::<Result<_, _>>()?;
            arguments.extend(piped);
            return functions::call(name, &arguments).map_err(|problem| self.error(line, problem));
        }
        if !rest.is_empty() || piped.is_some() {
            return Err(self.error(line, "only a function takes arguments"));
        }
        self.operand(line, first, dot)
    }

    fn operand(&self, line: usize, operand: &Operand, dot: &Value) -> Result<Value, TemplateError> {
        match operand {
            Operand::Field(path) => self.field(line, dot, path),
            Operand::Variable(name, path) if name.is_empty() => self.field(line, self.root, path),
            Operand::Variable(name, path) => {
                let known = self.variables.iter().rev().find(|(known, _)| known == name);
                let (_, value) = known.ok_or_else(|| self.error(line, format!("no variable ${name}")))?;
                self.field(line, value, path)
            }
            Operand::Text(text) => Ok(Value::String(text.clone())),
            Operand::Number(number) => Ok(Value::from(*number)),
            Operand::Bool(value) => Ok(Value::Bool(*value)),
            Operand::Group(pipeline) => self.pipeline(line, pipeline, dot),
            Operand::Function(name) => {
                functions::call(name, &[]).map_err(|problem| self.error(line, problem))
            }
        }
    }

    /// A field of a map; nothing where the map does not have it.
    fn field(&self, line: usize, value: &Value, path: &[String]) -> Result<Value, TemplateError> {
        let mut found = value;
        for (at, part) in path.iter().enumerate() {
            let Value::Object(map) = found else {
                let so_far = path.get(..at).unwrap_or_default().join(".");
                return Err(self.error(line, format!(".{so_far} has no fields, and .{part} is asked for")));
            };
            found = map.get(part).unwrap_or(&Value::Null);
        }
        Ok(found.clone())
    }
}
