//! Expressions in CEL over what is known of a request, as Telemetry resources write them: filters of access logs and
//! values of metrics' tags. Names of attributes are Envoy's.

use std::collections::HashMap;
use std::sync::Arc;

use cel::{Context, Program, Value};

/// The roots of the attributes that a waypoint knows.
pub const ROOTS: [&str; 8] =
    ["connection", "destination", "filter_state", "request", "response", "source", "upstream", "xds"];
/// Longer ones are none that a person wrote.
const LONGEST: usize = 4096;

/// Why an expression cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    /// Not CEL.
    #[error("is no expression in CEL: {0}")]
    Syntax(String),
    /// CEL, but over something that is not known here.
    #[error("reads {0}, which waypoints do not know; attributes begin with {roots}", roots = ROOTS.join(", "))]
    Unknown(String),
}

/// An attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    /// A text.
    Text(String),
    /// A number.
    Number(i64),
    /// Yes or no.
    Flag(bool),
    /// Further attributes by name; those that are not there are left out.
    Map(Vec<(String, Self)>),
}

impl From<Attribute> for Value {
    fn from(attribute: Attribute) -> Self {
        match attribute {
            Attribute::Text(text) => text.into(),
            Attribute::Number(number) => Self::Int(number),
            Attribute::Flag(flag) => Self::Bool(flag),
            Attribute::Map(members) => {
                let members = members.into_iter().map(|(name, value)| (name, Self::from(value)));
                members.collect::<HashMap<String, Self>>().into()
            }
        }
    }
}

/// An expression that is ready to be used. Cheap to clone.
#[derive(Clone)]
pub struct Expression {
    text: Arc<str>,
    program: Arc<Program>,
    roots: Arc<[&'static str]>,
}

impl std::fmt::Debug for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Expression").field(&self.text).finish()
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Expression {
    /// Reads an expression.
    ///
    /// # Errors
    /// It is no CEL, or reads what waypoints do not know.
    pub fn read(text: &str) -> Result<Self, ExpressionError> {
        if text.len() > LONGEST {
            return Err(ExpressionError::Syntax(format!("it is longer than {LONGEST} bytes")));
        }
        let program = Program::compile(text).map_err(|errors| {
            let text = errors.to_string();
            let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            ExpressionError::Syntax(line.trim().to_owned())
        })?;
        let mut roots = Vec::new();
        for name in program.references().variables() {
            match ROOTS.iter().find(|root| **root == name) {
                Some(root) => roots.push(*root),
                None => return Err(ExpressionError::Unknown(name.to_owned())),
            }
        }
        roots.sort_unstable();
        Ok(Self { text: text.into(), program: Arc::new(program), roots: roots.into() })
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it is the same for every request.
    #[must_use]
    pub fn is_constant(&self) -> bool {
        self.roots.is_empty()
    }

    /// The text that it evaluates to; none where something that it reads is not there. `root` makes the attributes of one
    /// of [`ROOTS`].
    pub fn text_of(&self, root: impl Fn(&str) -> Attribute) -> Option<String> {
        match self.evaluate(root)? {
            Value::String(text) => Some(text.to_string()),
            Value::Int(number) => Some(number.to_string()),
            Value::UInt(number) => Some(number.to_string()),
            Value::Float(number) => Some(number.to_string()),
            Value::Bool(flag) => Some(flag.to_string()),
            _ => None,
        }
    }

    /// Whether it holds; not where something that it reads is not there.
    pub fn holds(&self, root: impl Fn(&str) -> Attribute) -> bool {
        matches!(self.evaluate(root), Some(Value::Bool(true)))
    }

    fn evaluate(&self, root: impl Fn(&str) -> Attribute) -> Option<Value> {
        let mut context = Context::default();
        for name in &*self.roots {
            context.add_variable_from_value(*name, Value::from(root(name)));
        }
        self.program.execute(&context).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(name: &str) -> Attribute {
        let text = |text: &str| Attribute::Text(text.to_owned());
        let map = |members: Vec<(&str, Attribute)>| {
            Attribute::Map(members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
        };
        match name {
            "request" => map(vec![
                ("method", text("GET")),
                ("url_path", text("/a/b")),
                ("headers", map(vec![("x-user", text("tester"))])),
            ]),
            "response" => map(vec![("code", Attribute::Number(503))]),
            "connection" => map(vec![("mtls", Attribute::Flag(true))]),
            _ => map(vec![]),
        }
    }

    #[test]
    fn filters_hold_as_cel_says() {
        for (text, holds) in [
            ("response.code >= 400", true),
            ("response.code == 200 || connection.mtls", true),
            ("request.url_path.startsWith('/a/') && request.method == 'GET'", true),
            ("request.headers['x-user'] == 'tester'", true),
            ("'x-other' in request.headers", false),
            ("has(request.referer)", false),
            ("!has(request.referer)", true),
            ("request.url_path.matches('^/a/[a-z]$')", true),
            // What is not there makes it false, as Envoy has it.
            ("request.headers['none'] != 'x'", false),
            ("response.code", false),
        ] {
            assert_eq!(Expression::read(text).unwrap().holds(root), holds, "{text}");
        }
    }

    #[test]
    fn values_of_tags_are_texts() {
        let text = |text: &str| Expression::read(text).unwrap().text_of(root);
        assert_eq!(text("request.method").as_deref(), Some("GET"));
        assert_eq!(text("string(response.code)").as_deref(), Some("503"));
        assert_eq!(text("'fixed'").as_deref(), Some("fixed"));
        assert_eq!(text("response.code >= 500 ? '5xx' : 'other'").as_deref(), Some("5xx"));
        assert_eq!(text("request.host"), None);
    }

    #[test]
    fn what_cannot_be_evaluated_says_why() {
        let wrong = |text: &str| Expression::read(text).unwrap_err();
        assert!(matches!(wrong("response.code >"), ExpressionError::Syntax(_)));
        assert!(matches!(wrong(&"a".repeat(5000)), ExpressionError::Syntax(_)));
        let unknown = wrong("node.metadata['x'] == 'y'");
        assert_eq!(unknown, ExpressionError::Unknown("node".into()));
        assert!(unknown.to_string().contains("attributes begin with connection"), "{unknown}");
    }
}
