//! Faults that are injected on purpose, and copies of requests: what a random number decides.

use std::fmt;
use std::time::Duration;

use http::StatusCode;
use mesh_core::xds::proto::l7;

use super::problem::Invalid;
use super::rule::{Backend, duration};

const MILLION: u32 = 1_000_000;

/// A share of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    pub(super) fn compile(parts_per_million: u32) -> Result<Self, Invalid> {
        if parts_per_million > MILLION {
            let reason = format!("{parts_per_million} is more than all (a million)");
            return Err(Invalid::new("parts_per_million", reason));
        }
        Ok(Self(parts_per_million))
    }

    /// Whether a request is among them. `random` is uniform.
    #[must_use]
    pub fn takes(self, random: u64) -> bool {
        random % u64::from(MILLION) < u64::from(self.0)
    }
}

/// Delays and refuses a share of requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    delay: Option<(Duration, Share)>,
    abort: Option<(Abort, Share)>,
}

/// What a request is refused with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// HTTP status.
    Http(StatusCode),
    /// gRPC status code.
    Grpc(u8),
}

/// What is done to one request: first the delay, then the refusal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Injected {
    /// Waits for that long.
    pub delay: Option<Duration>,
    /// Is refused instead of sent on.
    pub abort: Option<Abort>,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", f64::from(self.0) / 10_000.0)
    }
}

/// In words, for people.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((delay, share)) = &self.delay {
            write!(f, "delay {} of {share}", humantime::format_duration(*delay))?;
        }
        if let Some((abort, share)) = &self.abort {
            let between = if self.delay.is_some() { ", " } else { "" };
            match abort {
                Abort::Http(status) => write!(f, "{between}abort {} of {share}", status.as_u16())?,
                Abort::Grpc(code) => write!(f, "{between}abort gRPC {code} of {share}")?,
            }
        }
        Ok(())
    }
}

impl Fault {
    pub(super) fn compile(msg: &l7::Fault) -> Result<Self, Invalid> {
        use l7::fault::abort::Kind;
        let delay = msg.delay.as_ref().map(|delay| {
            let share = Share::compile(delay.parts_per_million).map_err(|e| e.within("delay"))?;
            let fixed = duration(delay.fixed.as_ref(), "delay.fixed")?.unwrap_or_default();
            Ok((fixed, share))
        });
        let abort = msg.abort.as_ref().map(|abort| {
            let share = Share::compile(abort.parts_per_million).map_err(|e| e.within("abort"))?;
            let with = match abort.kind {
                Some(Kind::HttpStatus(status)) => Abort::Http(http_status(status, "abort.http_status")?),
                Some(Kind::GrpcStatus(code @ 0..=16)) => Abort::Grpc(code as u8),
                Some(Kind::GrpcStatus(code)) => {
                    let reason = format!("{code} is no gRPC status (0 to 16)");
                    return Err(Invalid::new("abort.grpc_status", reason));
                }
                None => return Err(Invalid::new("abort", "needs `http_status` or `grpc_status`")),
            };
            Ok((with, share))
        });
        Ok(Self { delay: delay.transpose()?, abort: abort.transpose()? })
    }

    /// What is done to a request; the random numbers are uniform and independent.
    #[must_use]
    pub fn decide(&self, random_delay: u64, random_abort: u64) -> Injected {
        let delay = self.delay.filter(|(_, share)| share.takes(random_delay)).map(|(delay, _)| delay);
        let abort = self.abort.filter(|(_, share)| share.takes(random_abort)).map(|(abort, _)| abort);
        Injected { delay, abort }
    }
}

/// Sends a copy of a share of requests elsewhere and drops the answers.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// Where to.
    pub backend: Backend,
    /// Which requests.
    pub share: Share,
}

/// The authority of a copy: that of the request with `-shadow` behind the host, so that its receiver can tell (Envoy).
#[must_use]
pub fn shadow_authority(authority: &str) -> String {
    match super::rewrite::split_port(authority) {
        (host, Some(port)) => format!("{host}-shadow:{port}"),
        (host, None) => format!("{host}-shadow"),
    }
}

/// A status that can be answered with: 200 to 599.
pub(super) fn http_status(status: u32, field: &str) -> Result<StatusCode, Invalid> {
    let valid = u16::try_from(status).ok().filter(|status| (200..600).contains(status));
    valid
        .and_then(|status| StatusCode::from_u16(status).ok())
        .ok_or_else(|| Invalid::new(field, format!("{status} is no status of an answer (200 to 599)")))
}
