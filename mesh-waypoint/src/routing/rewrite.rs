//! What becomes of a path: rewrites of requests, and the address that a redirect names.

use std::sync::Arc;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, StatusCode};
use mesh_core::xds::proto::l7;
use regex::bytes::Regex;

use super::headers::compile_authority;
use super::matching::MatchedPath;
use super::pattern::Patterns;
use super::problem::Invalid;
use crate::request::Head;

/// Of a path with its query, in bytes: what the `http` crate can hold.
const LENGTH_LIMIT: usize = u16::MAX as usize - 1;

/// Why a request has no address to go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// The answer is 414.
    #[error("the rewritten path is longer than {LENGTH_LIMIT} bytes")]
    TooLong,
    /// The answer is 400.
    #[error("the authority of the request is no host, nor host:port")]
    Authority,
}

/// Changes the path or the authority of a request.
#[derive(Debug, Clone)]
pub struct Rewrite {
    /// The authority from then on.
    pub authority: Option<Authority>,
    path: Option<PathRewrite>,
}

#[derive(Debug, Clone)]
enum PathRewrite {
    Full(Box<str>),
    Prefix(Box<str>),
    Regex { regex: Arc<Regex>, replacement: Box<[Part]> },
}

/// A part of what is put in place of a match.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    /// 0 is the whole match.
    Group(usize),
}

impl Rewrite {
    pub(super) fn compile(msg: &l7::Rewrite, patterns: &Patterns) -> Result<Self, Invalid> {
        use l7::rewrite::Path;
        let authority = match msg.authority.as_str() {
            "" => None,
            text => Some(compile_authority(text).map_err(|r| Invalid::new("authority", r))?),
        };
        let path = match &msg.path {
            None => None,
            Some(Path::Full(path)) => Some(PathRewrite::Full(path.as_str().into())),
            Some(Path::Prefix(path)) => Some(PathRewrite::Prefix(path.as_str().into())),
            Some(Path::Regex(regex)) => {
                let compiled = patterns.anywhere(&regex.pattern);
                let compiled = compiled.map_err(|reason| Invalid::new("regex.pattern", reason))?;
                let replacement = parse_replacement(&regex.replacement, compiled.captures_len())
                    .map_err(|reason| Invalid::new("regex.replacement", reason))?;
                Some(PathRewrite::Regex { regex: compiled, replacement })
            }
        };
        Ok(Self { authority, path })
    }

    /// Path and query from then on; `None` leaves them as they are. `matched` is what the rule's match says.
    ///
    /// # Errors
    /// The result would be too long.
    pub fn path(
        &self,
        matched: MatchedPath,
        path: &str,
        query: Option<&str>,
    ) -> Result<Option<PathAndQuery>, RewriteError> {
        let new = match &self.path {
            None => return Ok(None),
            Some(PathRewrite::Full(full)) => full.to_string(),
            Some(PathRewrite::Prefix(prefix)) => replace_prefix(prefix, matched, path),
            Some(PathRewrite::Regex { regex, replacement }) => replace_matches(regex, replacement, path)?,
        };
        // What a replacement has after a `?` goes before what the request has.
        let (path, own) = new.split_once('?').map_or((&*new, None), |(path, query)| (path, Some(query)));
        let mut uri = String::with_capacity(new.len() + query.map_or(0, str::len) + 2);
        push_path(&mut uri, path);
        let mut mark = '?';
        if let Some(own) = own {
            uri.push(mark);
            push_query(&mut uri, own);
            mark = '&';
        }
        if let Some(query) = query {
            uri.push(mark);
            push_query(&mut uri, query);
        }
        if uri.len() > LENGTH_LIMIT {
            return Err(RewriteError::TooLong);
        }
        PathAndQuery::from_maybe_shared(Bytes::from(uri)).ok().map(Some).ok_or(RewriteError::TooLong)
    }
}

/// Answers with another address.
#[derive(Debug, Clone)]
pub struct Redirect {
    /// 301 unless the rule says otherwise.
    pub status: StatusCode,
    scheme: Option<Box<str>>,
    authority: Option<Authority>,
    port: RedirectPort,
    path: Option<RedirectPath>,
}

#[derive(Debug, Clone, Copy)]
enum RedirectPort {
    Fixed(u16),
    Keep,
    OfScheme,
    OfRequest,
}

#[derive(Debug, Clone)]
enum RedirectPath {
    Full(Box<str>),
    Prefix(Box<str>),
}

impl Redirect {
    pub(super) fn compile(msg: &l7::Redirect) -> Result<Self, Invalid> {
        use l7::redirect::{DerivePort, Path};
        let authority = match msg.authority.as_str() {
            "" => None,
            text => Some(compile_authority(text).map_err(|r| Invalid::new("authority", r))?),
        };
        let scheme = msg.scheme.to_ascii_lowercase();
        let known = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
        if !scheme.bytes().all(known) || scheme.starts_with(|c: char| !c.is_ascii_alphabetic()) {
            return Err(Invalid::new("scheme", format!("{scheme:?} is no scheme; `http` or `https` is one")));
        }
        let port = match u16::try_from(msg.port) {
            Err(_) => return Err(Invalid::new("port", format!("{} is no port (1 to 65535)", msg.port))),
            Ok(0) => match msg.derive_port() {
                DerivePort::Keep => RedirectPort::Keep,
                DerivePort::FromProtocolDefault => RedirectPort::OfScheme,
                DerivePort::FromRequestPort => RedirectPort::OfRequest,
            },
            Ok(port) => RedirectPort::Fixed(port),
        };
        let status = match msg.status {
            0 => StatusCode::MOVED_PERMANENTLY,
            status => u16::try_from(status)
                .ok()
                .and_then(|status| StatusCode::from_u16(status).ok())
                .filter(StatusCode::is_redirection)
                .ok_or_else(|| Invalid::new("status", format!("{status} is no redirection (300 to 399)")))?,
        };
        let path = msg.path.as_ref().map(|path| match path {
            Path::Full(path) => RedirectPath::Full(path.as_str().into()),
            Path::Prefix(path) => RedirectPath::Prefix(path.as_str().into()),
        });
        let scheme = (!scheme.is_empty()).then(|| scheme.into());
        Ok(Self { status, scheme, authority, port, path })
    }

    /// The `Location` header. The port is left out where it is that of the scheme (Gateway API); the query stays unless
    /// the new path has one (Envoy's `path_redirect`).
    ///
    /// # Errors
    /// The result would be too long, or the request's authority is none.
    pub fn location(&self, head: &Head<'_>, matched: MatchedPath) -> Result<HeaderValue, RewriteError> {
        let scheme = self.scheme.as_deref().unwrap_or(head.scheme);
        let (host, own_port) = split_port(self.authority.as_ref().map_or(head.authority, Authority::as_str));
        let own_port = || own_port.and_then(|port| port.parse::<u16>().ok());
        let port = match self.port {
            RedirectPort::Fixed(port) => Some(port),
            RedirectPort::OfScheme => None,
            RedirectPort::OfRequest => Some(head.addressed.port()),
            RedirectPort::Keep if self.authority.is_some() => own_port(),
            // The default of the scheme that was is not meant for the one that comes.
            RedirectPort::Keep => own_port().filter(|port| {
                !matches!((scheme, port), ("https", 80) | ("http", 443)) || scheme == head.scheme
            }),
        };
        let mut location = format!("{scheme}://{host}");
        if let Some(port) = port.filter(|port| default_port(scheme) != Some(*port)) {
            location.push_str(&format!(":{port}"));
        }
        let new = match &self.path {
            None => head.path.to_owned(),
            Some(RedirectPath::Full(full)) => full.to_string(),
            Some(RedirectPath::Prefix(prefix)) => replace_prefix(prefix, matched, head.path),
        };
        let (path, own) = new.split_once('?').map_or((&*new, None), |(path, query)| (path, Some(query)));
        push_path(&mut location, path);
        if let Some(query) = own.or(head.query) {
            location.push('?');
            push_query(&mut location, query);
        }
        if location.len() > LENGTH_LIMIT {
            return Err(RewriteError::TooLong);
        }
        HeaderValue::try_from(location).ok().ok_or(RewriteError::Authority)
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// Host and port; IPv6 addresses keep their brackets.
pub(crate) fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Segments: the Gateway API's table of `ReplacePrefixMatch`. Characters: Envoy's `prefix_rewrite`, which glues the rest
/// to the replacement whatever it begins with, and replaces the whole where the whole was matched.
fn replace_prefix(replacement: &str, matched: MatchedPath, path: &str) -> String {
    let rest = |length: usize| path.get(length..).unwrap_or_default();
    match matched {
        MatchedPath::Whole => replacement.to_owned(),
        MatchedPath::Characters(length) => format!("{replacement}{}", rest(length)),
        MatchedPath::Segments(length) => {
            format!("{}{}", replacement.strip_suffix('/').unwrap_or(replacement), rest(length))
        }
    }
}

/// RE2's `GlobalReplace`: every match, from left to right.
fn replace_matches(regex: &Regex, replacement: &[Part], path: &str) -> Result<String, RewriteError> {
    let mut new = Vec::with_capacity(path.len());
    let mut end = 0;
    for captures in regex.captures_iter(path.as_bytes()) {
        let Some(all) = captures.get(0) else { continue };
        new.extend_from_slice(&path.as_bytes()[end..all.start()]);
        for part in replacement {
            match part {
                Part::Text(text) => new.extend_from_slice(text.as_bytes()),
                Part::Group(group) => {
                    new.extend_from_slice(captures.get(*group).map_or(b"", |group| group.as_bytes()));
                }
            }
        }
        end = all.end();
        if new.len() > LENGTH_LIMIT {
            return Err(RewriteError::TooLong);
        }
    }
    new.extend_from_slice(&path.as_bytes()[end..]);
    Ok(String::from_utf8_lossy(&new).into_owned())
}

/// `\1` to `\9` and `\0` are groups, `\\` is a backslash (RE2).
fn parse_replacement(text: &str, groups: usize) -> Result<Box<[Part]>, String> {
    let mut parts = Vec::new();
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\\' {
            plain.push(character);
            continue;
        }
        match characters.next() {
            Some('\\') => plain.push('\\'),
            Some(digit @ '0'..='9') => {
                let group = digit as usize - '0' as usize;
                if group >= groups {
                    return Err(format!(r"names the group \{group}, and the pattern has {}", groups - 1));
                }
                if !plain.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut plain).into()));
                }
                parts.push(Part::Group(group));
            }
            _ => return Err(r"has a backslash that is followed neither by a digit nor by another one".into()),
        }
    }
    if !plain.is_empty() {
        parts.push(Part::Text(plain.into()));
    }
    Ok(parts.into())
}

fn push_path(uri: &mut String, path: &str) {
    if !path.starts_with('/') {
        uri.push('/');
    }
    push_encoded(uri, path, b"/:@!$&'()*+,;=");
}

fn push_query(uri: &mut String, query: &str) {
    push_encoded(uri, query, b"/?:@!$&'()*+,;=");
}

/// What may not stand in a part of a URI (RFC 3986, section 3.3) is percent-encoded.
fn push_encoded(uri: &mut String, text: &str, allowed: &[u8]) {
    let bytes = text.as_bytes();
    for (at, &byte) in bytes.iter().enumerate() {
        let hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
        let stays = match byte {
            b'%' => hex(at + 1) && hex(at + 2),
            byte => byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || allowed.contains(&byte),
        };
        if stays {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
}
