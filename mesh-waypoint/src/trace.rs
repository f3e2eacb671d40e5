//! Traces: a request's place in one, the span that it makes here, and how spans reach a collector.
//!
//! | module | for |
//! |---|---|
//! | [`context`] | contexts in headers: W3C, B3; pure |
//! | [`request`] | a request's spans, from its head to the end of its answer |
//! | [`span`] | a finished span |
//! | [`line`] | a line of an access log that goes to a collector |
//! | [`export`] | spans and lines on their way: OTLP over gRPC and HTTP, Zipkin's JSON |

pub mod context;
pub mod export;
pub mod line;
mod otlp;
pub mod request;
pub mod span;
mod zipkin;
