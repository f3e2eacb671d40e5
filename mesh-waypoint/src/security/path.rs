//! Normalisation of paths: one form for policies, routes and the upstream, so that none of them can be told something
//! else than the others.
//!
//! What each option does: Istio's `pathNormalization` (<https://istio.io/latest/docs/reference/config/security/normalization/>).
//!
//! | option | |
//! |---|---|
//! | NONE | nothing |
//! | BASE | `\` becomes `/`; escaped unreserved characters are unescaped; `.` and `..` segments are resolved |
//! | MERGE_SLASHES | as BASE, then several slashes become one |
//! | DECODE_AND_MERGE_SLASHES | escaped slashes and backslashes are unescaped, then as MERGE_SLASHES |

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use mesh_core::xds::proto::l7::settings::PathNormalization;

/// Why a path has no normal form. The answer is 400 with [`NotNormal::DETAILS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotNormal {
    /// A server in C would stop reading there.
    #[error("the path has a NUL, written as it is or as %00")]
    Nul,
    /// No client sends fragments, and servers disagree about what they are.
    #[error("the path has a fragment (#)")]
    Fragment,
    /// Servers that normalise it again see another path. (Envoy forwards it.)
    #[error("the path has a % that becomes an escape when the path is unescaped")]
    Ambiguous,
    /// Neither absolute nor `*`.
    #[error("the path does not begin with /")]
    NotAbsolute,
}

impl NotNormal {
    /// Envoy's response code details.
    pub const DETAILS: &'static str = "path_normalization_failed";
}

/// The normal form of a path without query.
///
/// # Errors
/// [`NotNormal`]. Never with [`PathNormalization::None`].
pub fn normalize(path: &str, how: PathNormalization) -> Result<Cow<'_, str>, NotNormal> {
    if how == PathNormalization::None || path == "*" {
        return Ok(Cow::Borrowed(path));
    }
    if !path.starts_with('/') {
        return Err(NotNormal::NotAbsolute);
    }
    let merge = matches!(how, PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes);
    if is_normal(path.as_bytes(), merge) {
        return Ok(Cow::Borrowed(path));
    }
    let unescaped = match how {
        PathNormalization::DecodeAndMergeSlashes => unescape_slashes(path.as_bytes()),
        _ => Cow::Borrowed(path.as_bytes()),
    };
    let characters = normal_characters(&unescaped)?;
    let mut segments = resolve_dots(&characters);
    if merge {
        let last = segments.len().saturating_sub(1);
        let mut i = 0;
        segments.retain(|segment| {
            i += 1;
            i - 1 == last || !segment.is_empty()
        });
    }
    let mut normal = Vec::with_capacity(characters.len());
    for segment in segments {
        normal.push(b'/');
        normal.extend_from_slice(segment);
    }
    // Only ASCII is left: everything else is escaped.
    Ok(Cow::Owned(normal.into_iter().map(char::from).collect()))
}

/// The path with its escapes in upper case (RFC 3986, 6.2.2.1), which is for comparing only: Envoy forwards them as they
/// came, and compares them so, too, which lets `%2f` pass a rule about `%2F`.
pub(super) fn with_equal_escapes(path: &str) -> Cow<'_, str> {
    let has_lower = |i: usize| {
        path.as_bytes().get(i + 1..i + 3).is_some_and(|hex| hex.iter().any(u8::is_ascii_lowercase))
    };
    if !path.match_indices('%').any(|(i, _)| has_lower(i)) {
        return Cow::Borrowed(path);
    }
    let mut equal = String::with_capacity(path.len());
    let mut digits = 0_usize;
    for (i, c) in path.char_indices() {
        if c == '%' && escaped(&path.as_bytes()[i..]).is_some() {
            digits = 3;
        }
        equal.push(if digits > 0 { c.to_ascii_uppercase() } else { c });
        digits = digits.saturating_sub(1);
    }
    Cow::Owned(equal)
}

/// Whether nothing has to be done, which is nearly always.
fn is_normal(path: &[u8], merge: bool) -> bool {
    let mut before = 0;
    for &b in path {
        if !is_plain(b) || (before == b'/' && (b == b'.' || (merge && b == b'/'))) {
            return false;
        }
        before = b;
    }
    true
}

fn unescape_slashes(path: &[u8]) -> Cow<'_, [u8]> {
    if !path.contains(&b'%') {
        return Cow::Borrowed(path);
    }
    let mut unescaped = Vec::with_capacity(path.len());
    let mut rest = path;
    while let [first, after @ ..] = rest {
        match escaped(rest) {
            Some(b @ (b'/' | b'\\')) => {
                unescaped.push(b);
                rest = &rest[3..];
            }
            _ => {
                unescaped.push(*first);
                rest = after;
            }
        }
    }
    Cow::Owned(unescaped)
}

/// The characters as Envoy writes them; `%` that escapes nothing stays.
fn normal_characters(path: &[u8]) -> Result<Vec<u8>, NotNormal> {
    let mut normal = Vec::with_capacity(path.len());
    let mut stray = Vec::new();
    let mut rest = path;
    while let [first, after @ ..] = rest {
        match (*first, escaped(rest)) {
            (b'%', Some(b)) => {
                match b {
                    0 => return Err(NotNormal::Nul),
                    b'.' => normal.push(b),
                    b if is_unreserved(b) => normal.push(b),
                    _ => normal.extend_from_slice(&rest[..3]),
                }
                rest = &rest[3..];
                continue;
            }
            (0, _) => return Err(NotNormal::Nul),
            (b'#', _) => return Err(NotNormal::Fragment),
            (b'\\', _) => normal.push(b'/'),
            (b'%', None) => {
                stray.push(normal.len());
                normal.push(b'%');
            }
            (b, _) if is_plain(b) => normal.push(b),
            (b, _) => {
                const HEX: &[u8; 16] = b"0123456789ABCDEF";
                normal.extend_from_slice(&[b'%', HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]);
            }
        }
        rest = after;
    }
    // %%32%65 is not to become %2e, which the upstream would read as a dot.
    if stray.into_iter().any(|at| escaped(&normal[at..]).is_some()) {
        return Err(NotNormal::Ambiguous);
    }
    Ok(normal)
}

/// The segments without `.` and `..`; of one of those at the end the slash before it stays.
fn resolve_dots(path: &[u8]) -> Vec<&[u8]> {
    let mut segments: Vec<&[u8]> = Vec::new();
    let mut parts = path.split(|b| *b == b'/').skip(1).peekable();
    while let Some(part) = parts.next() {
        let is_last = parts.peek().is_none();
        match part {
            b"." => {}
            b".." => {
                segments.pop();
            }
            part => {
                segments.push(part);
                continue;
            }
        }
        if is_last {
            segments.push(b"");
        }
    }
    segments
}

/// What the escape at the beginning stands for.
fn escaped(text: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = text else { return None };
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(*high)? << 4 | digit(*low)?)
}

/// Letters that mean the same whether escaped or not (RFC 3986, 2.3); a dot is handled apart.
fn is_unreserved(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'~')
}

/// Characters that stay as they are (the table that Envoy has from Chromium).
fn is_plain(b: u8) -> bool {
    is_unreserved(b)
        || matches!(
            b,
            b'/' | b'.'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b':'
                | b';'
                | b'='
                | b'@'
                | b'['
                | b']'
        )
}
