//! What rules of a VirtualService do beside forwarding: redirect, rewrite, CORS, faults.

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::fault::{Abort, Delay, abort};
use mesh_core::xds::proto::l7::string_match::Kind;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Check;
use super::values::{PercentText, StringMatchText};

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RedirectText {
    uri: String,
    prefix_rewrite: String,
    authority: String,
    port: Option<i64>,
    derive_port: Option<DerivePortText>,
    scheme: String,
    redirect_code: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum DerivePortText {
    FromProtocolDefault,
    FromRequestPort,
}

pub(super) fn redirect(text: &RedirectText, field: &str, check: &mut Check<'_>) -> l7::Redirect {
    use l7::redirect::{DerivePort, Path};
    let at = |name: &str| format!("{field}.{name}");
    let path = match (text.uri.is_empty(), text.prefix_rewrite.is_empty()) {
        (false, false) => {
            check.error(at("uri"), "may not stand beside prefixRewrite; keep one of the two");
            None
        }
        (false, true) => Some(Path::Full(text.uri.clone())),
        (true, false) => Some(Path::Prefix(text.prefix_rewrite.clone())),
        (true, true) => None,
    };
    if text.port.is_some() && text.derive_port.is_some() {
        check.error(at("port"), "may not stand beside derivePort; keep one of the two");
    }
    let derive_port = match text.derive_port {
        None => DerivePort::Keep,
        Some(DerivePortText::FromProtocolDefault) => DerivePort::FromProtocolDefault,
        Some(DerivePortText::FromRequestPort) => DerivePort::FromRequestPort,
    };
    let status = match text.redirect_code {
        None | Some(0) => 301,
        Some(code @ (301 | 302 | 303 | 307 | 308)) => u32::try_from(code).unwrap_or(301),
        Some(other) => {
            check.error(
                at("redirectCode"),
                format!("{other} is no redirect; write 301, 302, 303, 307 or 308"),
            );
            301
        }
    };
    if !text.authority.is_empty() {
        check.authority(&at("authority"), &text.authority);
    }
    let is_scheme = |scheme: &str| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
    };
    if !text.scheme.is_empty() && !is_scheme(&text.scheme) {
        check.error(at("scheme"), format!("{:?} is no scheme; write http or https", text.scheme));
    }
    if text == &RedirectText::default() {
        check.error(field, "is empty; write at least one of uri, prefixRewrite, authority, scheme, port");
    }
    l7::Redirect {
        scheme: text.scheme.clone(),
        authority: text.authority.clone(),
        port: text.port.map_or(0, |p| check.port(&at("port"), p)).into(),
        derive_port: derive_port.into(),
        status,
        path,
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RewriteText {
    uri: String,
    authority: String,
    uri_regex_rewrite: Option<RegexRewriteText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RegexRewriteText {
    #[serde(rename = "match")]
    pattern: String,
    rewrite: String,
}

/// The new path replaces what a prefix match has matched, and the whole path under any other match (as Envoy does).
pub(super) fn rewrite(text: RewriteText, field: &str, check: &mut Check<'_>) -> Option<l7::Rewrite> {
    use l7::rewrite::Path;
    if !text.authority.is_empty() {
        check.authority(&format!("{field}.authority"), &text.authority);
    }
    let path = match (text.uri.is_empty(), text.uri_regex_rewrite) {
        (false, Some(_)) => {
            check.error(format!("{field}.uri"), "may not stand beside uriRegexRewrite; keep one of the two");
            None
        }
        (true, Some(regex)) => {
            let place = format!("{field}.uriRegexRewrite.match");
            if regex.pattern.is_empty() {
                check.error(&place, "missing; write the pattern that is replaced");
            }
            check.pattern(&place, &regex.pattern);
            replacement(&regex, &format!("{field}.uriRegexRewrite.rewrite"), check);
            Some(Path::Regex(l7::RegexRewrite { pattern: regex.pattern, replacement: regex.rewrite }))
        }
        (false, None) => Some(Path::Prefix(text.uri)),
        (true, None) if text.authority.is_empty() => {
            check.error(field, "is empty; write at least one of uri, authority, uriRegexRewrite");
            return None;
        }
        (true, None) => None,
    };
    Some(l7::Rewrite { authority: text.authority, path })
}

/// A replacement names groups of its pattern by `\1`, and a backslash by two.
fn replacement(text: &RegexRewriteText, field: &str, check: &mut Check<'_>) {
    // The pattern itself is checked elsewhere.
    let groups = regex::Regex::new(&text.pattern).map_or(10, |pattern| pattern.captures_len());
    let mut characters = text.rewrite.chars();
    while let Some(character) = characters.next() {
        if character != '\\' {
            continue;
        }
        match characters.next() {
            Some('\\') => {}
            Some(digit @ '0'..='9') if (digit as usize - '0' as usize) < groups => {}
            Some(digit @ '0'..='9') => {
                check.error(field, format!("names group {digit}, and the pattern has {}", groups - 1));
            }
            _ => check.error(field, "has a single backslash; write \\\\ for one, or \\1 for a group"),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CorsText {
    allow_origin: Vec<String>,
    allow_origins: Vec<StringMatchText>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    max_age: Option<String>,
    allow_credentials: Option<bool>,
    unmatched_preflights: PreflightsText,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum PreflightsText {
    #[default]
    Unspecified,
    Forward,
    Ignore,
}

pub(super) fn cors(text: CorsText, field: &str, check: &mut Check<'_>) -> l7::Cors {
    // `*` is any origin, also where it is written as an exact value.
    let any = |kind: Option<Kind>| match kind {
        Some(Kind::Exact(value)) if value == "*" => Some(Kind::Present(true)),
        other => other,
    };
    let mut allow_origins = Vec::new();
    for origin in text.allow_origin {
        allow_origins.push(l7::StringMatch { kind: any(Some(Kind::Exact(origin))), ignore_case: false });
    }
    for (i, origin) in text.allow_origins.into_iter().enumerate() {
        let found = check.string_match(&format!("{field}.allowOrigins[{i}]"), origin, None);
        allow_origins.push(l7::StringMatch { kind: any(found.kind), ..found });
    }
    for (name, values) in [
        ("allowMethods", &text.allow_methods),
        ("allowHeaders", &text.allow_headers),
        ("exposeHeaders", &text.expose_headers),
    ] {
        check.tokens(&format!("{field}.{name}"), values);
    }
    l7::Cors {
        allow_origins,
        allow_methods: text.allow_methods,
        allow_headers: text.allow_headers,
        expose_headers: text.expose_headers,
        max_age: check.duration(&format!("{field}.maxAge"), text.max_age.as_deref()),
        allow_credentials: text.allow_credentials.unwrap_or_default(),
        forward_unmatched_preflights: text.unmatched_preflights != PreflightsText::Ignore,
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FaultText {
    delay: Option<DelayText>,
    abort: Option<AbortText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DelayText {
    fixed_delay: Option<String>,
    exponential_delay: Option<IgnoredAny>,
    percentage: Option<PercentText>,
    percent: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AbortText {
    http_status: Option<i64>,
    grpc_status: Option<String>,
    http2_error: Option<IgnoredAny>,
    percentage: Option<PercentText>,
    percent: Option<i64>,
}

pub(super) fn fault(
    text: FaultText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> Option<l7::Fault> {
    let mut share =
        |part: &str, percentage: Option<PercentText>, percent: Option<i64>, check: &mut Check<'_>| {
            let at = |name: &str| format!("{field}.{part}.{name}");
            match (percentage, percent) {
                (Some(percentage), _) => check.percent(&at("percentage"), &percentage),
                (None, Some(percent)) => check.whole_percent(&at("percent"), percent),
                (None, None) => {
                    unsupported.push(format!("{field}.{part} (without percentage it is for no request)"));
                    0
                }
            }
        };
    let delay = text.delay.map(|delay| {
        let place = format!("{field}.delay.fixedDelay");
        if delay.exponential_delay.is_some() {
            check.error(format!("{field}.delay.exponentialDelay"), "is not implemented; write fixedDelay");
        } else if delay.fixed_delay.is_none() {
            check.error(&place, "missing; write for how long requests are held, for example 5s");
        }
        let fixed = check.duration(&place, delay.fixed_delay.as_deref());
        Delay { fixed, parts_per_million: share("delay", delay.percentage, delay.percent, check) }
    });
    let abort = text.abort.map(|given| {
        let at = |name: &str| format!("{field}.abort.{name}");
        let kind = match (given.http_status, given.grpc_status) {
            (Some(status), None) => Some(abort::Kind::HttpStatus(check.status(&at("httpStatus"), status))),
            (None, Some(status)) => grpc_status(&status).map(abort::Kind::GrpcStatus).or_else(|| {
                check.error(
                    at("grpcStatus"),
                    format!("{status:?} is no status of gRPC; write one such as UNAVAILABLE, or its number"),
                );
                None
            }),
            (Some(_), Some(_)) => {
                check.error(at("httpStatus"), "may not stand beside grpcStatus; keep one of the two");
                None
            }
            (None, None) => {
                let fix = "write httpStatus or grpcStatus";
                let what =
                    if given.http2_error.is_some() { "http2Error is not implemented" } else { "is empty" };
                check.error(format!("{field}.abort"), format!("{what}; {fix}"));
                None
            }
        };
        Abort { kind, parts_per_million: share("abort", given.percentage, given.percent, check) }
    });
    if delay.is_none() && abort.is_none() {
        check.error(field, "is empty; write delay or abort");
        return None;
    }
    Some(l7::Fault { delay, abort })
}

/// Codes of gRPC by their numbers.
const GRPC: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

fn grpc_status(text: &str) -> Option<u32> {
    let named = GRPC.iter().position(|name| *name == text).and_then(|n| u32::try_from(n).ok());
    named.or_else(|| text.parse().ok().filter(|n| *n <= 16))
}
