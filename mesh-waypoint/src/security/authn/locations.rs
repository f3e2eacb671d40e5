//! Where tokens are in a request, and taking them out again.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use mesh_core::xds::proto::l7;

use crate::request::Head;

/// Where a rule looks for tokens.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Locations {
    headers: Vec<TokenHeader>,
    params: Vec<String>,
    cookies: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct TokenHeader {
    name: HeaderName,
    prefix: String,
    /// The scheme of `Authorization` (RFC 9110, 11.1).
    ignore_case: bool,
}

/// What removes the tokens of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Removal {
    pub(super) headers: Vec<HeaderName>,
    /// The query without the tokens, if some were there.
    pub(super) query: Option<String>,
    /// The cookies without the tokens, if some were there.
    pub(super) cookies: Option<Vec<HeaderValue>>,
}

impl Locations {
    /// `Authorization: Bearer` and `access_token` of the query.
    pub(super) fn usual() -> Self {
        let bearer =
            TokenHeader { name: header::AUTHORIZATION, prefix: "Bearer ".to_owned(), ignore_case: true };
        Self { headers: vec![bearer], params: vec!["access_token".to_owned()], cookies: Vec::new() }
    }

    /// Those of a rule: what it names, else [`Self::usual`]. The error is the field and the name that is none.
    pub(super) fn of(rule: &l7::JwtRule) -> Result<Self, (&'static str, String)> {
        if rule.from_headers.is_empty() && rule.from_params.is_empty() && rule.from_cookies.is_empty() {
            return Ok(Self::usual());
        }
        let headers = rule.from_headers.iter().map(|from| {
            let name = HeaderName::try_from(from.name.as_str()).ok();
            let name = name.ok_or_else(|| ("fromHeaders", from.name.clone()))?;
            Ok(TokenHeader { name, prefix: from.prefix.clone(), ignore_case: false })
        });
        Ok(Self {
            headers: headers.collect::<Result<_, _>>()?,
            params: rule.from_params.clone(),
            cookies: rule.from_cookies.clone(),
        })
    }

    /// Every token: all of them have to hold, as the application may read any.
    pub(super) fn tokens<'h>(&self, head: &Head<'h>) -> Vec<Cow<'h, str>> {
        let mut tokens = Vec::new();
        for from in &self.headers {
            for value in head.headers.get_all(&from.name) {
                tokens.extend(from.token(value).map(Cow::Borrowed));
            }
        }
        if !self.params.is_empty() {
            let pairs = parameters(head.query.unwrap_or(""));
            let named = pairs.filter(|(name, _)| self.params.iter().any(|param| *param == unescaped(name)));
            tokens.extend(named.map(|(_, value)| unescaped(value)));
        }
        if !self.cookies.is_empty() {
            let named = cookies(head.headers).filter(|(name, _)| self.cookies.iter().any(|own| own == name));
            tokens.extend(named.map(|(_, value)| Cow::Borrowed(value)));
        }
        tokens
    }

    pub(super) fn removal(&self, head: &Head<'_>) -> Removal {
        let headers = self
            .headers
            .iter()
            .filter(|from| head.headers.get_all(&from.name).iter().any(|value| from.token(value).is_some()));
        let is_param = |name: &str| self.params.iter().any(|param| *param == unescaped(name));
        let query = head.query.filter(|query| parameters(query).any(|(name, _)| is_param(name)));
        let query = query.map(|query| {
            let kept = query.split('&').filter(|pair| !is_param(pair.split('=').next().unwrap_or("")));
            kept.collect::<Vec<_>>().join("&")
        });
        let is_cookie = |name: &str| self.cookies.iter().any(|own| own == name);
        let has_cookie = !self.cookies.is_empty() && cookies(head.headers).any(|(name, _)| is_cookie(name));
        Removal {
            headers: headers.map(|from| from.name.clone()).collect(),
            query,
            cookies: has_cookie.then(|| without_cookies(head.headers, is_cookie)),
        }
    }
}

impl TokenHeader {
    /// What follows the prefix, wherever that is. Bytes that are no text make a token that does not hold.
    fn token<'h>(&self, value: &'h HeaderValue) -> Option<&'h str> {
        let (value, prefix) = (value.as_bytes(), self.prefix.as_bytes());
        let is_prefix = |window: &[u8]| {
            if self.ignore_case { window.eq_ignore_ascii_case(prefix) } else { window == prefix }
        };
        let start = match prefix.len() {
            0 => 0,
            length => value.windows(length).position(is_prefix)? + length,
        };
        Some(std::str::from_utf8(&value[start..]).unwrap_or("no text").trim())
    }
}

/// Names and values of a query, as they are written.
fn parameters(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// Names and values of all cookies; quotes around values do not count.
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let lines = headers.get_all(header::COOKIE).iter().map(|line| line.to_str().unwrap_or(""));
    lines.flat_map(|line| line.split(';')).filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        let value = value.trim();
        let unquoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        Some((name.trim(), unquoted.unwrap_or(value)))
    })
}

fn without_cookies(headers: &HeaderMap, is_gone: impl Fn(&str) -> bool) -> Vec<HeaderValue> {
    let mut lines = Vec::new();
    for line in headers.get_all(header::COOKIE) {
        let text = line.to_str().unwrap_or("");
        let kept = text
            .split(';')
            .map(str::trim)
            .filter(|pair| !pair.is_empty() && !is_gone(pair.split('=').next().unwrap_or("").trim()));
        let kept = kept.collect::<Vec<_>>().join("; ");
        if !kept.is_empty()
            && let Ok(value) = HeaderValue::from_str(&kept)
        {
            lines.push(value);
        }
    }
    lines
}

/// Percent-decoded, so that no spelling of a name hides a token; what is not UTF-8 then is no token.
fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let digit = |b: &u8| char::from(*b).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let escape = match rest {
            [b'%', high, low, ..] => digit(high).zip(digit(low)),
            _ => None,
        };
        match escape {
            Some((high, low)) => {
                bytes.push(high << 4 | low);
                rest = &rest[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}
