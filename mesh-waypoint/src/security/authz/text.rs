//! How values of policies are compared with texts of requests.

use mesh_core::policy::Truth;

/// A value as it is written: exact, `prefix*`, `*suffix`, or `*` for not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Text {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Present,
}

impl Text {
    /// Reads a value; a star that is neither first nor last is one of the text's characters.
    pub(super) fn literal(value: &str) -> Result<Self, String> {
        Ok(match value {
            "" => return Err("is empty; give a value, or * for any".to_owned()),
            "*" => Self::Present,
            _ => {
                if let Some(rest) = value.strip_prefix('*') {
                    Self::Suffix(rest.into())
                } else if let Some(rest) = value.strip_suffix('*') {
                    Self::Prefix(rest.into())
                } else {
                    Self::Exact(value.into())
                }
            }
        })
    }

    /// Reads a value of a kind of text that has no stars: one that is neither first nor last was meant as a wildcard, and
    /// taken as a character it would never match.
    pub(super) fn pattern(value: &str) -> Result<Self, String> {
        let text = Self::literal(value)?;
        match &text {
            Self::Exact(rest) | Self::Prefix(rest) | Self::Suffix(rest) if rest.contains('*') => {
                Err(format!("{value:?} has a * inside; it may only be the first or the last character"))
            }
            _ => Ok(text),
        }
    }

    pub(super) fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value == text.as_bytes(),
            Self::Prefix(text) => value.starts_with(text.as_bytes()),
            Self::Suffix(text) => value.ends_with(text.as_bytes()),
            Self::Present => !value.is_empty(),
        }
    }

    pub(super) fn matches_ignoring_case(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value.eq_ignore_ascii_case(text.as_bytes()),
            Self::Prefix(text) => {
                value.get(..text.len()).is_some_and(|head| head.eq_ignore_ascii_case(text.as_bytes()))
            }
            Self::Suffix(text) => {
                let start = value.len().checked_sub(text.len());
                start.is_some_and(|start| value[start..].eq_ignore_ascii_case(text.as_bytes()))
            }
            Self::Present => !value.is_empty(),
        }
    }

    /// A host is equal whatever its case and whatever port goes with it, unless the value has a port itself; and whether or
    /// not a dot says that the name is whole.
    pub(super) fn matches_host(&self, authority: &str) -> bool {
        let host = without_port(authority);
        let relative = host.strip_suffix('.').unwrap_or(host);
        [authority, host, relative].iter().any(|form| self.matches_ignoring_case(form.as_bytes()))
    }
}

/// An authority without its port.
fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (host.ends_with(']') || !host.contains(':')) =>
        {
            host
        }
        _ => authority,
    }
}

/// A path, or a template with `{*}` (one segment) and `{**}` (the rest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PathPattern {
    Text(Text),
    Template(Template),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    /// Literals, with one whole segment between each two.
    segments: Vec<Box<str>>,
    /// What follows `{**}`.
    rest: Option<Box<str>>,
}

impl PathPattern {
    pub(super) fn read(value: &str) -> Result<Self, String> {
        if value.contains("{*}") || value.contains("{**}") {
            Template::read(value).map(Self::Template)
        } else {
            Text::pattern(value).map(Self::Text)
        }
    }

    pub(super) fn truth(&self, path: &str) -> Truth {
        match self {
            Self::Text(text) => truth(text.matches(path.as_bytes())),
            Self::Template(template) => template.truth(path),
        }
    }
}

impl Template {
    /// Istio's rules: operators are whole segments, `{**}` is the last of them, and there are no stars or braces beside
    /// them.
    fn read(value: &str) -> Result<Self, String> {
        let wrong = |what: &str| Err(format!("{value:?} is no path template: {what}"));
        let (head, rest) = match value.split_once("{**}") {
            Some((head, rest)) => (head, Some(rest)),
            None => (value, None),
        };
        if rest.is_some_and(|rest| rest.contains("{*}") || rest.contains("{**}")) {
            return wrong("{**} must be the last operator");
        }
        let segments: Vec<&str> = head.split("{*}").collect();
        if segments.iter().copied().chain(rest).any(|text| text.contains(['*', '{', '}'])) {
            return wrong("it has *, { or } outside of {*} and {**}");
        }
        let operators = segments.len() - 1 + usize::from(rest.is_some());
        // An operator ends its literal with a slash and begins the next one with a slash or the end.
        let before = segments[..operators.min(segments.len())].iter().all(|literal| literal.ends_with('/'));
        let after = segments[1..].iter().enumerate().all(|(i, literal)| {
            literal.starts_with('/') || (literal.is_empty() && i + 2 == segments.len() && rest.is_none())
        });
        let after_rest = rest.is_none_or(|rest| rest.is_empty() || rest.starts_with('/'));
        if !(before && after && after_rest) {
            return wrong("{*} and {**} stand for whole segments, between slashes");
        }
        let segments = segments.into_iter().map(Into::into).collect();
        Ok(Self { segments, rest: rest.map(Into::into) })
    }

    fn truth(&self, path: &str) -> Truth {
        let mut path = path;
        for (i, literal) in self.segments.iter().enumerate() {
            if i > 0 {
                let end = path.find('/').unwrap_or(path.len());
                if end == 0 {
                    return Truth::False;
                }
                path = &path[end..];
            }
            match path.strip_prefix(&**literal) {
                Some(rest) => path = rest,
                None => return Truth::False,
            }
        }
        match self.rest.as_deref() {
            None => truth(path.is_empty()),
            Some(suffix) if path.ends_with(suffix) => Truth::True,
            // Istio documents that `/foo/{**}/` matches `/foo/bar/baz.txt`; its proxy does not do it.
            Some("/") if path.contains('/') => Truth::Unknown,
            Some(_) => Truth::False,
        }
    }
}

pub(super) fn truth(holds: bool) -> Truth {
    if holds { Truth::True } else { Truth::False }
}
