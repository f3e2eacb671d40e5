//! Filters of HTTPRoutes and GRPCRoutes.

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::string_match::Kind as Value;
use prost_types::Duration;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::l7::Reference;
use super::Check;
use super::gateway_route::{BackendText, Notes, reference};
use super::values::{ALL, HeaderEditsText};

/// How long a preflight may be remembered where nothing is said.
const CORS_MAX_AGE: i64 = 5;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct FilterText {
    #[serde(rename = "type")]
    kind: String,
    request_header_modifier: Option<ModifierText>,
    response_header_modifier: Option<ModifierText>,
    request_mirror: Option<MirrorText>,
    request_redirect: Option<RedirectText>,
    url_rewrite: Option<RewriteText>,
    cors: Option<CorsText>,
    external_auth: Option<IgnoredAny>,
    extension_ref: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ModifierText {
    set: Vec<HeaderText>,
    add: Vec<HeaderText>,
    remove: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HeaderText {
    name: String,
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MirrorText {
    backend_ref: BackendText,
    percent: Option<i64>,
    fraction: Option<FractionText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FractionText {
    numerator: i64,
    denominator: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RedirectText {
    scheme: String,
    hostname: String,
    path: Option<PathText>,
    port: Option<i64>,
    status_code: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RewriteText {
    hostname: String,
    path: Option<PathText>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PathText {
    #[serde(rename = "type")]
    kind: PathType,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum PathType {
    ReplaceFullPath,
    ReplacePrefixMatch,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct CorsText {
    allow_origins: Vec<String>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    allow_credentials: bool,
    max_age: Option<i64>,
}

/// What the filters of a rule or backend come to.
#[derive(Debug, Default)]
pub(super) struct Filters {
    pub(super) request_headers: Option<l7::HeaderEdits>,
    pub(super) response_headers: Option<l7::HeaderEdits>,
    pub(super) redirect: Option<l7::Redirect>,
    pub(super) rewrite: Option<l7::Rewrite>,
    pub(super) cors: Option<l7::Cors>,
    /// Mirrors without their backends, and what these are.
    pub(super) mirrors: Vec<(l7::Mirror, Reference)>,
}

impl Filters {
    pub(super) fn replaces_prefix(&self) -> bool {
        let redirect = self.redirect.as_ref().and_then(|r| r.path.as_ref());
        let rewrite = self.rewrite.as_ref().and_then(|r| r.path.as_ref());
        matches!(redirect, Some(l7::redirect::Path::Prefix(_)))
            || matches!(rewrite, Some(l7::rewrite::Path::Prefix(_)))
    }
}

/// Reads the filters of one place. Each kind but mirrors may be there once.
pub(super) fn filters(
    given: Vec<FilterText>,
    field: &str,
    grpc: bool,
    check: &mut Check<'_>,
    notes: &mut Notes,
) -> Filters {
    let mut out = Filters::default();
    let mut seen: Vec<String> = Vec::new();
    for (i, filter) in given.into_iter().enumerate() {
        let field = format!("{field}[{i}]");
        let kind = filter.kind.clone();
        if kind != "RequestMirror" && seen.contains(&kind) {
            check.error(format!("{field}.type"), format!("{kind} is there already; a rule has it once"));
        }
        if grpc && ["RequestRedirect", "URLRewrite", "CORS", "ExternalAuth"].contains(&kind.as_str()) {
            check.error(format!("{field}.type"), format!("{kind} is no filter of a GRPCRoute"));
        }
        seen.push(kind);
        one(filter, &field, &mut out, check, notes);
    }
    if out.redirect.is_some() && out.rewrite.is_some() {
        check.error(field, "has RequestRedirect and URLRewrite; keep one");
    }
    out
}

fn one(filter: FilterText, field: &str, out: &mut Filters, check: &mut Check<'_>, notes: &mut Notes) {
    let at = |name: &str| format!("{field}.{name}");
    let missing =
        |name: &str, check: &mut Check<'_>| check.error(at(name), "missing; the filter's type needs it");
    match filter.kind.as_str() {
        "RequestHeaderModifier" => match filter.request_header_modifier {
            Some(text) => {
                out.request_headers = modifier(text, &at("requestHeaderModifier"), true, check, notes)
            }
            None => missing("requestHeaderModifier", check),
        },
        "ResponseHeaderModifier" => match filter.response_header_modifier {
            Some(text) => {
                out.response_headers = modifier(text, &at("responseHeaderModifier"), false, check, notes)
            }
            None => missing("responseHeaderModifier", check),
        },
        "RequestMirror" => match filter.request_mirror {
            Some(text) => out.mirrors.push(mirror(text, &at("requestMirror"), check)),
            None => missing("requestMirror", check),
        },
        "RequestRedirect" => match filter.request_redirect {
            Some(text) => out.redirect = Some(redirect(text, &at("requestRedirect"), check)),
            None => missing("requestRedirect", check),
        },
        "URLRewrite" => match filter.url_rewrite {
            Some(text) => out.rewrite = Some(rewrite(text, &at("urlRewrite"), check)),
            None => missing("urlRewrite", check),
        },
        "CORS" => match filter.cors {
            Some(text) => out.cors = Some(cors(text, &at("cors"), check)),
            None => missing("cors", check),
        },
        kind @ ("ExternalAuth" | "ExtensionRef") => notes.refused.push(format!("{field} ({kind})")),
        other => check.error(
            at("type"),
            format!(
                "{other:?} is unknown; write RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, \
                 RequestRedirect, URLRewrite or CORS"
            ),
        ),
    }
}

fn modifier(
    text: ModifierText,
    field: &str,
    of_request: bool,
    check: &mut Check<'_>,
    notes: &mut Notes,
) -> Option<l7::HeaderEdits> {
    let pairs = |given: Vec<HeaderText>| given.into_iter().map(|h| (h.name, h.value)).collect();
    let edits = HeaderEditsText { set: pairs(text.set), add: pairs(text.add), remove: text.remove };
    check.header_edits(field, edits, of_request, &mut notes.unsupported)
}

fn mirror(text: MirrorText, field: &str, check: &mut Check<'_>) -> (l7::Mirror, Reference) {
    let share = match (text.percent, text.fraction) {
        (Some(_), Some(_)) => {
            check.error(format!("{field}.percent"), "may not stand beside fraction; keep one of the two");
            0
        }
        (Some(percent), None) => check.whole_percent(&format!("{field}.percent"), percent),
        (None, Some(fraction)) => {
            let denominator = fraction.denominator.unwrap_or(100);
            if denominator < 1 || !(0..=denominator).contains(&fraction.numerator) {
                check.error(format!("{field}.fraction"), "is no share; write 0 <= numerator <= denominator");
                0
            } else {
                let share = i128::from(fraction.numerator) * i128::from(ALL) / i128::from(denominator);
                u32::try_from(share).unwrap_or(ALL)
            }
        }
        (None, None) => ALL,
    };
    let reference = reference(text.backend_ref, &format!("{field}.backendRef"), check);
    (l7::Mirror { backend: None, parts_per_million: share }, reference)
}

/// What replaces the path, which the type says: full or prefix.
fn path(text: PathText, field: &str, check: &mut Check<'_>) -> Option<(PathType, String)> {
    let (name, wanted, other) = match text.kind {
        PathType::ReplaceFullPath => ("replaceFullPath", text.replace_full_path, text.replace_prefix_match),
        PathType::ReplacePrefixMatch => {
            ("replacePrefixMatch", text.replace_prefix_match, text.replace_full_path)
        }
    };
    if other.is_some() {
        check.error(field, format!("has a value for another type; keep {name}"));
    }
    if wanted.is_none() {
        check.error(format!("{field}.{name}"), "missing; the type needs it");
    }
    wanted.map(|value| (text.kind, value))
}

fn redirect(text: RedirectText, field: &str, check: &mut Check<'_>) -> l7::Redirect {
    use l7::redirect::{DerivePort, Path};
    let at = |name: &str| format!("{field}.{name}");
    if !["", "http", "https"].contains(&text.scheme.as_str()) {
        check.error(at("scheme"), format!("{:?} is no scheme; write http or https", text.scheme));
    }
    if !text.hostname.is_empty() {
        check.authority(&at("hostname"), &text.hostname);
    }
    let status = match text.status_code {
        None => 302,
        Some(code @ (301 | 302 | 303 | 307 | 308)) => u32::try_from(code).unwrap_or(302),
        Some(other) => {
            check.error(at("statusCode"), format!("{other} is no redirect; write 301, 302, 303, 307 or 308"));
            302
        }
    };
    let path = text.path.and_then(|p| path(p, &at("path"), check)).map(|(kind, value)| match kind {
        PathType::ReplaceFullPath => Path::Full(value),
        PathType::ReplacePrefixMatch => Path::Prefix(value),
    });
    // Without a port: the scheme's own when a scheme is given, else that of the request.
    let derive_port =
        if text.scheme.is_empty() { DerivePort::FromRequestPort } else { DerivePort::FromProtocolDefault };
    let port = text.port.map_or(0, |p| check.port(&at("port"), p));
    l7::Redirect {
        scheme: text.scheme,
        authority: text.hostname,
        port: port.into(),
        derive_port: derive_port.into(),
        status,
        path,
    }
}

fn rewrite(text: RewriteText, field: &str, check: &mut Check<'_>) -> l7::Rewrite {
    use l7::rewrite::Path;
    let path =
        text.path.and_then(|p| path(p, &format!("{field}.path"), check)).map(|(kind, value)| match kind {
            PathType::ReplaceFullPath => Path::Full(value),
            PathType::ReplacePrefixMatch => Path::Prefix(value),
        });
    if !text.hostname.is_empty() {
        check.authority(&format!("{field}.hostname"), &text.hostname);
    } else if path.is_none() {
        check.error(field, "is empty; write hostname or path");
    }
    l7::Rewrite { authority: text.hostname, path }
}

fn cors(text: CorsText, field: &str, check: &mut Check<'_>) -> l7::Cors {
    let mut allow_origins = Vec::new();
    for (i, origin) in text.allow_origins.into_iter().enumerate() {
        let kind = if origin == "*" {
            Value::Present(true)
        } else if origin.contains('*') {
            let parts: Vec<String> = origin.split('*').map(regex::escape).collect();
            Value::Regex(parts.join(".+"))
        } else {
            if !origin.contains("://") {
                let place = format!("{field}.allowOrigins[{i}]");
                check.error(place, format!("{origin:?} is no origin; write scheme://host, or *"));
            }
            Value::Exact(origin)
        };
        allow_origins.push(l7::StringMatch { kind: Some(kind), ignore_case: false });
    }
    for (name, values) in [
        ("allowMethods", &text.allow_methods),
        ("allowHeaders", &text.allow_headers),
        ("exposeHeaders", &text.expose_headers),
    ] {
        check.tokens(&format!("{field}.{name}"), values);
    }
    let max_age = text.max_age.unwrap_or(CORS_MAX_AGE);
    if max_age < 1 {
        check.error(format!("{field}.maxAge"), format!("{max_age} is out of range; write seconds from 1"));
    }
    l7::Cors {
        allow_origins,
        allow_methods: text.allow_methods,
        allow_headers: text.allow_headers,
        expose_headers: text.expose_headers,
        max_age: Some(Duration { seconds: max_age.max(0), nanos: 0 }),
        allow_credentials: text.allow_credentials,
        forward_unmatched_preflights: false,
    }
}
