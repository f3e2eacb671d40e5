//! What a rule asks of a request.

use std::borrow::Cow;

use http::HeaderName;
use mesh_core::xds::proto::l7;
use serde_json::{Map, Value};

use super::pattern::{Pattern, Patterns};
use super::problem::Invalid;
use crate::request::Head;

/// What a path must be.
#[derive(Debug, Clone)]
pub(super) enum PathTest {
    Any,
    Exact(Text),
    /// Characters.
    Prefix(Text),
    /// Whole segments; without a slash at the end, so that `/` is empty.
    Segments(Text),
    Regex(Pattern),
    /// Cannot be evaluated: holds for every request, so that none is taken past the rule.
    Broken,
}

/// A text to compare with; in lower case when the case is ignored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Text {
    pub(super) text: Box<str>,
    pub(super) ignore_case: bool,
}

/// What of a path was matched: what a prefix is replaced in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatchedPath {
    /// This many bytes; the rest is put after the replacement as it is (`prefix` of a VirtualService).
    Characters(usize),
    /// This many bytes, which end where a segment does (`PathPrefix` of an HTTPRoute).
    Segments(usize),
    /// All of it: an exact path or a regular expression.
    Whole,
}

/// A part of a request that is compared with a value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Field {
    Method,
    Scheme,
    Authority,
    Header(HeaderName),
    Query(Box<str>),
    SourceNamespace,
    SourceLabel(Box<str>),
    /// Names from the outside in.
    Claim(Box<[String]>),
}

/// What a value must be.
#[derive(Debug, Clone)]
pub(super) enum ValueTest {
    Exact(Text),
    Prefix(Text),
    Suffix(Text),
    Regex(Pattern),
    Present,
    /// As [`PathTest::Broken`].
    Broken,
}

/// One condition of a match.
#[derive(Debug, Clone)]
pub(super) struct Condition {
    pub(super) field: Field,
    pub(super) test: ValueTest,
    pub(super) invert: bool,
}

/// Everything that a match asks for.
#[derive(Debug, Clone)]
pub(super) struct Match {
    pub(super) name: Box<str>,
    pub(super) path: PathTest,
    pub(super) conditions: Box<[Condition]>,
    /// 0 is every port.
    pub(super) port: u16,
}

impl Match {
    /// Compiles a match. What is wrong in it goes to `invalid`; that condition holds then.
    pub(super) fn compile(msg: &l7::HttpMatch, patterns: &Patterns, invalid: &mut Vec<Invalid>) -> Self {
        let mut note = |field: String, test: Result<ValueTest, String>| {
            test.unwrap_or_else(|reason| {
                invalid.push(Invalid::new(field, reason));
                ValueTest::Broken
            })
        };
        let mut conditions = Vec::new();
        let whole = [
            ("method", Field::Method, &msg.method),
            ("scheme", Field::Scheme, &msg.scheme),
            ("authority", Field::Authority, &msg.authority),
        ];
        for (name, field, test) in whole {
            if let Some(test) = test {
                let test = note(name.to_owned(), ValueTest::compile(test, patterns));
                conditions.push(Condition { field, test, invert: false });
            }
        }
        for (at, header) in msg.headers.iter().enumerate() {
            let name = format!("headers[{at}] {:?}", header.name);
            let test =
                header.value.as_ref().map_or(Ok(ValueTest::Present), |v| ValueTest::compile(v, patterns));
            match Field::of_header(header) {
                Ok(field) => {
                    let test = note(name, test);
                    // An inverted condition that cannot be evaluated holds as well.
                    let invert = header.invert && !matches!(test, ValueTest::Broken);
                    conditions.push(Condition { field, test, invert });
                }
                Err(reason) => {
                    note(name, Err(reason));
                }
            }
        }
        for (at, query) in msg.query.iter().enumerate() {
            let test =
                query.value.as_ref().map_or(Ok(ValueTest::Present), |v| ValueTest::compile(v, patterns));
            let test = note(format!("query[{at}] {:?}", query.name), test);
            conditions.push(Condition {
                field: Field::Query(query.name.as_str().into()),
                test,
                invert: false,
            });
        }
        if !msg.source_namespace.is_empty() {
            let test = ValueTest::Exact(Text::new(&msg.source_namespace, false));
            conditions.push(Condition { field: Field::SourceNamespace, test, invert: false });
        }
        for (key, value) in &msg.source_labels {
            let test = ValueTest::Exact(Text::new(value, false));
            conditions.push(Condition {
                field: Field::SourceLabel(key.as_str().into()),
                test,
                invert: false,
            });
        }
        let path = PathTest::compile(msg.path.as_ref(), patterns).unwrap_or_else(|reason| {
            invalid.push(Invalid::new("path", reason));
            PathTest::Broken
        });
        let port = u16::try_from(msg.port).unwrap_or_else(|_| {
            invalid.push(Invalid::new("port", format!("{} is no port (0 to 65535)", msg.port)));
            0
        });
        Self { name: msg.name.as_str().into(), path, conditions: conditions.into(), port }
    }

    /// What of the path is matched, if all of it holds.
    pub(super) fn test(&self, head: &Head<'_>, port: u16) -> Option<MatchedPath> {
        if self.port != 0 && self.port != port {
            return None;
        }
        let path = self.path.test(head.path)?;
        self.conditions.iter().all(|condition| condition.test(head)).then_some(path)
    }
}

impl PathTest {
    fn compile(msg: Option<&l7::PathMatch>, patterns: &Patterns) -> Result<Self, String> {
        use l7::path_match::Kind;
        let Some(msg) = msg else { return Ok(Self::Any) };
        Ok(match &msg.kind {
            None => Self::Any,
            Some(Kind::Exact(path)) => Self::Exact(Text::new(path, msg.ignore_case)),
            Some(Kind::Prefix(path)) => Self::Prefix(Text::new(path, msg.ignore_case)),
            Some(Kind::Segments(path)) => {
                Self::Segments(Text::new(path.strip_suffix('/').unwrap_or(path), msg.ignore_case))
            }
            // Istio: the case is ignored in exact and prefix matches only.
            Some(Kind::Regex(pattern)) => Self::Regex(patterns.whole(pattern)?),
        })
    }

    /// What of the path is matched.
    pub(super) fn test(&self, path: &str) -> Option<MatchedPath> {
        match self {
            Self::Any | Self::Broken => Some(MatchedPath::Characters(usize::from(path.starts_with('/')))),
            Self::Exact(text) => text.is(path.as_bytes()).then_some(MatchedPath::Whole),
            Self::Prefix(text) => {
                text.begins(path.as_bytes()).then_some(MatchedPath::Characters(text.text.len()))
            }
            Self::Segments(text) => {
                let length = text.text.len();
                // The prefix `/` is everything.
                let ends = length == 0 || matches!(path.as_bytes().get(length), None | Some(b'/'));
                (ends && text.begins(path.as_bytes())).then_some(MatchedPath::Segments(length))
            }
            Self::Regex(regex) => regex.is_match(path.as_bytes()).then_some(MatchedPath::Whole),
        }
    }
}

impl Text {
    pub(super) fn new(text: &str, ignore_case: bool) -> Self {
        let text = if ignore_case { text.to_ascii_lowercase().into() } else { text.into() };
        Self { text, ignore_case }
    }

    fn is(&self, value: &[u8]) -> bool {
        let text = self.text.as_bytes();
        // Comparing nothing is slow where it is nowhere: see `PathTree::walk`.
        if text.is_empty() || value.is_empty() {
            return text.len() == value.len();
        }
        if self.ignore_case { text.eq_ignore_ascii_case(value) } else { text == value }
    }

    fn begins(&self, value: &[u8]) -> bool {
        value.get(..self.text.len()).is_some_and(|start| self.is(start))
    }

    fn ends(&self, value: &[u8]) -> bool {
        let start = value.len().checked_sub(self.text.len());
        start.and_then(|start| value.get(start..)).is_some_and(|end| self.is(end))
    }
}

impl Field {
    fn of_header(msg: &l7::HeaderMatch) -> Result<Self, String> {
        if !msg.claim.is_empty() {
            return Ok(Self::Claim(msg.claim.clone().into()));
        }
        // HTTP/2 has no Host header, and whoever matches it means the authority.
        Ok(match msg.name.as_str() {
            "host" | ":authority" => Self::Authority,
            ":method" => Self::Method,
            ":scheme" => Self::Scheme,
            name => Self::Header(name.parse().ok().ok_or_else(|| "is no name of a header".to_owned())?),
        })
    }

    /// The value in a request. Several headers of one name are one value with commas (RFC 9110, section 5.3); of query
    /// parameters the first counts (Gateway API). A claim may have many: see [`Condition::test`].
    pub(super) fn value<'a>(&self, head: &Head<'a>) -> Option<Cow<'a, [u8]>> {
        let text = |text: &'a str| Some(Cow::Borrowed(text.as_bytes()));
        match self {
            Self::Method => text(head.method.as_str()),
            Self::Scheme => text(head.scheme),
            Self::Authority => text(head.authority),
            Self::Header(name) => header_value(head.headers, name),
            Self::Query(name) => text(query_value(head.query?, name)?),
            Self::SourceNamespace => text(source_namespace(head.source)?),
            Self::SourceLabel(key) => text(head.source.labels.as_ref()?.get(&**key)?),
            Self::Claim(_) => None,
        }
    }
}

impl ValueTest {
    fn compile(msg: &l7::StringMatch, patterns: &Patterns) -> Result<Self, String> {
        use l7::string_match::Kind;
        let text = |text: &str| Text::new(text, msg.ignore_case);
        Ok(match &msg.kind {
            None | Some(Kind::Present(true)) => Self::Present,
            Some(Kind::Present(false)) => {
                return Err("`present` must be true; `invert` asks for absence".into());
            }
            Some(Kind::Exact(value)) => Self::Exact(text(value)),
            Some(Kind::Prefix(value)) => Self::Prefix(text(value)),
            Some(Kind::Suffix(value)) => Self::Suffix(text(value)),
            Some(Kind::Regex(pattern)) if msg.ignore_case => {
                Self::Regex(patterns.whole(&format!("(?i:{pattern})"))?)
            }
            Some(Kind::Regex(pattern)) => Self::Regex(patterns.whole(pattern)?),
        })
    }

    /// For values outside of matches: allowed origins.
    pub(super) fn compile_at(
        field: &str,
        msg: &l7::StringMatch,
        patterns: &Patterns,
    ) -> Result<Self, Invalid> {
        Self::compile(msg, patterns).map_err(|reason| Invalid::new(field, reason))
    }

    pub(super) fn test(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => text.is(value),
            Self::Prefix(text) => text.begins(value),
            Self::Suffix(text) => text.ends(value),
            Self::Regex(regex) => regex.is_match(value),
            Self::Present | Self::Broken => true,
        }
    }
}

impl Condition {
    /// Whether it holds. For an inverted one a header that is absent is an empty one (Istio: `withoutHeaders`).
    pub(super) fn test(&self, head: &Head<'_>) -> bool {
        if let Field::Claim(path) = &self.field {
            return claim_holds(head.claims, path, &self.test) != self.invert;
        }
        match (self.field.value(head), &self.test) {
            (_, ValueTest::Broken) => true,
            (Some(value), test) => test.test(&value) != self.invert,
            (None, ValueTest::Present) => self.invert,
            (None, test) => self.invert && !test.test(b""),
        }
    }
}

/// All values of a header, with commas between.
pub(super) fn header_value<'a>(headers: &'a http::HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
    let mut all = first.to_vec();
    for value in std::iter::once(second).chain(values) {
        all.push(b',');
        all.extend_from_slice(value.as_bytes());
    }
    Some(Cow::Owned(all))
}

/// The first value of a parameter, as it is written; that of `a` in `a&b=1` is empty.
pub(super) fn query_value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// What the certificate says; else what is known of the address.
pub(super) fn source_namespace(source: &crate::request::Source) -> Option<&str> {
    let identity = source.identity.as_ref().map(|identity| identity.namespace());
    identity.or_else(|| source.workload.as_ref().map(|workload| &*workload.namespace))
}

/// A claim is a text or a list of texts; `scope` and `permission` are lists with spaces between (RFC 8693).
fn claim_holds(claims: Option<&Map<String, Value>>, path: &[String], test: &ValueTest) -> bool {
    if matches!(test, ValueTest::Broken) {
        return true;
    }
    let is_list = matches!(path.last().map(String::as_str), Some("scope" | "permission"));
    match claim(claims, path) {
        None => false,
        Some(_) if matches!(test, ValueTest::Present) => true,
        Some(Value::String(text)) if test.test(text.as_bytes()) => true,
        Some(Value::String(text)) => is_list && text.split(' ').any(|word| test.test(word.as_bytes())),
        Some(Value::Array(values)) => {
            values.iter().filter_map(Value::as_str).any(|text| test.test(text.as_bytes()))
        }
        Some(_) => false,
    }
}

fn claim<'a>(claims: Option<&'a Map<String, Value>>, path: &[String]) -> Option<&'a Value> {
    let (last, outer) = path.split_last()?;
    let mut map = claims?;
    for name in outer {
        map = map.get(name)?.as_object()?;
    }
    map.get(last)
}
