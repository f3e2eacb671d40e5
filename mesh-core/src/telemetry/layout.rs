//! Layouts of access logs in Envoy's command operators, such as `%REQ(:METHOD)%`; as text or as JSON. Pure.
//!
//! Operators and their values: Envoy's "Access logging" reference; the layouts that nobody wrote are Istio's.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::xds::proto::l7::LogLayout;

/// Istio's text where MeshConfig has none.
const DEFAULT_TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
     %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
     \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
     %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
     \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% \
     %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% \
     %ROUTE_NAME%\n";
/// Istio's JSON where MeshConfig has none.
const DEFAULT_JSON: &[(&str, &str)] = &[
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
];
/// `START_TIME` without a format.
const DEFAULT_TIME: &str = "%Y-%m-%dT%H:%M:%E3SZ";
/// What Envoy writes for what is not there.
const ABSENT: &str = "-";
/// Nested mappings of a JSON layout.
const DEEPEST: usize = 8;

macro_rules! fields {
    ($($name:ident $text:literal;)*) => {
        /// A command operator without arguments.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the names are Envoy's own")]
        pub enum Field { $($name,)* }
        const FIELDS: &[(Field, &str)] = &[$((Field::$name, $text)),*];
    };
}

fields! {
    BytesReceived "BYTES_RECEIVED";
    BytesSent "BYTES_SENT";
    ConnectionTerminationDetails "CONNECTION_TERMINATION_DETAILS";
    DownstreamDirectRemoteAddress "DOWNSTREAM_DIRECT_REMOTE_ADDRESS";
    DownstreamDirectRemoteIp "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT";
    DownstreamLocalAddress "DOWNSTREAM_LOCAL_ADDRESS";
    DownstreamLocalIp "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT";
    DownstreamLocalPort "DOWNSTREAM_LOCAL_PORT";
    DownstreamLocalUriSan "DOWNSTREAM_LOCAL_URI_SAN";
    DownstreamPeerUriSan "DOWNSTREAM_PEER_URI_SAN";
    DownstreamRemoteAddress "DOWNSTREAM_REMOTE_ADDRESS";
    DownstreamRemoteIp "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT";
    DownstreamRemotePort "DOWNSTREAM_REMOTE_PORT";
    Duration "DURATION";
    GrpcStatusNumber "GRPC_STATUS_NUMBER";
    Hostname "HOSTNAME";
    Protocol "PROTOCOL";
    RequestedServerName "REQUESTED_SERVER_NAME";
    ResponseCode "RESPONSE_CODE";
    ResponseCodeDetails "RESPONSE_CODE_DETAILS";
    ResponseFlags "RESPONSE_FLAGS";
    RouteName "ROUTE_NAME";
    TraceId "TRACE_ID";
    UpstreamCluster "UPSTREAM_CLUSTER";
    UpstreamClusterRaw "UPSTREAM_CLUSTER_RAW";
    UpstreamHost "UPSTREAM_HOST";
    UpstreamPeerUriSan "UPSTREAM_PEER_URI_SAN";
    UpstreamRequestAttemptCount "UPSTREAM_REQUEST_ATTEMPT_COUNT";
    UpstreamTransportFailureReason "UPSTREAM_TRANSPORT_FAILURE_REASON";
}

/// Operators of Envoy that have nothing to say at a waypoint: always absent.
const SILENT: &[&str] = &[
    "ACCESS_LOG_TYPE",
    "CEL",
    "CONNECTION_ID",
    "DOWNSTREAM_PEER_CERT",
    "DOWNSTREAM_PEER_ISSUER",
    "DOWNSTREAM_PEER_SUBJECT",
    "DOWNSTREAM_TLS_CIPHER",
    "DOWNSTREAM_TLS_VERSION",
    "DOWNSTREAM_TRANSPORT_FAILURE_REASON",
    "DYNAMIC_METADATA",
    "FILTER_CHAIN_NAME",
    "FILTER_STATE",
    "GRPC_STATUS",
    "METADATA",
    "REQUEST_DURATION",
    "REQUEST_HEADERS_BYTES",
    "REQUEST_TX_DURATION",
    "RESPONSE_DURATION",
    "RESPONSE_FLAGS_LONG",
    "RESPONSE_HEADERS_BYTES",
    "RESPONSE_TX_DURATION",
    "STREAM_ID",
    "UNIQUE_ID",
    "UPSTREAM_FILTER_STATE",
    "UPSTREAM_LOCAL_ADDRESS",
    "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_METADATA",
    "UPSTREAM_REMOTE_ADDRESS",
    "UPSTREAM_WIRE_BYTES_RECEIVED",
    "UPSTREAM_WIRE_BYTES_SENT",
    "VIRTUAL_CLUSTER_NAME",
];

/// Which headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Of the request, `:method`, `:path`, `:authority` and `:scheme` among them.
    Request,
    /// Of the answer.
    Response,
    /// After the answer.
    Trailers,
}

/// What an operator stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact<'a> {
    /// Not there.
    Absent,
    /// Text.
    Text(Cow<'a, str>),
    /// A number, also in JSON.
    Number(u64),
}

impl<'a> From<&'a str> for Fact<'a> {
    /// Empty is absent.
    fn from(text: &'a str) -> Self {
        if text.is_empty() { Self::Absent } else { Self::Text(text.into()) }
    }
}

/// Where a line gets its values.
pub trait Facts {
    /// When the request came.
    fn started(&self) -> SystemTime;
    /// An operator without arguments.
    fn field(&self, field: Field) -> Fact<'_>;
    /// The values of a header, by its name in lower case.
    fn header(&self, part: Part, name: &str) -> Option<Cow<'_, str>>;
}

/// Why a layout cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No such operator.
    #[error("%{0}% is no command operator of Envoy{1}")]
    Unknown(String, String),
    /// A `%` without its other.
    #[error("{0:?} has a % that is not closed; write %% for a percent sign")]
    Open(String),
    /// Wrong arguments.
    #[error("%{0}% {1}")]
    Arguments(String, &'static str),
    /// Not JSON, or not an object.
    #[error("is no JSON object with texts, numbers and further objects in it: {0}")]
    Json(String),
}

/// A layout that is ready to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// Text, with the end of the line.
    Text(Template),
    /// One JSON object per line.
    Json(Vec<(String, Node)>),
}

/// A value of a JSON layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A text with operators.
    Template(Template),
    /// An object.
    Object(Vec<(String, Self)>),
    /// Anything else, as it is.
    Fixed(Value),
}

/// A text with operators.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Fixed(String),
    Time(String),
    Field(Field),
    Header {
        part: Part,
        name: String,
        other: Option<String>,
        no_query: bool,
    },
    Environment(String),
    Silent,
    /// The first so many characters of what is inside.
    Cut(Box<Self>, usize),
}

impl Layout {
    /// Reads a layout.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn read(wire: &LogLayout) -> Result<Self, LayoutError> {
        match (wire.json, wire.format.as_str()) {
            (false, "") => Ok(Self::Text(Template::read(DEFAULT_TEXT)?)),
            (false, text) => Ok(Self::Text(Template::read(text)?)),
            (true, "") => {
                let read = |(name, text): &(&str, &str)| {
                    Ok(((*name).to_owned(), Node::Template(Template::read(text)?)))
                };
                Ok(Self::Json(DEFAULT_JSON.iter().map(read).collect::<Result<_, _>>()?))
            }
            (true, text) => match serde_json::from_str(text) {
                Ok(Value::Object(map)) => Ok(Self::Json(object(map, DEEPEST)?)),
                Ok(other) => Err(LayoutError::Json(format!("found {other}"))),
                Err(error) => Err(LayoutError::Json(error.to_string())),
            },
        }
    }

    /// The members of an object as texts; of a text there are none.
    #[must_use]
    pub fn members(&self, facts: &dyn Facts) -> Vec<(String, String)> {
        let Self::Json(members) = self else { return Vec::new() };
        let text = |value: Value| match value {
            Value::String(text) => text,
            Value::Null => ABSENT.to_owned(),
            other => other.to_string(),
        };
        json(members, facts).into_iter().map(|(name, value)| (name, text(value))).collect()
    }

    /// Appends a line, with its end.
    pub fn write(&self, facts: &dyn Facts, line: &mut String) {
        match self {
            Self::Text(template) => template.write(facts, line),
            Self::Json(members) => {
                let _ = write!(line, "{}", Value::Object(json(members, facts)));
            }
        }
        if !line.ends_with('\n') {
            line.push('\n');
        }
    }
}

fn object(map: Map<String, Value>, deeper: usize) -> Result<Vec<(String, Node)>, LayoutError> {
    let node = |value| match value {
        Value::String(text) => Ok(Node::Template(Template::read(&text)?)),
        Value::Object(map) if deeper > 0 => Ok(Node::Object(object(map, deeper - 1)?)),
        Value::Object(_) => Err(LayoutError::Json("nested too deeply".to_owned())),
        Value::Array(_) => Err(LayoutError::Json("holds a list".to_owned())),
        fixed => Ok(Node::Fixed(fixed)),
    };
    map.into_iter().map(|(name, value)| Ok((name, node(value)?))).collect()
}

fn json(members: &[(String, Node)], facts: &dyn Facts) -> Map<String, Value> {
    let value = |node: &Node| match node {
        Node::Template(template) => template.json(facts),
        Node::Object(members) => Value::Object(json(members, facts)),
        Node::Fixed(value) => value.clone(),
    };
    members.iter().map(|(name, node)| (name.clone(), value(node))).collect()
}

impl Template {
    /// Reads a text with operators.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn read(text: &str) -> Result<Self, LayoutError> {
        let mut pieces = Vec::new();
        let mut rest = text;
        let mut fixed = String::new();
        while let Some(at) = rest.find('%') {
            fixed.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                fixed.push('%');
                rest = after;
                continue;
            }
            let (piece, after) = operator(rest, text)?;
            if !fixed.is_empty() {
                pieces.push(Piece::Fixed(std::mem::take(&mut fixed)));
            }
            pieces.push(piece);
            rest = after;
        }
        fixed.push_str(rest);
        if !fixed.is_empty() {
            pieces.push(Piece::Fixed(fixed));
        }
        Ok(Self(pieces))
    }

    /// Appends the text.
    pub fn write(&self, facts: &dyn Facts, line: &mut String) {
        for piece in &self.0 {
            let _ = match piece.value(facts) {
                Fact::Absent => line.write_str(ABSENT),
                Fact::Text(text) => line.write_str(&text),
                Fact::Number(number) => write!(line, "{number}"),
            };
        }
    }

    /// A single operator keeps its type; what is absent is null.
    fn json(&self, facts: &dyn Facts) -> Value {
        if let [piece] = &self.0[..] {
            return match piece.value(facts) {
                Fact::Absent => Value::Null,
                Fact::Text(text) => text.into(),
                Fact::Number(number) => number.into(),
            };
        }
        let mut text = String::new();
        self.write(facts, &mut text);
        text.into()
    }
}

impl Piece {
    fn value<'a>(&'a self, facts: &'a dyn Facts) -> Fact<'a> {
        match self {
            Self::Fixed(text) => Fact::Text(text.into()),
            Self::Time(format) => Fact::Text(time(facts.started(), format).unwrap_or_default().into()),
            Self::Field(field) => facts.field(*field),
            Self::Header { part, name, other, no_query } => {
                let other = || facts.header(*part, other.as_deref()?);
                let found = facts.header(*part, name).filter(|text| !text.is_empty()).or_else(other);
                match found.filter(|text| !text.is_empty()) {
                    None => Fact::Absent,
                    Some(text) if *no_query => {
                        let path = text.split(['?', '#']).next().unwrap_or_default();
                        Fact::Text(path.to_owned().into())
                    }
                    Some(text) => Fact::Text(text),
                }
            }
            Self::Environment(name) => match std::env::var(name) {
                Ok(value) if !value.is_empty() => Fact::Text(value.into()),
                _ => Fact::Absent,
            },
            Self::Silent => Fact::Absent,
            Self::Cut(inner, most) => match inner.value(facts) {
                Fact::Text(text) => Fact::Text(text.chars().take(*most).collect::<String>().into()),
                fact => fact,
            },
        }
    }
}

/// Reads one operator after its first `%`; says what follows it.
fn operator<'a>(rest: &'a str, whole: &str) -> Result<(Piece, &'a str), LayoutError> {
    let open = || LayoutError::Open(whole.trim_end().to_owned());
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').ok_or_else(open)?;
    let (name, mut after) = rest.split_at(end);
    let mut arguments = None;
    if let Some(inner) = after.strip_prefix('(') {
        // Arguments may have percent signs of their own, those of a time.
        let close = inner.match_indices(')').map(|(at, _)| at);
        let mut close = close.filter(|at| matches!(inner.as_bytes().get(at + 1), Some(b'%' | b':')));
        let close = close.next().ok_or_else(open)?;
        arguments = Some(&inner[..close]);
        after = &inner[close + 1..];
    }
    let mut most = None;
    if let Some(inner) = after.strip_prefix(':') {
        let end = inner.find('%').ok_or_else(open)?;
        let wrong = |_| LayoutError::Arguments(name.to_owned(), "has a length that is no number");
        most = Some(inner[..end].parse().map_err(wrong)?);
        after = &inner[end..];
    }
    let after = after.strip_prefix('%').ok_or_else(open)?;
    let piece = piece(name, arguments)?;
    Ok((most.map_or(piece.clone(), |most| Piece::Cut(Box::new(piece), most)), after))
}

fn piece(name: &str, arguments: Option<&str>) -> Result<Piece, LayoutError> {
    let wrong = |what| LayoutError::Arguments(name.to_owned(), what);
    let header = |part, no_query| {
        let text = arguments.filter(|a| !a.is_empty()).ok_or(wrong("needs the name of a header: (NAME)"))?;
        let (first, other) = text.split_once('?').map_or((text, None), |(a, b)| (a, Some(b)));
        let name = first.to_ascii_lowercase();
        Ok(Piece::Header { part, name, other: other.map(str::to_ascii_lowercase), no_query })
    };
    match name {
        "REQ" => header(Part::Request, false),
        "REQ_WITHOUT_QUERY" => header(Part::Request, true),
        "RESP" => header(Part::Response, false),
        "TRAILER" => header(Part::Trailers, false),
        "START_TIME" => {
            let format = arguments.filter(|a| !a.is_empty()).unwrap_or(DEFAULT_TIME);
            if time(SystemTime::UNIX_EPOCH, format).is_none() {
                return Err(wrong("has a format that is not known here; use %Y %m %d %H %M %S %s %3f %z"));
            }
            Ok(Piece::Time(format.to_owned()))
        }
        "ENVIRONMENT" => {
            let name = arguments.filter(|a| !a.is_empty()).ok_or(wrong("needs the name of a variable"))?;
            Ok(Piece::Environment(name.to_owned()))
        }
        _ => match FIELDS.iter().find(|(_, text)| *text == name) {
            Some((field, _)) => Ok(Piece::Field(*field)),
            None if SILENT.contains(&name) => Ok(Piece::Silent),
            None => {
                let close = |text: &&str| text.starts_with(name) || name.starts_with(text);
                let mut known = FIELDS.iter().map(|(_, text)| *text).filter(close);
                let hint = known.next().map_or_else(String::new, |k| format!("; did you mean %{k}%?"));
                Err(LayoutError::Unknown(name.to_owned(), hint))
            }
        },
    }
}

/// A time as `strftime` writes it, in UTC; none for what is not known here.
fn time(at: SystemTime, format: &str) -> Option<String> {
    // 2018-02-14T00:28:07.133456789Z
    let text = humantime::format_rfc3339_nanos(at).to_string();
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut out = String::with_capacity(32);
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (spec, after) = rest.split_at(rest.find(|c: char| c.is_ascii_alphabetic() && c != 'E')? + 1);
        rest = after;
        match spec {
            "Y" => out.push_str(&text[..4]),
            "y" => out.push_str(&text[2..4]),
            "m" => out.push_str(&text[5..7]),
            "d" => out.push_str(&text[8..10]),
            "H" => out.push_str(&text[11..13]),
            "M" => out.push_str(&text[14..16]),
            "S" => out.push_str(&text[17..19]),
            "F" => out.push_str(&text[..10]),
            "T" => out.push_str(&text[11..19]),
            "s" => drop(write!(out, "{}", since.as_secs())),
            "z" => out.push_str("+0000"),
            "Z" => out.push_str("UTC"),
            "f" => out.push_str(&text[20..29]),
            _ => {
                let (before, digits, after) = match spec.as_bytes() {
                    [digit, b'f'] => ("", digit, ""),
                    [b'E', digit, b'S'] => (&text[17..20], digit, ""),
                    _ => return None,
                };
                let digits = usize::from(digits.checked_sub(b'0').filter(|d| (1..=9).contains(d))?);
                out.push_str(before);
                out.push_str(&text[20..20 + digits]);
                out.push_str(after);
            }
        }
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Known;

    impl Facts for Known {
        fn started(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_518_568_087_133)
        }

        fn field(&self, field: Field) -> Fact<'_> {
            match field {
                Field::ResponseCode => Fact::Number(503),
                Field::ResponseFlags => "UH".into(),
                Field::RouteName => "default".into(),
                _ => Fact::Absent,
            }
        }

        fn header(&self, part: Part, name: &str) -> Option<Cow<'_, str>> {
            match (part, name) {
                (Part::Request, ":method") => Some("GET".into()),
                (Part::Request, ":path") => Some("/a?b=c".into()),
                (Part::Response, "x-y") => Some("why".into()),
                _ => None,
            }
        }
    }

    fn line(json: bool, format: &str) -> String {
        let mut line = String::new();
        Layout::read(&LogLayout { json, format: format.into() }).unwrap().write(&Known, &mut line);
        line
    }

    fn wrong(json: bool, format: &str) -> String {
        Layout::read(&LogLayout { json, format: format.into() }).unwrap_err().to_string()
    }

    #[test]
    fn operators_stand_for_their_values_and_a_dash_for_none() {
        assert_eq!(
            line(false, "[%START_TIME%] %REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %RESPONSE_CODE%\n"),
            "[2018-02-14T00:28:07.133Z] GET /a?b=c 503\n"
        );
        assert_eq!(line(false, "%RESP(X-Y):2% %REQ(NO)% %TRAILER(X)% 100%%"), "wh - - 100%\n");
        assert_eq!(line(false, "%REQ_WITHOUT_QUERY(:PATH)% %DYNAMIC_METADATA(a:b)%"), "/a -\n");
    }

    #[test]
    fn times_are_written_as_the_format_says() {
        let text = "%START_TIME(%Y/%m/%dT%H:%M:%S%z %s.%3f)% %START_TIME(%F %T %E6S)%";
        assert_eq!(
            line(false, text),
            "2018/02/14T00:28:07+0000 1518568087.133 2018-02-14 00:28:07 07.133000\n"
        );
    }

    #[test]
    fn json_keeps_the_type_of_a_single_operator() {
        let format = r#"{"code": "%RESPONSE_CODE%", "who": {"m": "%REQ(:METHOD)%", "no": "%REQ(X)%"}, "both": "%RESPONSE_FLAGS% %RESPONSE_CODE%", "n": 1}"#;
        let value: Value = serde_json::from_str(&line(true, format)).unwrap();
        let expected =
            serde_json::json!({"code": 503, "who": {"m": "GET", "no": null}, "both": "UH 503", "n": 1});
        assert_eq!(value, expected);
    }

    #[test]
    fn layouts_that_nobody_wrote_are_those_of_istio() {
        let text = line(false, "");
        let start = "[2018-02-14T00:28:07.133Z] \"GET /a?b=c -\" 503 UH - - \"-\" - - - - \"-\" \"-\" \"-\" \"-\" \"-\" - ";
        assert!(text.starts_with(start), "{text}");
        assert!(text.ends_with(" default\n"), "{text}");
        let value: Value = serde_json::from_str(&line(true, "")).unwrap();
        assert_eq!((&value["response_code"], &value["route_name"]), (&503.into(), &"default".into()));
        assert_eq!(value.as_object().unwrap().len(), 24);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_would_be_right() {
        assert!(wrong(false, "%RESPONSE_COD%").contains("did you mean %RESPONSE_CODE%?"));
        assert!(wrong(false, "100% of").contains("write %% for a percent sign"));
        assert!(wrong(false, "%REQ%").contains("needs the name of a header"));
        assert!(wrong(false, "%REQ(A):x%").contains("no number"));
        assert!(wrong(false, "%START_TIME(%Q)%").contains("not known"));
        assert!(wrong(true, "%REQ(A)%").contains("is no JSON object"));
        assert!(wrong(true, r#"{"a": ["x"]}"#).contains("holds a list"));
    }
}
