//! Lines of the access log: layouts, filters, and what a request leaves for them.

use std::sync::Arc;

use mesh_core::expression::Expression;
use mesh_core::telemetry::{AccessRecord, Layout, RequestLines, RequestRecord};
use mesh_core::xds::proto::l7;

use super::facts::{Ended, Kept};
use crate::trace::export::Outbox;
use crate::trace::line::Line;

/// What is logged of requests.
#[derive(Debug, Default, Clone)]
pub enum Logs {
    /// A line in our own layout, unless the process was told otherwise.
    #[default]
    Own,
    /// These; none is none.
    Lines(Arc<[Log]>),
}

/// One line per request that its filter takes.
#[derive(Debug, Clone)]
pub struct Log {
    /// Where it goes.
    pub output: Output,
    /// What it looks like.
    pub layout: Arc<Layout>,
    /// Whether there is one; none takes all.
    pub filter: Option<Expression>,
}

/// Where lines go.
#[derive(Debug, Clone)]
pub enum Output {
    /// Standard output, also in the place of any file.
    Standard,
    /// Standard error.
    Error,
    /// A collector, over OTLP.
    Collector(Arc<Collector>),
}

/// A collector of lines.
#[derive(Debug)]
pub struct Collector {
    /// Where it is. Lines that go to one `Arc` go together.
    pub to: Arc<l7::Tracer>,
    /// Envoy's `log_name`.
    pub name: Arc<str>,
    /// Attributes of each record.
    pub attributes: Option<Layout>,
}

impl Log {
    fn takes(&self, ended: &Ended<'_>) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.holds(|root| ended.attributes(root)))
    }

    /// Whether its lines go to a collector.
    #[must_use]
    pub const fn is_sent(&self) -> bool {
        matches!(self.output, Output::Collector(_))
    }

    /// Hands its line over to its collector, if it has one.
    pub fn send(&self, ended: &Ended<'_>, outbox: &Outbox) {
        let Output::Collector(collector) = &self.output else { return };
        if !self.takes(ended) {
            return;
        }
        let mut body = String::new();
        self.layout.write(ended, &mut body);
        body.truncate(body.trim_end_matches('\n').len());
        let attributes =
            collector.attributes.as_ref().map(|layout| layout.members(ended)).unwrap_or_default();
        let at = ended.kept.started;
        let trace = ended.request.trace;
        outbox
            .push_line(&collector.to, Line { log: Arc::clone(&collector.name), at, body, attributes, trace });
    }
}

impl Output {
    /// That of a path.
    #[must_use]
    pub fn of(path: &str) -> Self {
        if path == "/dev/stderr" { Self::Error } else { Self::Standard }
    }
}

/// What a request has left for its lines.
#[derive(Debug)]
pub struct Left {
    /// The lines.
    pub logs: Arc<[Log]>,
    /// What the record does not hold.
    pub kept: Kept,
}

impl RequestLines for Left {
    fn write(&self, record: &AccessRecord, request: &RequestRecord, lines: &mut String) {
        let ended = Ended { record, request, kept: &self.kept };
        for log in &*self.logs {
            if log.is_sent() || !log.takes(&ended) {
                continue;
            }
            match log.output {
                Output::Collector(_) => {}
                Output::Standard => log.layout.write(&ended, lines),
                Output::Error => {
                    let mut line = String::new();
                    log.layout.write(&ended, &mut line);
                    eprint!("{line}");
                }
            }
        }
    }
}
