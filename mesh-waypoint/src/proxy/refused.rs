//! Answers of our own, with Envoy's texts and what metrics and log say of them.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use mesh_core::telemetry::Flags;

use super::body::ResponseBody;
use super::dial::DialError;
use super::headers;
use crate::telemetry::Exchange;

/// An answer of our own.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Status.
    pub status: StatusCode,
    /// Headers beside the content type.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    /// gRPC status, where it is not the one that follows from the HTTP status.
    pub grpc: Option<u16>,
    /// Flags.
    pub flags: Flags,
    /// Envoy's words for who decided.
    pub details: String,
    /// Why the endpoint could not be used.
    pub cause: String,
}

const BEFORE_ANSWER: &str = "upstream_reset_before_response_started";

impl Refused {
    /// An answer with a body.
    #[must_use]
    pub fn new(
        status: StatusCode,
        body: impl Into<Bytes>,
        flags: Flags,
        details: impl Into<String>,
    ) -> Box<Self> {
        let (body, details) = (body.into(), details.into());
        let (headers, cause) = (HeaderMap::new(), String::new());
        Box::new(Self { status, headers, body, grpc: None, flags, details, cause })
    }

    /// What the client sent is no request that can be served.
    #[must_use]
    pub fn bad_request(details: &str) -> Box<Self> {
        Self::new(StatusCode::BAD_REQUEST, "", Flags::DOWNSTREAM_PROTOCOL_ERROR, details)
    }

    /// The mesh's own configuration cannot be honoured.
    #[must_use]
    pub fn misconfigured(cause: impl Into<String>) -> Box<Self> {
        let own =
            Self::new(StatusCode::INTERNAL_SERVER_ERROR, "", Flags::NO_CLUSTER, "invalid_configuration");
        own.because(cause)
    }

    /// No rule matches.
    #[must_use]
    pub fn no_route() -> Box<Self> {
        Self::new(StatusCode::NOT_FOUND, "", Flags::NO_ROUTE, "route_not_found")
    }

    /// The host is another listener's than the one that the client's TLS connection is to (Gateway API, HTTPS).
    #[must_use]
    pub fn misdirected() -> Box<Self> {
        Self::new(StatusCode::MISDIRECTED_REQUEST, "", Flags::NO_ROUTE, "misdirected_request")
    }

    /// A rule names what there is not.
    #[must_use]
    pub fn no_cluster(cause: impl Into<String>) -> Box<Self> {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "", Flags::NO_CLUSTER, "cluster_not_found").because(cause)
    }

    /// No endpoint can take it.
    #[must_use]
    pub fn no_healthy_upstream(cause: impl Into<String>) -> Box<Self> {
        let flags = Flags::NO_HEALTHY_UPSTREAM;
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream", flags, "no_healthy_upstream")
            .because(cause)
    }

    /// A limit of the cluster is reached.
    #[must_use]
    pub fn overflow(cause: impl Into<String>) -> Box<Self> {
        let flags = Flags::UPSTREAM_OVERFLOW;
        Self::reset("overflow", flags, &format!("{BEFORE_ANSWER}{{overflow}}")).because(cause)
    }

    /// The endpoint could not be connected to.
    #[must_use]
    pub fn unconnected(error: &DialError) -> Box<Self> {
        let cause = error.to_string();
        let reason = match error {
            DialError::Timeout => "connection timeout".to_owned(),
            _ => format!("remote connection failure, transport failure reason: {cause}"),
        };
        let details = format!("{BEFORE_ANSWER}{{remote_connection_failure|{}}}", cause.replace(' ', "_"));
        Self::reset(&reason, Flags::UPSTREAM_CONNECTION_FAILURE, &details).because(cause)
    }

    /// The endpoint ended the connection before it answered.
    #[must_use]
    pub fn terminated(cause: impl Into<String>) -> Box<Self> {
        let details = format!("{BEFORE_ANSWER}{{connection_termination}}");
        Self::reset("connection termination", Flags::UPSTREAM_CONNECTION_TERMINATION, &details).because(cause)
    }

    /// The endpoint did not answer in time.
    #[must_use]
    pub fn timed_out(details: &'static str) -> Box<Self> {
        let flags = Flags::UPSTREAM_TIMEOUT;
        Self::new(StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", flags, details)
    }

    /// Policy says no.
    #[must_use]
    pub fn denied(details: String) -> Box<Self> {
        let flags = Flags::default();
        Self::new(StatusCode::FORBIDDEN, crate::security::authz::DENIED_BODY, flags, details)
    }

    fn reset(reason: &str, flags: Flags, details: &str) -> Box<Self> {
        let text =
            format!("upstream connect error or disconnect/reset before headers. reset reason: {reason}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, text, flags, details)
    }

    /// The same with a cause for the log.
    #[must_use]
    pub fn because(mut self: Box<Self>, cause: impl Into<String>) -> Box<Self> {
        self.cause = cause.into();
        self
    }

    /// The same with further flags.
    #[must_use]
    pub fn flagged(mut self: Box<Self>, flags: Flags) -> Box<Self> {
        self.flags = self.flags.with(flags);
        self
    }

    /// For the log of a stream.
    #[must_use]
    pub fn text(&self) -> String {
        if self.cause.is_empty() { self.details.clone() } else { self.cause.clone() }
    }

    /// Gives the answer, as gRPC if the request is.
    pub(super) fn answer(self, mut exchange: Exchange) -> Response<ResponseBody> {
        let Self { status, headers, body, grpc, flags, details, cause } = self;
        exchange.flag(flags);
        exchange.log(|line| {
            line.details = details;
            line.upstream_failure = cause;
        });
        let mut answer = Response::new(());
        *answer.headers_mut() = headers;
        let as_grpc = exchange.is_grpc();
        if as_grpc {
            let message = String::from_utf8_lossy(&body);
            let status = grpc.unwrap_or_else(|| headers::grpc_of(status));
            headers::put_grpc(answer.headers_mut(), status, &message);
        } else {
            *answer.status_mut() = status;
            if !body.is_empty() {
                let kind = answer.headers_mut().entry(header::CONTENT_TYPE);
                kind.or_insert(HeaderValue::from_static("text/plain"));
            }
        }
        exchange.answered(answer.status(), answer.headers());
        let body = if as_grpc { Bytes::new() } else { body };
        answer.map(|()| ResponseBody::own(body, exchange))
    }
}
