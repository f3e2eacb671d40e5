//! What consistent hashing goes by.

use std::hash::Hasher;
use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderName, HeaderValue, header};
use mesh_core::xds::proto::l7;
use twox_hash::XxHash64;

use super::policy::duration;
use crate::request::Head;

/// The part of a request whose value keeps going to one endpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum HashKey {
    /// A header.
    Header(HeaderName),
    /// A cookie.
    Cookie {
        /// Its name.
        name: String,
        /// Its path; empty: none is said.
        path: String,
        /// How long a client keeps it that gets one from us; zero: with its session; none: we give it none.
        ttl: Option<Duration>,
        /// Further attributes, `name` or `name=value`.
        attributes: Vec<String>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter, as it is written.
    QueryParameter(String),
}

/// The hash of a request.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Hashed {
    /// None when the request does not have that part: it goes to any endpoint.
    pub hash: Option<u64>,
    /// What to add to the answer as `set-cookie`.
    pub set_cookie: Option<HeaderValue>,
}

impl HashKey {
    /// None for the name of a header that no request can have.
    pub(super) fn read(wire: &l7::consistent_hash::Key) -> Option<Self> {
        use l7::consistent_hash::Key;
        Some(match wire {
            Key::Header(name) => Self::Header(HeaderName::try_from(name.as_str()).ok()?),
            Key::Cookie(cookie) => Self::Cookie {
                name: cookie.name.clone(),
                path: cookie.path.clone(),
                ttl: duration(cookie.ttl.as_ref()),
                attributes: cookie.attributes.iter().map(attribute).collect(),
            },
            Key::SourceIp(_) => Self::SourceIp,
            Key::QueryParameter(name) => Self::QueryParameter(name.clone()),
        })
    }

    /// The hash of a request; `random` becomes the value of a cookie that the client does not have yet.
    #[must_use]
    pub fn hash(&self, head: &Head<'_>, random: u64) -> Hashed {
        let of = |value: Option<&[u8]>| Hashed { hash: value.map(bytes), set_cookie: None };
        match self {
            Self::Header(name) => Hashed { hash: header_hash(head, name), set_cookie: None },
            Self::SourceIp => Hashed { hash: Some(address_hash(head.source.address.ip())), set_cookie: None },
            Self::QueryParameter(name) => {
                of(head.query.and_then(|query| query_parameter(query, name)).map(str::as_bytes))
            }
            Self::Cookie { name, ttl, .. } => match (cookie(head, name), ttl) {
                (Some(value), _) => of(Some(value.as_bytes())),
                (None, None) => Hashed::default(),
                (None, Some(ttl)) => {
                    let value = format!("{random:016x}");
                    let hash = Some(bytes(value.as_bytes()));
                    Hashed { hash, set_cookie: self.set_cookie(&value, *ttl) }
                }
            },
        }
    }

    fn set_cookie(&self, value: &str, ttl: Duration) -> Option<HeaderValue> {
        let Self::Cookie { name, path, attributes, .. } = self else { return None };
        let mut text = format!("{name}=\"{value}\"");
        if !ttl.is_zero() {
            text += &format!("; Max-Age={}", ttl.as_secs());
        }
        if !path.is_empty() {
            text += &format!("; Path={path}");
        }
        for attribute in attributes {
            text += "; ";
            text += attribute;
        }
        HeaderValue::try_from(text + "; HttpOnly").ok()
    }
}

fn attribute(wire: &l7::Header) -> String {
    if wire.value.is_empty() { wire.name.clone() } else { format!("{}={}", wire.name, wire.value) }
}

/// Several values count as a set: whoever adds one may put it anywhere.
fn header_hash(head: &Head<'_>, name: &HeaderName) -> Option<u64> {
    let mut values = head.headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = values.next()?;
    let mut rest: Vec<_> = values.collect();
    if rest.is_empty() {
        return Some(bytes(first));
    }
    rest.push(first);
    rest.sort_unstable();
    let mut hasher = XxHash64::default();
    for value in rest {
        hasher.write(value);
    }
    Some(hasher.finish())
}

fn address_hash(ip: IpAddr) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(v4) => bytes(&v4.octets()),
        IpAddr::V6(v6) => bytes(&v6.octets()),
    }
}

fn query_parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// The value of a cookie, without quotes.
fn cookie<'a>(head: &Head<'a>, name: &str) -> Option<&'a str> {
    let lines = head.headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(';')).find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        (key.trim() == name).then(|| value.trim().trim_matches('"'))
    })
}

/// The hash of a text: the same in every process.
pub(super) fn bytes(text: &[u8]) -> u64 {
    XxHash64::oneshot(0, text)
}
