//! Whether, when and where a request is tried again. The conditions and the backoff are Envoy's, the defaults Istio's.
//!
//! Not decided here: whether the request's body can be sent again, and whether there is room for a retry
//! ([`super::Limit::Retry`]).

use std::time::Duration;

use http::HeaderMap;
use mesh_core::xds::proto::l7;

use super::policy::duration;

/// Tries beside the first one when nobody says how many (Istio).
const DEFAULT_ATTEMPTS: u32 = 2;
/// On what, when nobody says (Istio); with status 503.
const DEFAULT_ON: [&str; 5] =
    ["connect-failure", "refused-stream", "unavailable", "cancelled", "retriable-status-codes"];
const DEFAULT_STATUS: u16 = 503;
const DEFAULT_BACKOFF: Duration = Duration::from_millis(25);
/// The backoff's limit, in times of its base (Envoy).
const MAX_BACKOFF: u32 = 10;
/// After so many tries in one locality the others come (Istio's `previous_priorities` with an update frequency of 2).
const TRIES_PER_LOCALITY: u32 = 2;

/// A set of conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Conditions(u16);

macro_rules! conditions {
    ($($bit:literal $constant:ident $name:literal;)*) => {
        impl Conditions {
            $(const $constant: Self = Self(1 << $bit);)*

            fn named(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$constant),)*
                    _ => None,
                }
            }
        }
    };
}

conditions! {
    0 SERVER_ERROR "5xx";
    1 GATEWAY_ERROR "gateway-error";
    2 RESET "reset";
    3 RESET_BEFORE_REQUEST "reset-before-request";
    4 CONNECT_FAILURE "connect-failure";
    5 RETRIABLE_4XX "retriable-4xx";
    6 REFUSED_STREAM "refused-stream";
    7 RETRIABLE_STATUS_CODES "retriable-status-codes";
    8 RETRIABLE_HEADERS "retriable-headers";
    9 CANCELLED "cancelled";
    10 DEADLINE_EXCEEDED "deadline-exceeded";
    11 INTERNAL "internal";
    12 RESOURCE_EXHAUSTED "resource-exhausted";
    13 UNAVAILABLE "unavailable";
}

impl Conditions {
    fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    fn has(self, any: &[Self]) -> bool {
        any.iter().any(|condition| self.0 & condition.0 != 0)
    }
}

/// The retry policy of a rule, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries beside the first one.
    pub attempts: u32,
    /// Of each try; none: only the request's own timeout counts.
    pub per_try_timeout: Option<Duration>,
    /// Endpoints that were tried are used again only when there is no other.
    pub avoid_tried: bool,
    on: Conditions,
    status_codes: Box<[u16]>,
    backoff: Duration,
    remote_localities: bool,
}

/// How a try ended.
#[derive(Debug, Clone, Copy)]
pub enum TryEnd<'a> {
    /// With an answer, of which nothing has been passed on yet.
    Response {
        /// Status.
        status: u16,
        /// Its headers; of a gRPC answer without messages `grpc-status` is here.
        headers: &'a HeaderMap,
        /// Those of the request: may name headers to retry on (`x-envoy-retriable-header-names`).
        request: &'a HeaderMap,
    },
    /// No connection could be made.
    ConnectFailure,
    /// The stream or its connection broke before the answer.
    Reset {
        /// Some of the request had been sent.
        request_started: bool,
    },
    /// The endpoint refused the stream (REFUSED_STREAM, or after its GOAWAY): it did nothing with it.
    RefusedStream,
    /// No answer within the timeout of the try.
    PerTryTimeout,
    /// A limit of ours did not let it begin.
    Overflow,
}

impl RetryPolicy {
    /// What a rule says, else the mesh settings, else Istio's default.
    #[must_use]
    pub fn new(rule: Option<&l7::Retry>, settings: &l7::Settings) -> Self {
        let default = l7::Retry { attempts: DEFAULT_ATTEMPTS, ..l7::Retry::default() };
        let wire = rule.or(settings.default_retry.as_ref()).unwrap_or(&default);
        let mut on = Conditions::default();
        let mut codes: Vec<u16> =
            wire.status_codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect();
        for name in &wire.on {
            match (Conditions::named(name), name.parse()) {
                (Some(condition), _) => on.add(condition),
                (None, Ok(code)) => codes.push(code),
                (None, Err(_)) => {
                    tracing::warn!("retry policy: retryOn: {name:?} is not known and has no effect");
                }
            }
        }
        if wire.on.is_empty() {
            DEFAULT_ON
                .iter()
                .filter_map(|name| Conditions::named(name))
                .for_each(|condition| on.add(condition));
            if codes.is_empty() {
                codes.push(DEFAULT_STATUS);
            }
        }
        if !codes.is_empty() {
            on.add(Conditions::RETRIABLE_STATUS_CODES);
        }
        Self {
            attempts: wire.attempts,
            per_try_timeout: duration(wire.per_try_timeout.as_ref()).filter(|d| !d.is_zero()),
            avoid_tried: wire.ignore_previous_hosts.unwrap_or(true),
            on,
            status_codes: codes.into(),
            backoff: duration(wire.backoff.as_ref()).filter(|d| !d.is_zero()).unwrap_or(DEFAULT_BACKOFF),
            remote_localities: wire.remote_localities,
        }
    }

    /// Whether there is to be another try after `tries` of them (1 after the first).
    #[must_use]
    pub fn should_retry(&self, end: &TryEnd<'_>, tries: u32) -> bool {
        tries <= self.attempts && self.covers(end)
    }

    /// How long to wait before the try after `tries` of them: anything up to twice the last limit, at first the base.
    #[must_use]
    pub fn backoff(&self, tries: u32, random: u64) -> Duration {
        let doubled =
            self.backoff.saturating_mul(1_u32.checked_shl(tries.saturating_sub(1)).unwrap_or(u32::MAX));
        let limit = doubled.min(self.backoff.saturating_mul(MAX_BACKOFF));
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(random % nanos.max(1))
    }

    /// Whether the try after `tries` of them should be somewhere else ([`super::PickContext::leave_localities`]).
    #[must_use]
    pub fn leave_localities(&self, tries: u32) -> bool {
        self.remote_localities && tries >= TRIES_PER_LOCALITY
    }

    fn covers(&self, end: &TryEnd<'_>) -> bool {
        let on = self.on;
        let error = [Conditions::SERVER_ERROR, Conditions::GATEWAY_ERROR, Conditions::RESET];
        match *end {
            TryEnd::Overflow => false,
            TryEnd::Response { status, headers, request } => self.covers_response(status, headers, request),
            TryEnd::ConnectFailure => {
                on.has(&error) || on.has(&[Conditions::CONNECT_FAILURE, Conditions::RESET_BEFORE_REQUEST])
            }
            TryEnd::RefusedStream => {
                on.has(&error) || on.has(&[Conditions::REFUSED_STREAM, Conditions::RESET_BEFORE_REQUEST])
            }
            TryEnd::Reset { request_started } => {
                on.has(&error) || (!request_started && on.has(&[Conditions::RESET_BEFORE_REQUEST]))
            }
            TryEnd::PerTryTimeout => on.has(&error),
        }
    }

    fn covers_response(&self, status: u16, headers: &HeaderMap, request: &HeaderMap) -> bool {
        // The endpoint, or a proxy before it, says that it is not worth it.
        if headers.contains_key("x-envoy-overloaded") || headers.contains_key("x-envoy-ratelimited") {
            return false;
        }
        let on = self.on;
        let by_status = match status {
            502..=504 => on.has(&[Conditions::SERVER_ERROR, Conditions::GATEWAY_ERROR]),
            500..=599 => on.has(&[Conditions::SERVER_ERROR]),
            409 => on.has(&[Conditions::RETRIABLE_4XX]),
            _ => false,
        };
        by_status
            || (on.has(&[Conditions::RETRIABLE_STATUS_CODES]) && self.status_codes.contains(&status))
            || (on.has(&[Conditions::RETRIABLE_HEADERS]) && has_named_header(headers, request))
            || grpc_condition(headers).is_some_and(|condition| on.has(&[condition]))
    }
}

/// The condition of a gRPC answer without messages.
fn grpc_condition(headers: &HeaderMap) -> Option<Conditions> {
    match headers.get("grpc-status")?.as_bytes() {
        b"1" => Some(Conditions::CANCELLED),
        b"4" => Some(Conditions::DEADLINE_EXCEEDED),
        b"8" => Some(Conditions::RESOURCE_EXHAUSTED),
        b"13" => Some(Conditions::INTERNAL),
        b"14" => Some(Conditions::UNAVAILABLE),
        _ => None,
    }
}

/// Whether the answer has one of the headers that the request names.
fn has_named_header(headers: &HeaderMap, request: &HeaderMap) -> bool {
    let lists =
        request.get_all("x-envoy-retriable-header-names").iter().filter_map(|list| list.to_str().ok());
    lists.flat_map(|list| list.split(',')).any(|name| headers.contains_key(name.trim()))
}
