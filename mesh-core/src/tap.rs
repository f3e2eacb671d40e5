//! Requests at waypoints, one by one, for who listens: what `GET /tap` of a waypoint answers and `meshctl tap` asks for.

use serde::{Deserialize, Serialize};

/// What stands for a value that nobody is shown.
pub const REDACTED: &str = "[redacted]";

/// Headers whose values are secrets. Others are by their names: see [`is_secret`].
const SECRETS: [&str; 6] =
    ["authorization", "proxy-authorization", "cookie", "set-cookie", "x-forwarded-client-cert", "x-csrf"];
/// Parts of the names of headers and query parameters whose values are secrets.
const SECRET_PARTS: [&str; 9] =
    ["token", "secret", "passw", "api-key", "apikey", "api_key", "signature", "session", "credential"];

/// A request that has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Tapped {
    /// When it ended, microseconds since 1970.
    pub at_us: u64,
    /// `namespace/name` of the waypoint.
    pub waypoint: String,
    /// Method.
    pub method: String,
    /// Host, as the client wrote it.
    pub host: String,
    /// Path and query; values of parameters that sound secret are not shown.
    pub path: String,
    /// `HTTP/1.1` or `HTTP/2`.
    pub protocol: String,
    /// `namespace/name` of the client's workload; empty when it is unknown.
    pub source: String,
    /// Address of the client.
    pub source_address: String,
    /// SPIFFE identity of the client; empty at gateways.
    pub identity: String,
    /// Hostname of the service that was meant.
    pub service: String,
    /// Status; 0 when there was none.
    pub status: u16,
    /// gRPC status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u16>,
    /// Envoy's response flags; `-` for none.
    pub flags: String,
    /// Who decided the answer, in Envoy's words.
    pub details: String,
    /// From the head of the request to the end of the answer.
    pub duration_us: u64,
    /// Bytes of the request's body.
    pub received: u64,
    /// Bytes of the answer's body.
    pub sent: u64,
    /// `Kind/namespace/name` of the object and the name of its rule; empty: none was needed.
    pub route: String,
    /// `namespace/name` of the endpoint's workload.
    pub endpoint: String,
    /// Address of the endpoint; empty: none was chosen.
    pub endpoint_address: String,
    /// Tries beyond the first.
    pub retries: u32,
    /// `x-request-id`.
    pub request_id: String,
    /// Headers of the request, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub request_headers: Vec<(String, String)>,
    /// Headers of the answer, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub response_headers: Vec<(String, String)>,
}

/// Answer of `GET /tap`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Batch {
    /// What to give as `since` next.
    pub next: u64,
    /// Requests since the last answer that found no room.
    pub lost: u64,
    /// Those that were kept.
    pub requests: Vec<Tapped>,
}

/// Which requests somebody wants to see; all conditions that are given have to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// The host, without its port.
    pub host: Option<String>,
    /// What the path begins with.
    pub path: Option<String>,
    /// The method.
    pub method: Option<String>,
    /// Statuses.
    pub status: Option<Statuses>,
    /// Part of the client's identity.
    pub identity: Option<String>,
    /// Whether headers are shown.
    pub headers: bool,
    /// Whether secrets are shown, too.
    pub unredacted: bool,
}

/// Statuses, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statuses(pub u16, pub u16);

/// A condition that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("status {0:?} is none: give one (503), a class (5xx) or two with a dash (400-499)")]
pub struct InvalidStatus(String);

impl std::str::FromStr for Statuses {
    type Err = InvalidStatus;

    fn from_str(text: &str) -> Result<Self, InvalidStatus> {
        let wrong = || InvalidStatus(text.to_owned());
        let number = |text: &str| text.parse::<u16>().ok().filter(|status| *status < 600);
        if let Some(class) = text.strip_suffix("xx") {
            let class = number(class).filter(|class| (1..=5).contains(class)).ok_or_else(wrong)?;
            return Ok(Self(class * 100, class * 100 + 99));
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self(number(first).ok_or_else(wrong)?, number(last).ok_or_else(wrong)?);
        if range.0 <= range.1 { Ok(range) } else { Err(wrong()) }
    }
}

impl std::fmt::Display for Statuses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

impl Filter {
    /// Reads the conditions; `given` has the text of each by its name.
    ///
    /// # Errors
    /// A status that is none.
    pub fn parse(given: impl Fn(&str) -> Option<String>) -> Result<Self, InvalidStatus> {
        let given = |name: &str| given(name).filter(|text| !text.is_empty());
        Ok(Self {
            host: given("host").map(|host| host.to_ascii_lowercase()),
            path: given("path"),
            method: given("method").map(|method| method.to_ascii_uppercase()),
            status: given("status").map(|text| text.parse()).transpose()?,
            identity: given("identity"),
            headers: given("headers").is_some(),
            unredacted: given("unredacted").is_some(),
        })
    }

    /// The conditions by name, as [`Self::parse`] reads them.
    #[must_use]
    pub fn parameters(&self) -> Vec<(&'static str, String)> {
        let flag = |set: bool| set.then(|| "1".to_owned());
        let all = [
            ("host", self.host.clone()),
            ("path", self.path.clone()),
            ("method", self.method.clone()),
            ("status", self.status.map(|status| status.to_string())),
            ("identity", self.identity.clone()),
            ("headers", flag(self.headers)),
            ("unredacted", flag(self.unredacted)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Whether a request is among those that are wanted.
    #[must_use]
    pub fn wants(&self, request: &Tapped) -> bool {
        let without_port = |host: &str| match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name.to_ascii_lowercase(),
            _ => host.to_ascii_lowercase(),
        };
        self.host.as_ref().is_none_or(|host| without_port(&request.host) == *host)
            && self.path.as_ref().is_none_or(|path| request.path.starts_with(path.as_str()))
            && self.method.as_ref().is_none_or(|method| request.method == *method)
            && self.status.is_none_or(|Statuses(first, last)| (first..=last).contains(&request.status))
            && self.identity.as_ref().is_none_or(|part| request.identity.contains(part.as_str()))
    }

    /// The request as whoever gave these conditions may see it.
    #[must_use]
    pub fn shown(&self, request: &Tapped) -> Tapped {
        let headers = |all: &[(String, String)]| -> Vec<(String, String)> {
            let all = all.iter().filter(|_| self.headers);
            all.map(|(name, value)| {
                let hide = !self.unredacted && is_secret(name);
                (name.clone(), if hide { REDACTED.to_owned() } else { value.clone() })
            })
            .collect()
        };
        let path = if self.unredacted { request.path.clone() } else { without_secrets(&request.path) };
        Tapped {
            path,
            request_headers: headers(&request.request_headers),
            response_headers: headers(&request.response_headers),
            ..request.clone()
        }
    }
}

/// Whether the value of a header or parameter of this name is shown to nobody who did not ask for it.
#[must_use]
pub fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRETS.contains(&name.as_str()) || SECRET_PARTS.iter().any(|part| name.contains(part))
}

fn without_secrets(path: &str) -> String {
    let Some((path, query)) = path.split_once('?') else { return path.to_owned() };
    let parts: Vec<String> = query
        .split('&')
        .map(|pair| match pair.split_once('=') {
            Some((name, _)) if is_secret(name) => format!("{name}={REDACTED}"),
            _ => pair.to_owned(),
        })
        .collect();
    format!("{path}?{}", parts.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Tapped {
        Tapped {
            method: "GET".into(),
            host: "Shop.example:8080".into(),
            path: "/pay/x?access_token=abc&page=2".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/frontend".into(),
            status: 503,
            request_headers: vec![
                ("authorization".into(), "Bearer abc".into()),
                ("x-api-key".into(), "k".into()),
                ("accept".into(), "*/*".into()),
            ],
            ..Tapped::default()
        }
    }

    fn filter(name: &'static str, value: &'static str) -> Filter {
        Filter::parse(|asked| (asked == name).then(|| value.to_owned())).unwrap()
    }

    #[test]
    fn each_condition_selects_and_is_read_as_it_is_written() {
        for (name, fits, does_not) in [
            ("host", "shop.example", "example"),
            ("path", "/pay/", "/y"),
            ("method", "get", "POST"),
            ("status", "5xx", "500"),
            ("status", "500-503", "4xx"),
            ("identity", "/sa/frontend", "/sa/other"),
        ] {
            assert!(filter(name, fits).wants(&request()), "{name}={fits}");
            assert!(!filter(name, does_not).wants(&request()), "{name}={does_not}");
            let filter = filter(name, fits);
            let written = filter.parameters();
            let value = |asked: &str| written.iter().find(|(n, _)| *n == asked).map(|(_, v)| v.clone());
            assert_eq!(Filter::parse(value).unwrap(), filter);
        }
    }

    #[test]
    fn a_status_that_is_none_says_what_would_be_one() {
        for bad in ["6xx", "abc", "500-400", "0xx", "700"] {
            let error = bad.parse::<Statuses>().unwrap_err().to_string();
            assert!(error.contains("5xx"), "{error}");
        }
    }

    #[test]
    fn headers_come_only_where_asked_for_and_secrets_only_where_asked_for_by_name() {
        assert!(Filter::default().shown(&request()).request_headers.is_empty());
        let shown = filter("headers", "1").shown(&request());
        let value = |name: &str| &shown.request_headers.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(
            (value("authorization"), value("x-api-key")),
            (&REDACTED.to_owned(), &REDACTED.to_owned())
        );
        assert_eq!(value("accept"), "*/*");
        assert_eq!(shown.path, "/pay/x?access_token=[redacted]&page=2");
        let all = Filter { headers: true, unredacted: true, ..Filter::default() };
        assert_eq!(all.shown(&request()), request());
    }
}
