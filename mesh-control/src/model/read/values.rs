//! Values that several kinds for waypoints share: durations, percentages, patterns, headers.

use std::collections::BTreeMap;

use http::uri::Authority;
use http::{HeaderName, HeaderValue};
use mesh_core::xds::proto::l7;
use prost_types::Duration;
use regex::bytes::RegexBuilder;
use serde::Deserialize;

use super::Check;

/// Protobuf's durations end here.
const LONGEST_SECONDS: u64 = 315_576_000_000;
/// Compiled size of one pattern, as waypoints bound it: a pattern from a user must not eat a proxy's memory.
const PATTERN_BYTES: usize = 256 << 10;
/// Headers that say how a message is framed or what becomes of its connection (RFC 9110, section 7.6.1): they are the
/// proxy's.
const FRAMING: [&str; 7] =
    ["connection", "content-length", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];

/// A duration as Go writes it: numbers with units, `1h30m`, `1.5s`, `250ms`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut nanos: u128 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let scale: u128 = match unit {
            "h" => 3_600_000_000_000,
            "m" => 60_000_000_000,
            "s" => 1_000_000_000,
            "ms" => 1_000_000,
            "us" | "µs" => 1_000,
            "ns" => 1,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || whole.len() > 18 || fraction.len() > 9 {
            return None;
        }
        let part = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
        nanos += part(whole)? * scale;
        nanos += part(fraction)? * scale / 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        rest = after;
    }
    let seconds = u64::try_from(nanos / 1_000_000_000).ok().filter(|s| *s <= LONGEST_SECONDS)?;
    let nanos = i32::try_from(nanos % 1_000_000_000).ok()?;
    Some(Duration { seconds: i64::try_from(seconds).ok()?, nanos })
}

/// Shares of requests are counted in millionths.
pub(super) const ALL: u32 = 1_000_000;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PercentText {
    value: f64,
}

/// `exact`, `prefix` or `regex`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StringMatchText {
    pub(super) exact: Option<String>,
    pub(super) prefix: Option<String>,
    pub(super) regex: Option<String>,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct HeadersText {
    pub(super) request: HeaderMapsText,
    pub(super) response: HeaderMapsText,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct HeaderMapsText {
    set: BTreeMap<String, String>,
    add: BTreeMap<String, String>,
    remove: Vec<String>,
}

/// Edits in either API's form.
pub(super) struct HeaderEditsText {
    pub(super) set: Vec<(String, String)>,
    pub(super) add: Vec<(String, String)>,
    pub(super) remove: Vec<String>,
}

impl From<HeaderMapsText> for HeaderEditsText {
    fn from(text: HeaderMapsText) -> Self {
        Self { set: text.set.into_iter().collect(), add: text.add.into_iter().collect(), remove: text.remove }
    }
}

impl Check<'_> {
    /// A duration; nothing when there is none.
    pub(super) fn duration(&mut self, field: &str, value: Option<&str>) -> Option<Duration> {
        let value = value?;
        let parsed = parse_duration(value);
        if parsed.is_none() {
            self.error(field, format!("{value:?} is no duration; write one such as 1.5s, 250ms or 1h"));
        }
        parsed
    }

    /// A duration of which zero means that there is none.
    pub(super) fn timeout(&mut self, field: &str, value: Option<&str>) -> Option<Duration> {
        self.duration(field, value).filter(|d| *d != Duration::default())
    }

    /// A percentage, in millionths.
    pub(super) fn percent(&mut self, field: &str, value: &PercentText) -> u32 {
        if !(0.0..=100.0).contains(&value.value) {
            self.error(format!("{field}.value"), format!("{} is no percentage; write 0 to 100", value.value));
            return 0;
        }
        // Bounded above: at most a million.
        (value.value * 10_000.0).round() as u32
    }

    /// A percentage without fractions, in millionths.
    pub(super) fn whole_percent(&mut self, field: &str, value: i64) -> u32 {
        match u32::try_from(value) {
            Ok(value) if value <= 100 => value * 10_000,
            _ => {
                self.error(field, format!("{value} is no percentage; write 0 to 100"));
                0
            }
        }
    }

    /// A number that is not negative.
    pub(super) fn count(&mut self, field: &str, value: i64) -> u32 {
        u32::try_from(value).unwrap_or_else(|_| {
            self.error(field, format!("{value} is out of range; write 0 to {}", u32::MAX));
            0
        })
    }

    /// The same, where zero means that nothing is said.
    pub(super) fn limit(&mut self, field: &str, value: Option<i64>) -> Option<u32> {
        value.map(|v| self.count(field, v)).filter(|v| *v != 0)
    }

    /// An HTTP status.
    pub(super) fn status(&mut self, field: &str, value: i64) -> u32 {
        match u32::try_from(value) {
            Ok(status) if (200..=599).contains(&status) => status,
            _ => {
                self.error(field, format!("{value} is no status; write a number from 200 to 599"));
                500
            }
        }
    }

    /// A pattern in RE2's syntax, which matches the whole value.
    pub(super) fn pattern(&mut self, field: &str, value: &str) {
        // By itself first: what is put around it must not make it valid.
        if let Err(error) = compile(value).and_then(|()| compile(&format!(r"\A(?:{value})\z"))) {
            let text = error.to_string();
            let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            self.error(field, format!("{value:?} is no regular expression of RE2: {reason}"));
        }
    }

    /// A string match. `empty` is what it means when it says nothing; none where it must say something.
    pub(super) fn string_match(
        &mut self,
        field: &str,
        text: StringMatchText,
        empty: Option<l7::string_match::Kind>,
    ) -> l7::StringMatch {
        use l7::string_match::Kind;
        let kind = match (text.exact, text.prefix, text.regex) {
            (Some(exact), None, None) => Some(Kind::Exact(exact)),
            (None, Some(prefix), None) => Some(Kind::Prefix(prefix)),
            (None, None, Some(regex)) => {
                self.pattern(&format!("{field}.regex"), &regex);
                Some(Kind::Regex(regex))
            }
            (None, None, None) => {
                if empty.is_none() {
                    self.error(field, "is empty; write one of exact, prefix, regex");
                }
                empty
            }
            _ => {
                self.error(field, "has several of exact, prefix, regex; keep one");
                None
            }
        };
        l7::StringMatch { kind, ignore_case: false }
    }

    /// The name of a header, in lower case.
    pub(super) fn header_name(&mut self, field: &str, name: &str) -> String {
        if HeaderName::from_bytes(name.as_bytes()).is_err() {
            let fix = if name.starts_with(':') { "; for :authority use a rewrite" } else { "" };
            self.error(field, format!("{name:?} is no name of a header{fix}"));
        }
        name.to_ascii_lowercase()
    }

    /// Headers with their values.
    pub(super) fn headers(
        &mut self,
        field: &str,
        given: impl IntoIterator<Item = (String, String)>,
    ) -> Vec<l7::Header> {
        let mut out = Vec::new();
        for (name, value) in given {
            let place = format!("{field}.{name}");
            if HeaderValue::from_str(&value).is_err() {
                self.error(&place, format!("{value:?} is no value of a header; write visible ASCII"));
            }
            out.push(l7::Header { name: self.header_name(&place, &name), value });
        }
        out
    }

    /// Names of headers or methods, or `*`: words of a header (RFC 9110, section 5.6.2).
    pub(super) fn tokens(&mut self, field: &str, values: &[String]) {
        for (i, value) in values.iter().enumerate() {
            if http::Method::from_bytes(value.as_bytes()).is_err() {
                self.error(format!("{field}[{i}]"), format!("{value:?} is no name of a method or header"));
            }
        }
    }

    /// A host, with or without port.
    pub(super) fn authority(&mut self, field: &str, value: &str) {
        if value.contains('@') || value.parse::<Authority>().is_err() {
            self.error(field, format!("{value:?} is no host, nor host:port"));
        }
    }

    /// Edits of the headers of requests or responses; none when there is nothing to do.
    pub(super) fn header_edits(
        &mut self,
        field: &str,
        text: HeaderEditsText,
        of_request: bool,
        unsupported: &mut Vec<String>,
    ) -> Option<l7::HeaderEdits> {
        let set = self.edits(&format!("{field}.set"), text.set, of_request, unsupported);
        let add = self.edits(&format!("{field}.add"), text.add, of_request, unsupported);
        let mut remove = Vec::new();
        for (i, name) in text.remove.iter().enumerate() {
            let place = format!("{field}.remove[{i}]");
            let name = self.header_name(&place, name);
            if FRAMING.contains(&name.as_str()) || name == "host" {
                unsupported.push(format!("{place} ({name} is the proxy's)"));
            } else {
                remove.push(name);
            }
        }
        let edits = l7::HeaderEdits { set, add, remove };
        (edits != l7::HeaderEdits::default()).then_some(edits)
    }

    fn edits(
        &mut self,
        field: &str,
        given: Vec<(String, String)>,
        of_request: bool,
        unsupported: &mut Vec<String>,
    ) -> Vec<l7::Header> {
        let mut kept = Vec::new();
        for (name, value) in given {
            let lower = name.to_ascii_lowercase();
            let place = format!("{field}.{name}");
            if has_operator(&value) {
                unsupported.push(format!("{place} (Envoy's % operators, sent as written)"));
            }
            if of_request && (lower == "host" || lower == ":authority") {
                self.authority(&place, &value);
                kept.push(l7::Header { name: "host".to_owned(), value });
            } else if FRAMING.contains(&lower.as_str()) {
                unsupported.push(format!("{place} ({lower} is the proxy's)"));
            } else {
                kept.extend(self.headers(field, [(name, value)]));
            }
        }
        kept
    }
}

/// As waypoints do it: RE2's classes (`\w`, `\d`) are ASCII, and what only the `unicode` mode has is compiled with it.
fn compile(pattern: &str) -> Result<(), regex::Error> {
    let build = |unicode: bool| {
        RegexBuilder::new(pattern).unicode(unicode).size_limit(PATTERN_BYTES).build().map(drop)
    };
    match build(false) {
        Err(regex::Error::Syntax(_)) => build(true),
        result => result,
    }
}

/// Whether a value holds what Envoy would replace: `%NAME%`, `%NAME(...)%`.
fn has_operator(value: &str) -> bool {
    let is_name = |part: &str| part.len() > 2 && part.starts_with(|c: char| c.is_ascii_uppercase());
    value.matches('%').count() >= 2 && value.split('%').skip(1).any(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let of = |text| parse_duration(text).map(|d| (d.seconds, d.nanos));
        assert_eq!(of("2s"), Some((2, 0)));
        assert_eq!(of("1.5s"), Some((1, 500_000_000)));
        assert_eq!(of("1h30m"), Some((5400, 0)));
        assert_eq!(of("250ms"), Some((0, 250_000_000)));
        assert_eq!(of("0.000000001s"), Some((0, 1)));
        assert_eq!(of("0s"), Some((0, 0)));
        for wrong in ["", "5", "s", "5 s", "-1s", "1.s.", "1d", "999999999999999999h", ".s"] {
            assert_eq!(of(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_envoy_would_replace_is_told_from_a_percent_sign() {
        assert!(has_operator("%REQ(x-id)%") && has_operator("for=%DOWNSTREAM_REMOTE_ADDRESS%"));
        assert!(!has_operator("100%") && !has_operator("50% of 100%") && !has_operator("%%"));
    }
}
