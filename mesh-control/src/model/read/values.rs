//! Values that several kinds for waypoints share: durations, percentages, patterns, headers.

use std::collections::BTreeMap;

use http::{HeaderName, HeaderValue};
use mesh_core::xds::proto::l7;
use prost_types::Duration;
use regex::RegexBuilder;
use serde::Deserialize;

use super::Check;

/// Protobuf's durations end here.
const LONGEST_SECONDS: u64 = 315_576_000_000;
/// Compiled size of one pattern, as Envoy's waypoints bound it: a pattern from a user must not eat a proxy's memory.
const PATTERN_BYTES: usize = 1 << 20;

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
    pub(super) request: HeaderEditsText,
    pub(super) response: HeaderEditsText,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct HeaderEditsText {
    set: BTreeMap<String, String>,
    add: BTreeMap<String, String>,
    remove: Vec<String>,
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
        if let Err(error) = RegexBuilder::new(value).size_limit(PATTERN_BYTES).build() {
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

    /// Edits of headers; none when there is nothing to do.
    pub(super) fn header_edits(
        &mut self,
        field: &str,
        text: HeaderEditsText,
        unsupported: &mut Vec<String>,
    ) -> Option<l7::HeaderEdits> {
        for (verb, given) in [("set", &text.set), ("add", &text.add)] {
            for (name, _) in given.iter().filter(|(_, value)| has_operator(value)) {
                unsupported.push(format!("{field}.{verb}.{name} (Envoy's % operators, sent as written)"));
            }
        }
        let set = self.headers(&format!("{field}.set"), text.set);
        let add = self.headers(&format!("{field}.add"), text.add);
        let remove = text.remove.iter().enumerate();
        let remove =
            remove.map(|(i, name)| self.header_name(&format!("{field}.remove[{i}]"), name)).collect();
        let edits = l7::HeaderEdits { set, add, remove };
        (edits != l7::HeaderEdits::default()).then_some(edits)
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
